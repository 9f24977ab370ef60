"""Packed layers compute what the layers compute, and leave no trace."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import tiny
from spinlm.generation.packed_linear import packed_bytes, packed_linears
from unit.generation.adapters import with_adapter
from unit.players.families import build_model

ADAPTERS: list[dict[str, Any] | None] = [None, {}, {"use_dora": True}, {"use_rslora": True}]


def _model(family: str, adapter: dict[str, Any] | None) -> Any:
    model = build_model(family)
    return model if adapter is None else with_adapter(model, **adapter)


def _state(model: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, int]]:
    """Every module's own attributes, every tensor's values, and where they lie."""
    modules = {place: (type(module), set(vars(module))) for place, module in model.named_modules()}
    tensors = dict(model.named_parameters())
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    return modules, values, {name: tensor.data_ptr() for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo", "opt"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_packed_layers_compute_the_same(family: str, adapter: dict[str, Any] | None) -> None:
    model = _model(family, adapter)
    ids = torch.randint(0, 256, (3, 7), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    with packed_linears(model, rows=3):
        packed = model(ids).logits
        assert torch.allclose(packed, expected, atol=1e-4, rtol=1e-4)
        names = {place.split(".")[-1] for place, module in model.named_modules() if "forward" in vars(module)}
    assert {"llama": "lm_head", "gpt2": "c_attn", "gpt_neo": "q_proj", "opt": "fc1"}[family] in names
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_weights_and_modules_are_what_they_were_even_after_an_exception(
    family: str, adapter: dict[str, Any] | None
) -> None:
    model = _model(family, adapter)
    modules, values, places = _state(model)
    caches = [copy.copy(module._caches) for module in model.modules() if hasattr(module, "_caches")]
    with pytest.raises(KeyError), packed_linears(model, rows=4):
        inside = _state(model)
        assert all(torch.equal(values[name], tensor) for name, tensor in inside[1].items())
        assert inside[2] == places
        raise KeyError
    after = _state(model)
    assert after[0] == modules
    assert all(torch.equal(values[name], tensor) for name, tensor in after[1].items())
    assert after[2] == places
    assert [module._caches for module in model.modules() if hasattr(module, "_caches")] == caches
    assert not any(getattr(module, "merged_adapters", []) for module in model.modules())


@torch.no_grad()
def test_a_switched_off_adapter_stays_off() -> None:
    model = _model("llama", {})
    ids = torch.arange(12).view(2, 6)
    with model.disable_adapter():
        expected = model(ids).logits
        with packed_linears(model, rows=2):
            assert torch.allclose(model(ids).logits, expected, atol=1e-4)


def test_an_adapter_of_another_kind_is_applied_beside_its_packed_layer() -> None:
    model = peft.get_peft_model(build_model("llama"), peft.IA3Config(task_type="CAUSAL_LM"))
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        with packed_linears(model, rows=2):
            assert torch.allclose(model(ids).logits, expected, atol=1e-4)


def test_the_copies_are_counted() -> None:
    """q, o 16x16; k, v 8x16; gate, up, down 32x16; two layers; the head 260x16; four bytes each."""
    layer = 2 * 16 * 16 + 2 * 8 * 16 + 3 * 32 * 16
    expected = 4 * (2 * layer + 260 * 16)
    memory = 4 * expected  # a quarter of it may be copies
    assert packed_bytes(tiny.build_model("llama"), memory) == expected
    assert packed_bytes(_model("llama", {}), memory) == expected
    assert packed_bytes(tiny.build_model("llama").to(torch.bfloat16), memory) == 0
    assert packed_bytes(tiny.build_model("llama"), memory - 4) == 0, "too much of it: none are made"

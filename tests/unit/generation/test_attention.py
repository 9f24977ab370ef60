"""Attention while decoding, against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import tiny
from spinlm.generation.attention import NAME, attend, decoding_attention


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_it_attends_as_sdpa_does(key_heads: int, length: int, scaling: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 6 // key_heads
    module.is_causal = True
    query = torch.randn(3, 6, length, 8, generator=generator)
    kept = torch.randn(2, 5, key_heads, 20, 8, generator=generator)
    key, value = (states[:3, :, 4:17] for states in kept)
    mask = torch.rand(3, 1, length, 13, generator=generator) > 0.4
    mask[..., 0] = True
    ours, _ = attend(module, query, key, value, mask, scaling=scaling)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(("family", "used"), [("llama", NAME), ("gpt2", NAME), ("gpt_neo", "eager")])
def test_a_models_own_choice_is_given_back(family: str, used: str) -> None:
    model = tiny.build_model(family)
    chosen = model.config._attn_implementation
    with pytest.raises(KeyError), decoding_attention(model):
        assert model.config._attn_implementation == used
        raise KeyError
    assert model.config._attn_implementation == chosen

"""Linear layers by oneDNN, against torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from spinlm.players.linear import fast_linear_layers, linear


def _gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (1, 1, 7), (16, 7), (11, 7), (3, 7, 7)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_product_and_gradients(shape: tuple[int, ...], with_bias: bool, transposed: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    weight = (torch.randn(7, 4).t() if transposed else torch.randn(4, 7)).requires_grad_()
    bias = torch.randn(4, requires_grad=True) if with_bias else None
    inputs = (x, weight) if bias is None else (x, weight, bias)
    ours, theirs = linear(x, weight, bias), F.linear(x, weight, bias)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for mine, expected in zip(_gradients(ours, *inputs), _gradients(theirs, *inputs), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


class _Rows(TorchDispatchMode):
    """The numbers of rows of all products by oneDNN."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket is torch.ops.mkldnn._linear_pointwise:
            self.seen.add(args[0].shape[:-1].numel())
        return func(*args, **(kwargs or {}))


def test_onednn_meets_few_numbers_of_rows() -> None:
    """It keeps megabytes of code for each of them."""
    model = _adapted()
    with _Rows() as rows, fast_linear_layers(model):
        for count in range(1, 41):
            _outcome(model, torch.randn(count, 5))
    assert rows.seen == {*range(1, 9), 16, 24, 32, 40}


def test_a_frozen_weight_keeps_no_input() -> None:
    kept: list[Tensor] = []
    x, weight = torch.randn(6, 7, requires_grad=True), torch.randn(4, 7)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x, weight)
    assert [tensor.data_ptr() for tensor in kept] == [weight.data_ptr()]


def test_a_gradient_that_does_not_lie_in_one_piece() -> None:
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5)
    (ours,) = torch.autograd.grad(linear(x, weight).t().contiguous().sum(1) @ torch.arange(4.0), x)
    torch.testing.assert_close(ours, torch.arange(4.0) @ weight.expand(3, 4, 5))
    (of_a_view,) = torch.autograd.grad(linear(x, weight).sum(), x)  # its gradient is expanded from one number
    torch.testing.assert_close(of_a_view, weight.sum(0).expand(3, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_left_to_torch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 5, dtype=dtype), torch.randn(4, 5, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_under_autocast_it_is_autocast() -> None:
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


def test_layers_are_exchanged_for_a_while_and_see_new_weights() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), Conv1D(4, 6), nn.Linear(4, 2, bias=False))
    x = torch.randn(3, 5)
    plain = model(x)
    with fast_linear_layers(model):
        names = [name for name, module in model.named_modules() if "forward" in vars(module)]
        torch.testing.assert_close(model(x), plain, atol=1e-6, rtol=1e-5)
        with torch.no_grad():
            model[3].weight.mul_(2)
        torch.testing.assert_close(model(x), 2 * plain, atol=1e-6, rtol=1e-5)
    assert names == ["0", "2", "3"]
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_are_given_back_after_an_exception() -> None:
    model = nn.Sequential(nn.Linear(5, 6))
    with pytest.raises(RuntimeError, match="on purpose"), fast_linear_layers(model):
        raise RuntimeError("on purpose")
    assert "forward" not in vars(model[0])


class _TwoLayers(nn.Module):
    """A linear layer and a GPT-2 one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), Conv1D(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def _adapted(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["first", "second"], init_lora_weights=False, **settings)
    return get_peft_model(_TwoLayers(), config)


def _outcome(model: Any, x: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of the input and of all that is trained."""
    torch.manual_seed(1)  # for dropout
    x = x.clone().requires_grad_()
    output = model(x)
    return output, *_gradients(output, x, *(p for p in model.parameters() if p.requires_grad))


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.5},
    "dora": {"use_dora": True},
    "scaled-by-root": {"use_rslora": True},
    "trained-biases": {"bias": "all"},
    "biases-of-their-own": {"lora_bias": True},
}


@pytest.mark.parametrize("settings", [pytest.param(value, id=name) for name, value in SETTINGS.items()])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (11, 5), (3, 7, 5)])
def test_adapted_layers_compute_what_peft_does(settings: dict[str, Any], shape: tuple[int, ...]) -> None:
    model, x = _adapted(**settings).train(), torch.randn(shape)
    expected = _outcome(model, x)
    with fast_linear_layers(model):
        found = _outcome(model, x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_adapters_are_switched_as_in_peft() -> None:
    model, x = _adapted(), torch.randn(3, 5)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    layers = [model.first, model.second]

    def states() -> list[Tensor]:
        outputs = [model(x)]
        model.set_adapter("other")
        outputs.append(model(x))
        model.base_model.set_adapter(["default", "other"])
        outputs.append(model(x))
        model.set_adapter("default")
        with model.disable_adapter():
            outputs.append(model(x))
        model.merge_adapter()
        outputs.append(model(x))
        model.unmerge_adapter()
        return outputs

    expected = states()
    with fast_linear_layers(model):
        assert all("forward" in vars(layer) for layer in layers)
        found = states()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert len({tuple(output.flatten().tolist()) for output in expected[:4]}) == 4


def test_an_adapted_layer_keeps_its_input_and_the_narrow_product_alone() -> None:
    model, x = _adapted(), torch.randn(3, 5)
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.data_ptr() not in weights:
            sizes.append(tensor.numel())
        return tensor

    weights = {parameter.data_ptr() for parameter in model.parameters()}
    with fast_linear_layers(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.first(x)
    assert sorted(sizes) == [3 * 2, 3 * 5]

"""Linear layers by oneDNN on a CPU, where it multiplies float32 matrices faster than torch's own choice does.

A layer and its LoRA adapter are one operation there: the adapter's product is added to the layer's in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ROWS_TOGETHER = 8
"""Rows of a product are filled up to a multiple: for each number of them oneDNN makes and keeps megabytes of code."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, differentiable.

    Args:
        x: [..., inputs].
        weight: [outputs, inputs], or a transposed view.
        bias: [outputs].
    """
    if not _suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    product: Tensor = _OneDNNLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return product


@contextmanager
def fast_linear_layers(model: Any) -> Iterator[None]:
    """While it lasts, the model's linear layers on a CPU, and what adapts them, are computed by oneDNN."""
    kinds = {nn.Linear: _Forward, Conv1D: _Forward, lora.Linear: _AdaptedForward}
    layers = [
        module
        for module in model.modules()
        if type(module) in kinds and module.weight.device.type == "cpu" and "forward" not in vars(module)
    ]
    for layer in layers:
        layer.forward = kinds[type(layer)](layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _Forward:
    """Of one layer; looks its weights up each time, since they may be exchanged."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._transposed = isinstance(layer, Conv1D)

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._layer.weight
        return linear(x, weight.t() if self._transposed else weight, self._layer.bias)


class _AdaptedForward:
    """Of one layer with LoRA adapters; anything but a single plain one is left to peft."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._by_peft = layer.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer
        name = layer.active_adapters[0] if layer.active_adapters else ""
        if args or kwargs or not _is_one_plain_adapter(layer, name):
            return self._by_peft(x, *args, **kwargs)
        base, down, up = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
        if not _suits_onednn(x, base.weight, down, up):
            return self._by_peft(x)
        weight = base.weight.t() if type(base) is Conv1D else base.weight
        return _AdaptedLinear.apply(x, weight, base.bias, down, up, layer.scaling[name])  # type: ignore[no-untyped-call]


def _is_one_plain_adapter(layer: Any, name: str) -> bool:
    return (
        not layer.disable_adapters
        and not layer.merged
        and len(layer.active_adapters) == 1
        and name in layer.lora_A
        and name not in layer.lora_variant
        and layer.lora_B[name].bias is None
        and (isinstance(layer.lora_dropout[name], nn.Identity) or not layer.training)
        and type(layer.base_layer) in (nn.Linear, Conv1D)
        and not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
    )


def _suits_onednn(x: Tensor, *weights: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and all(weight.dtype == torch.float32 and type(weight.data) is Tensor for weight in weights)
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and not torch.is_autocast_enabled("cpu")
    )


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` without a gradient, for float32 on a CPU; the weight may be one that oneDNN has packed."""
    rows = x.shape[:-1].numel()
    spare = rows_to_spare(rows)
    if not spare:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    filled = F.pad(x.reshape(rows, -1), (0, 0, 0, spare))
    return onednn_product(filled, weight, bias)[:rows].view(*x.shape[:-1], -1)


def rows_to_spare(rows: int) -> int:
    """How many are missing to a multiple of `ROWS_TOGETHER`; none where they are fewer."""
    return -rows % ROWS_TOGETHER if rows > ROWS_TOGETHER else 0


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        by_output = grads[0].flatten(0, -2)
        by_x = onednn_product(grads[0].contiguous(), weight.t()) if ctx.needs_input_grad[0] else None
        by_weight = by_output.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        by_bias = by_output.sum(0) if ctx.needs_input_grad[2] else None
        return by_x, by_weight, by_bias


class _AdaptedLinear(torch.autograd.Function):
    """`x @ weight.T + bias + scale * (x @ down.T) @ up.T`; weight and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        output = onednn_product(x, weight, bias)
        narrow = x.flatten(0, -2) @ down.t()
        output.view(-1, output.shape[-1]).addmm_(narrow, up.t(), alpha=scale)
        ctx.save_for_backward(x, weight, down, up, narrow)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, narrow = ctx.saved_tensors
        by_output = grads[0].flatten(0, -2).contiguous()
        by_narrow = (by_output @ up).mul_(ctx.scale)
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = onednn_product(by_output, weight.t()).addmm_(by_narrow, down).view(x.shape)
        by_down = by_narrow.t() @ x.flatten(0, -2)
        by_up = (by_output.t() @ narrow).mul_(ctx.scale)
        return by_x, None, None, by_down, by_up, None

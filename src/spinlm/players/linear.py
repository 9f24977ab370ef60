"""Linear layers by oneDNN on a CPU, where it multiplies float32 matrices faster than torch's own choice does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


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
    """While it lasts, the model's linear layers on a CPU are computed by `linear`."""
    layers = [
        module
        for module in model.modules()
        if type(module) in (nn.Linear, Conv1D) and module.weight.device.type == "cpu" and "forward" not in vars(module)
    ]
    for layer in layers:
        layer.forward = _Forward(layer)
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


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(weight.data) is Tensor
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        by_output = grads[0].flatten(0, -2)
        by_x = _product(grads[0].contiguous(), weight.t()) if ctx.needs_input_grad[0] else None
        by_weight = by_output.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        by_bias = by_output.sum(0) if ctx.needs_input_grad[2] else None
        return by_x, by_weight, by_bias

"""Linear layers in the layout of oneDNN's kernels, for the duration of generation on a CPU.

With few rows, as in decoding, a plain float32 product spends most of its time on rearranging the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spinlm.players.linear import onednn_product, rows_to_spare

MEMORY_SHARE = 0.25
"""Of the memory, that packed copies of the weights may take."""


@contextmanager
def packed_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """Compute the model's float32 linear layers from packed copies of their weights, adapters folded in.

    The weights and the modules are what they were before, during and after: only `forward` is another
    while the context lasts, and then the copies are given back.

    Args:
        model: On a CPU, with or without a LoRA adapter.
        rows: Responses decoded together: so many rows, filled up, most products will have.
    """
    layers = list(_packable(model))
    try:
        for layer in layers:
            layer.forward = _packed_forward(*_folded(layer), rows + rows_to_spare(rows))
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def packed_bytes(model: nn.Module, memory: int) -> int:
    """What the copies take; 0 where that is too much of the memory, and none are made."""
    needed = sum(_linear(layer).weight.nbytes for layer in _packable(model))
    return needed if needed <= MEMORY_SHARE * memory else 0


def _packable(module: nn.Module) -> Iterator[Any]:
    """Linear layers, each with its adapter where that can be folded."""
    linear = _linear(module)
    if "forward" not in vars(module) and type(linear) in (nn.Linear, Conv1D) and linear.weight.dtype == torch.float32:
        yield module
    else:
        for child in module.children():
            yield from _packable(child)


def _linear(module: nn.Module) -> Any:
    layer: Any = module
    return layer.get_base_layer() if _has_foldable_adapter(module) else layer


def _has_foldable_adapter(module: Any) -> bool:
    """Whether peft could merge the layer's adapters into its weight: plain LoRA and DoRA."""
    if not hasattr(module, "lora_A"):
        return False
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.variants import DoraLinearVariant

    plain = all(isinstance(variant, DoraLinearVariant) for variant in module.lora_variant.values())
    return type(module) is Linear and plain and not module.merged and not module.disable_adapters


def _folded(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer with its adapters in them, [out, in] and [out]."""
    linear = _linear(layer)
    if linear is layer:
        return _out_by_in(linear, linear.weight), linear.bias
    kept, caches = [(parameter, parameter.data) for parameter in linear.parameters()], dict(layer._caches)
    try:
        layer.merge(safe_merge=True)  # into tensors of its own, which take the place of the parameters' for a moment
        bias = None if linear.bias is None else linear.bias.data
        return _out_by_in(linear, linear.weight.data), bias
    finally:
        for parameter, data in kept:
            parameter.data = data
        layer.merged_adapters.clear()
        layer._caches = caches


def _out_by_in(linear: nn.Module, weight: Tensor) -> Tensor:
    return weight.t() if isinstance(linear, Conv1D) else weight


def _packed_forward(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return lambda x: onednn_product(x, packed, bias)

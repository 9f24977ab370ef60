"""Memory and floating-point work of a computation, of real tensors or of fake ones that hold no numbers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it lasts, counts each operation of this thread.

    Attributes:
        live: Bytes of the tensors made since it began that are still there.
        peak: The most that they were.
        work: Floating-point operations of matrix products and attention, two for a multiplication with its
            addition. Attention is counted over all couples of a query and a key, masked or not.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """Tensors in `known` are there already, and don't count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.work = 0
        self._sizes: dict[weakref.ref[Any], int] = {}
        for tensor in known:
            self._sizes[weakref.ref(tensor.untyped_storage(), self._forget)] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.work += _work(func, args, kwargs or {}, output)
        return output

    def _count(self, storage: Any) -> None:
        name = weakref.ref(storage, self._forget)
        if name not in self._sizes:
            self._sizes[name] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)

    def _forget(self, name: weakref.ref[Any]) -> None:
        self.live -= self._sizes.pop(name, 0)


def _work(func: Any, args: Any, kwargs: Any, output: Any) -> int:
    operation = func._overloadpacket
    if operation is _ATTENTION:
        return 2 * _products(*args[:3])
    if operation is _ATTENTION_BACKWARD:  # the scores again, and two products for each of the forward pass's two
        return 5 * _products(*args[1:4])
    formula = flop_registry.get(operation)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=output))


def _products(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Multiplications of scores and weighted sums: of either, in the mean of the two sizes."""
    rows, heads, queries, size = query.shape
    return rows * heads * queries * key.shape[2] * (size + value.shape[3])

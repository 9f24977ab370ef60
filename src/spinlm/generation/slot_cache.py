"""The keys and values of responses that begin and end at different times, kept as one left-padded batch."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from spinlm.players.logprobs import causal_lm

COUNTS_BY_MASK = ("bloom", "mpt")
"""ALiBi's distances don't change when a row begins in another column; who counts by the cache's length goes wrong."""


def supports_slots(model: Any) -> bool:
    """Whether a model keeps a key and a value of each token in each layer and nothing else, and is told positions."""
    bare = causal_lm(model)
    if bare._is_stateful or not bare._supports_default_dynamic_cache():
        return False
    takes = inspect.signature(bare.forward).parameters
    is_told_positions = "position_ids" in takes or bare.config.model_type in COUNTS_BY_MASK
    if "past_key_values" not in takes or not is_told_positions:
        return False
    layers = DynamicCache(config=bare.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


@dataclass(frozen=True)
class Prefill:
    """New rows.

    Attributes:
        copies: For each of them, the place of its prompt in the forward pass.
        columns: For each prompt and column, where that column's keys are in those of the prefix followed by those of
            the pass; None where there is no prefix, and they are the pass's.
    """

    copies: Tensor
    columns: Tensor | None = None


class SlotCache(Cache):  # type: ignore[misc]
    """Rows of columns, allocated once.

    Every row's newest token is in the same column, its oldest in a column of its own: to the model an ordinary
    batch padded on the left. Sliding layers are kept whole: which columns they see is the mask's affair.

    A forward pass is either a step, in which every row in use (and idle ones after them, if the pass has more) gets the
    column `end`, or a prefill, in which new rows get the columns before `end`: those of a prefix that all prompts begin
    with, and those that the pass brings.

    Attributes:
        prefix: The cache of the prefix's forward pass, in one row.
        rows: How many are in use, from 0.
        begin: The first column that any of them uses.
        end: One past the last.
    """

    def __init__(self, rows: int, columns: int, prefix: SlotCache | None = None) -> None:
        # In a ring of references so much memory would wait for the garbage collector.
        myself: Any = weakref.proxy(self)
        super().__init__(layer_class_to_replicate=partial(_SlotLayer, myself))
        self.size = (rows, columns)
        self.rows = self.begin = self.end = 0
        self.prefix = prefix
        self.prefilling: Prefill | None = None
        if prefix is not None:  # they are asked for the mask's size before they get anything
            self.layers.extend(_SlotLayer(myself) for _ in prefix.layers)

    def nbytes(self) -> int:
        """Of all layers' keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def move_rows(self, sources: Tensor, targets: Tensor) -> None:
        """Copy rows over others that are no longer needed."""
        for tensor in self._tensors():
            part = tensor[:, :, self.begin : self.end]
            part[targets] = part[sources]

    def move_columns(self, end: int) -> None:
        """Put the columns in use where they end at this one, layer by layer."""
        width = self.end - self.begin
        for tensor in self._tensors():
            used = tensor[: self.rows]
            used[:, :, end - width : end] = used[:, :, self.begin : self.end].clone()
        self.begin, self.end = end - width, end

    def _tensors(self) -> list[Tensor]:
        return [tensor for layer in self.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, [rows, heads, columns, head size] each."""

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, columns = self._cache.size
        # Zeros, since what is masked is still multiplied: by a weight of zero.
        self.keys, self.values = (
            states.new_zeros(rows, states.shape[1], columns, states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep a forward pass's keys and values; give back all that its queries may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self._cache
        if cache.prefilling is not None:
            return self._prefill(cache.prefilling, key_states, value_states)
        rows = len(key_states)
        self.keys[:rows, :, cache.end] = key_states[:, :, 0]
        self.values[:rows, :, cache.end] = value_states[:, :, 0]
        seen = (slice(rows), slice(None), slice(cache.begin, cache.end + 1))
        return self.keys[seen], self.values[seen]

    def _prefill(self, new: Prefill, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        cache = self._cache
        if cache.prefix is not None:
            before = cache.prefix.layers[cache.layers.index(self)]
            keys, values = _after(before.keys, keys, new), _after(before.values, values, new)
        rows = slice(cache.rows, cache.rows + len(new.copies))
        columns = slice(cache.end - keys.shape[2], cache.end)
        self.keys[rows, :, columns] = keys[new.copies]
        self.values[rows, :, columns] = values[new.copies]
        return keys, values

    def get_seq_length(self) -> int:
        cache = self._cache
        if cache.prefilling is not None:
            return 0 if cache.prefix is None else cache.prefix.end
        return cache.end - cache.begin

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self._cache.size[1]


def _after(prefix: Tensor, states: Tensor, new: Prefill) -> Tensor:
    """Keys or values of whole prompts, padded on the left, [prompts, heads, columns, head size]."""
    assert new.columns is not None
    both = torch.cat([prefix.expand(len(states), -1, -1, -1), states], dim=2)
    return both.gather(2, new.columns[:, None, :, None].expand_as(both))

"""Attention within the segments of one row, for models whose attention can be exchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from spinlm.players.layouts import Segment

NAME = "spinlm_segments"

QUERIES_AT_ONCE = 128
"""Of a segment, so that a long one's later tokens are not products for its earlier ones to throw away."""


def takes_segments(model: Any) -> bool:
    """Whether a causal language model's attention goes through transformers' interface (GPT-Neo's is led there)."""
    return bool(getattr(model, "_supports_attention_backend", False)) or _gpt_neo_layers(model) != []


class SegmentedAttention:
    """An attention function for transformers' interface that computes no score between strangers.

    On a GPU by flex attention, whose kernel leaves out what a block mask says; elsewhere segment by segment.
    """

    def __init__(self) -> None:
        self._segments: Sequence[Segment] = ()
        self._causal_masks: dict[int | None, Tensor] = {}
        self._block_masks: dict[int | None, BlockMask] = {}

    @property
    def segments(self) -> Sequence[Segment]:
        """Of the row at hand."""
        return self._segments

    @segments.setter
    def segments(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._block_masks.clear()

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Attention over [1, heads, T, D], with fewer key and value heads where they are grouped; [1, T, heads, D].

        Raises:
            NotImplementedError: The model asks for more than scores, a window and a soft cap.
        """
        for name in ("s_aux", "position_bias"):
            if others.get(name) is not None:
                raise NotImplementedError(f"attention with {name}")
        if dropout:
            raise NotImplementedError("attention with dropout")
        if query.device.type == "cuda":
            return self.by_blocks(query, key, value, scaling, sliding_window, softcap, _compiled_flex()), None
        return self.by_segments(query, key, value, scaling, sliding_window, softcap), None

    def by_segments(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None, softcap: float | None
    ) -> Tensor:
        """One product for each segment, or part of a long one, with what it sees."""
        lengths = [length for length, _ in self._segments]
        queries, keys, values = (torch.split(states, lengths, dim=2) for states in (query, key, value))
        outputs = []
        for number, (length, before) in enumerate(self._segments):
            k, v = keys[number], values[number]
            if before >= 0:
                line = _line(self._segments, number)
                k, v = (torch.cat([states[one] for one in line], dim=2) for states in (keys, values))
            end = k.shape[2] - length
            for part in torch.split(queries[number], QUERIES_AT_ONCE, dim=2):
                end += part.shape[2]
                mask = self._causal_mask(part.shape[2], end, window, query.device)
                outputs.append(_attend(part, k[:, :, :end], v[:, :, :end], mask, scale, softcap).transpose(1, 2))
        return torch.cat(outputs, dim=1)

    def by_blocks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        window: int | None,
        softcap: float | None,
        flex: Callable[..., Any],
    ) -> Tensor:
        """One product for the row, by flex attention or what it was compiled to."""
        if window not in self._block_masks:
            self._block_masks[window] = _block_mask(self._segments, window, query.device)
        capped = None if softcap is None else lambda score, *places: softcap * torch.tanh(score / softcap)
        output: Tensor = flex(
            query,
            key,
            value,
            score_mod=capped,
            block_mask=self._block_masks[window],
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.transpose(1, 2)

    def _causal_mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
        """Which of `keys` tokens the last `queries` of them see, [queries, keys]; None: each all before it."""
        if window is not None and window >= keys:
            window = None
        if queries == keys and window is None:
            return None
        whole = self._causal_masks.get(window)
        if whole is None or len(whole) < keys:
            size = max(512, 2 * keys)
            whole = torch.ones(size, size, dtype=torch.bool, device=device).tril()
            if window is not None:
                whole = whole.triu(1 - window)
            self._causal_masks[window] = whole
        return whole[keys - queries : keys, :keys]


def _line(segments: Sequence[Segment], number: int) -> list[int]:
    """The segments that one continues, the first of them first, and itself."""
    before = segments[number][1]
    return [number] if before < 0 else [*_line(segments, before), number]


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


def _block_mask(segments: Sequence[Segment], window: int | None, device: torch.device) -> BlockMask:
    """For flex attention: who sees whom, by segment and by position in the conversation."""
    lengths = [length for length, _ in segments]
    lines = [_line(segments, place) for place in range(len(segments))]
    starts = [sum(lengths[one] for one in line[:-1]) for line in lines]
    in_line = torch.zeros(len(segments), len(segments), dtype=torch.bool)
    for place, line in enumerate(lines):
        in_line[place, line] = True
    in_line = in_line.to(device)
    number = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(lengths)).to(device)
    position = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)]).to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = in_line[number[query], number[key]] & (query >= key)
        return seen if window is None else seen & (position[query] - position[key] < window)

    return create_block_mask(sees, None, None, len(number), len(number), device=str(device))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
    if grouped:
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril() if mask is None else mask
    return torch.softmax(scores.float().masked_fill(~seen, -torch.inf), dim=-1).to(v.dtype) @ v


@contextmanager
def segmented_attention(model: Any) -> Iterator[SegmentedAttention]:
    """While it lasts, a causal language model attends within the segments given to what it yields."""
    attention = SegmentedAttention()
    AttentionInterface.register(NAME, attention)
    layers = _gpt_neo_layers(model)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    for layer in layers:
        layer._attn = _GPTNeoAttention(layer, attention)
    try:
        yield attention
    finally:
        attention.segments = ()  # with the masks, which transformers' registry would keep
        model.config._attn_implementation = before
        for layer in layers:
            del layer._attn


def _gpt_neo_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, GPTNeoSelfAttention)]


class _GPTNeoAttention:
    """Takes the place of a GPT-Neo layer's own: scores unscaled and in float32, every other layer with a window."""

    def __init__(self, layer: Any, attention: SegmentedAttention) -> None:
        self._layer = layer
        self._attention = attention

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> tuple[Tensor, None]:
        window = self._layer.config.window_size if self._layer.attention_type == "local" else None
        out, _ = self._attention(
            self._layer, query.float(), key.float(), value.float(), scaling=1.0, sliding_window=window
        )
        return out.transpose(1, 2).to(value.dtype), None

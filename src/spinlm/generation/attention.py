"""Attention of one new token a row, on a CPU: two batched products over the keys and values where they lie.

There torch's fused kernel takes several times as long for so short a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "spinlm_decoding"


@contextmanager
def decoding_attention(model: nn.Module) -> Iterator[None]:
    """Use it where the model would use `sdpa` through transformers' attention interface, for as long as this lasts."""
    parts: list[Any] = [part for part in model.modules() if getattr(part, "_supports_attention_backend", False)]
    configs = {id(part.config): part.config for part in parts}
    ours = [config for config in configs.values() if config._attn_implementation == "sdpa"]
    try:
        for config in ours:
            config._attn_implementation = NAME
        yield
    finally:
        for config in ours:
            config._attn_implementation = "sdpa"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What `sdpa_attention_forward` computes, and by it for prompts and whatever else isn't plain decoding.

    The query heads that share a key head become the rows of one product, so that no key is copied.

    Args:
        module: The attention layer.
        query: [B, heads, 1, D].
        key: [B, key heads, T, D], a view of the cache.
        value: As the keys.
        attention_mask: True where a key is seen, [B, 1, 1, T].
        scaling: Of the scores.
        others: For `sdpa_attention_forward`.

    Returns:
        [B, 1, heads, D], and no weights.
    """
    rows, heads, length, size = query.shape
    biased = any(others.get(name) is not None for name in ("position_bias", "softcap"))
    plain_mask = attention_mask is None or attention_mask.dtype == torch.bool
    if length > 1 or biased or not plain_mask or query.dtype != torch.float32:
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
        return attended
    key_heads = key.shape[1]
    grouped = query.reshape(rows * key_heads, heads // key_heads, size) * (size**-0.5 if scaling is None else scaling)
    scores = torch.bmm(grouped, key.flatten(0, 1).transpose(1, 2))
    if attention_mask is not None:
        scores.view(rows, heads, -1).masked_fill_(~attention_mask[:, 0], -torch.inf)
    output = torch.bmm(scores.softmax(dim=-1), value.flatten(0, 1))
    return output.view(rows, 1, heads, -1), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

"""Attention within the segments of one row, against a loop over the tokens that each token sees."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from spinlm.players import attention as attention_module
from spinlm.players.attention import SegmentedAttention

SEGMENTS = ((3, -1), (4, 0), (1, 0), (5, -1), (2, -1), (6, 4), (3, 4), (2, 3), (1, 7), (4, 7), (3, 3), (2, 10))
"""A prompt with two responses, one without any, another with two; and two prompts that go on from the one without."""


def _seen() -> list[list[int]]:
    """For each token of the row the places of those it sees, in their order."""
    starts = [sum(length for length, _ in SEGMENTS[:number]) for number in range(len(SEGMENTS))]
    seen = []
    for start, (length, before) in zip(starts, SEGMENTS, strict=True):
        line: list[int] = []
        while before >= 0:
            line = [*range(starts[before], starts[before] + SEGMENTS[before][0]), *line]
            before = SEGMENTS[before][1]
        seen += [[*line, *range(start, start + place + 1)] for place in range(length)]
    return seen


def _by_definition(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """[1, heads, T, D]: token by token and head by head."""
    out = torch.zeros(1, q.shape[2], q.shape[1], v.shape[-1])
    for token, places in enumerate(_seen()):
        near = places if window is None else places[-window:]
        for of_query in range(q.shape[1]):
            of_key = of_query * k.shape[1] // q.shape[1]
            scores = k[0, of_key, near] @ q[0, of_query, token] * (scale or 1 / math.sqrt(q.shape[-1]))
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[0, token, of_query] = scores.softmax(0) @ v[0, of_key, near]
    return out


def _states(heads: int) -> Tensor:
    tokens = sum(length for length, _ in SEGMENTS)
    return torch.randn(1, heads, tokens, 8, requires_grad=True)


@pytest.mark.parametrize("queries_at_once", [2, 128])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize(("heads", "key_heads", "scale"), [(2, 2, None), (4, 2, 1.0), (4, 1, 0.3)])
def test_each_token_sees_its_prompt_and_what_is_before_it(
    heads: int,
    key_heads: int,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    queries_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_module, "QUERIES_AT_ONCE", queries_at_once)
    torch.manual_seed(0)
    states = q, k, v = _states(heads), _states(key_heads), _states(key_heads)
    attention = SegmentedAttention()
    attention.segments = SEGMENTS
    out, _ = attention(None, q, k, v, scaling=scale, sliding_window=window, softcap=softcap)
    expected = _by_definition(q, k, v, scale, window, softcap)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(expected.shape)
    wanted = torch.autograd.grad((weights * expected).sum(), states)
    for ours, theirs in zip(torch.autograd.grad((weights * out).sum(), states), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_row_longer_than_any_before_it_gets_a_mask_of_its_size() -> None:
    torch.manual_seed(0)
    attention = SegmentedAttention()
    for prompt, response in ((5, 3), (700, 600), (5, 3)):
        attention.segments = ((prompt, -1), (response, 0))
        q, k, v = (torch.randn(1, 2, prompt + response, 4) for _ in range(3))
        for window in (None, 50):
            out, _ = attention(None, q, k, v, sliding_window=window)
            mask = torch.ones(prompt + response, prompt + response, dtype=torch.bool).tril()
            mask = mask if window is None else mask.triu(1 - window)
            whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
            torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_block_masks_say_the_same(window: int | None, softcap: float | None) -> None:
    """The way of GPUs, by flex attention before it is compiled: on a CPU forward alone."""
    torch.manual_seed(0)
    attention = SegmentedAttention()
    attention.segments = SEGMENTS
    q, k, v = (_states(heads).detach() for heads in (4, 2, 2))
    out = attention.by_blocks(q, k, v, 0.4, window, softcap, flex_attention)
    torch.testing.assert_close(out, _by_definition(q, k, v, 0.4, window, softcap), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("what", ["s_aux", "position_bias", "dropout"])
def test_what_is_not_computed_here_is_not_passed_over(what: str) -> None:
    attention = SegmentedAttention()
    attention.segments = SEGMENTS
    states = _states(2)
    with pytest.raises(NotImplementedError, match=f"attention with {what}"):
        attention(None, states, states, states, **{what: 0.1 if what == "dropout" else torch.zeros(2)})

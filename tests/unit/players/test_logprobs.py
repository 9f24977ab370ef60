"""Log-probs of responses, against transformers' own logits read one row at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from spinlm.data.pairs import collate_responses
from spinlm.players.logprobs import response_logprobs, score_responses
from unit.players.families import build_model

Responses = list[tuple[list[int], list[int]]]

LENGTHS = [(3, 1), (20, 40), (1, 25), (30, 2), (7, 7), (2, 60)]
"""Tokens of prompt and response: very uneven."""


def _responses() -> Responses:
    generator = torch.Generator().manual_seed(5)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 256, (count,), generator=generator).tolist()

    return [(tokens(prompt), [*tokens(response - 1), tiny.IM_END]) for prompt, response in LENGTHS]


def _naive(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """The sum, token by token, without padding and without a mask."""
    logits = model(torch.tensor([prompt + response])).logits[0]
    total = torch.zeros(())
    for place, token in enumerate(response, start=len(prompt)):
        total = total + torch.log_softmax(logits[place - 1], dim=-1)[token]
    return total


def _naive_all(model: Any, responses: Responses) -> Tensor:
    return torch.stack([_naive(model, prompt, response) for prompt, response in responses])


def _gradients(model: Any, value: Tensor) -> list[Tensor]:
    used = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(value, used, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(used, gradients, strict=True)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equals_a_naive_loop_over_rows(family: str) -> None:
    model, responses = build_model(family), _responses()
    naive = _naive_all(model, responses)
    batched = response_logprobs(model, collate_responses(responses, pad_id=tiny.END_OF_TEXT))
    torch.testing.assert_close(batched, naive, atol=1e-5, rtol=1e-6)
    weights = torch.linspace(-1, 2, len(responses))  # a wrong row can't cancel out
    for ours, theirs in zip(_gradients(model, weights @ batched), _gradients(model, weights @ naive), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_batch_around_a_response_and_its_padding_do_not_matter(family: str) -> None:
    model, responses = build_model(family), _responses()
    with torch.no_grad():
        together = response_logprobs(model, collate_responses(responses, pad_id=tiny.END_OF_TEXT))
        reversed_ = response_logprobs(model, collate_responses(responses[::-1], pad_id=0)).flip(0)
        alone = torch.cat([response_logprobs(model, collate_responses([one], pad_id=3)) for one in responses])
    torch.testing.assert_close(reversed_, together, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-6)


def test_is_summed_in_float32_for_a_model_in_bfloat16() -> None:
    model, responses = build_model("llama").to(torch.bfloat16), _responses()
    with torch.no_grad():
        batched = response_logprobs(model, collate_responses(responses, pad_id=0))
        logits = [model(torch.tensor([prompt + response])).logits[0].float() for prompt, response in responses]
    expected = [
        torch.log_softmax(rows, -1)[range(len(p) - 1, len(p + r) - 1), r].sum()
        for rows, (p, r) in zip(logits, responses, strict=True)
    ]
    assert batched.dtype == torch.float32
    torch.testing.assert_close(batched, torch.stack(expected), atol=0.05, rtol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
def test_score_responses_puts_everything_in_its_place(batch_size: int) -> None:
    model, responses = build_model("llama"), _responses()
    found: dict[int, float] = {}
    for places, values in score_responses(model, responses, batch_size, pad_id=0):
        assert len(places) <= batch_size
        assert not found.keys() & set(places), "nothing is scored twice"
        found.update(zip(places, values, strict=True))
    with torch.no_grad():
        naive = _naive_all(model, responses)
    assert [found[i] for i in range(len(responses))] == pytest.approx(naive.tolist(), abs=1e-5)


def test_score_responses_begins_with_the_longest() -> None:
    model = build_model("llama")
    places = [place for batch, _ in score_responses(model, _responses(), 1, pad_id=0) for place in batch]
    assert places == [5, 1, 3, 2, 4, 0]  # 62, 60, 32, 26, 14 and 4 tokens


def test_score_responses_keeps_no_gradient_and_takes_nothing() -> None:
    model = build_model("llama")
    assert list(score_responses(model, [], 4, pad_id=0)) == []
    list(score_responses(model, _responses(), 4, pad_id=0))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()

"""Draws against numbers worked out by hand and a plain cumulative sum."""

from __future__ import annotations

import pytest
import torch

from spinlm.generation.engine import Sampling
from spinlm.generation.sampling import BLOCK, Sampler, inverse_cdf

HALF, QUARTER = torch.tensor(0.5).log(), torch.tensor(0.25).log()
NEVER = torch.tensor(-torch.inf)


def _draw(logits: torch.Tensor, *uniforms: float) -> list[int]:
    rows = logits.repeat(len(uniforms), 1)
    tokens: list[int] = inverse_cdf(rows, torch.tensor(uniforms, dtype=torch.float64))[0].tolist()
    return tokens


def test_a_uniform_number_falls_into_its_tokens_share() -> None:
    """Shares 1/4, 0, 1/2, 1/4: the bounds are 0.25 and 0.75, and belong to the token above."""
    logits = torch.stack([QUARTER, NEVER, HALF, QUARTER])
    assert _draw(logits, 0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999) == [0, 0, 2, 2, 3, 3]


def test_a_token_that_cannot_be_is_never_drawn() -> None:
    """Not by the smallest uniform number, nor by the greatest, where whole blocks are impossible."""
    logits = torch.full((3 * BLOCK + 7,), -torch.inf)
    logits[[BLOCK + 3, BLOCK + 5]] = 1.0
    assert _draw(logits, 0.0, 0.49, 0.51, 1 - 2**-53) == [BLOCK + 3, BLOCK + 3, BLOCK + 5, BLOCK + 5]


@pytest.mark.parametrize("vocabulary", [5, BLOCK, 3 * BLOCK, 4 * BLOCK + 11])
def test_draws_are_those_of_a_cumulative_sum_in_float64(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(500, vocabulary, generator=generator)
    uniforms = torch.rand(500, dtype=torch.float64, generator=generator)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative, uniforms[:, None], right=True)[:, 0]
    tokens, logprobs = inverse_cdf(logits.clone(), uniforms)
    assert torch.equal(tokens, expected)
    assert torch.allclose(logprobs, logits.log_softmax(-1).gather(1, expected[:, None])[:, 0], atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0}])
def test_the_log_prob_is_that_of_the_untouched_distribution(how: dict[str, float]) -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(range(6), Sampling(3, **how), torch.device("cpu"))  # type: ignore[arg-type]
    tokens, logprobs = sampler.draw(logits.clone(), torch.arange(6), torch.zeros(6, dtype=torch.long))
    assert torch.allclose(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0], atol=1e-5)


def test_a_draw_depends_on_the_request_and_its_age_alone() -> None:
    logits = torch.zeros(4, 1000)
    sampler = Sampler([7, 8], Sampling(2), torch.device("cpu"))
    tokens = sampler.draw(logits.clone(), torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 0]))[0].tolist()
    assert tokens[0] == tokens[3]
    assert len(set(tokens)) == 3

"""The paper's theorems, exactly: a tabular policy in a world whose every response can be enumerated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spinlm.training.losses import MARGIN_LOSSES, Objective, PairLogprobs

PROMPTS, RESPONSES = 3, 5


def _policy(seed: int) -> Tensor:
    """Log-probs of a policy, [PROMPTS, RESPONSES], no response rarer than some percent."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(PROMPTS, RESPONSES, generator=generator, dtype=torch.float64).log_softmax(-1)


DATA, START = _policy(1), _policy(2)


def _expected_loss(main: Tensor, opponent: Tensor, data: Tensor, beta: float, loss: str = "logistic") -> Tensor:
    """The loss of every pair (y, y'), weighted by p_data(y) p_t(y')."""
    real, synthetic = torch.cartesian_prod(torch.arange(RESPONSES), torch.arange(RESPONSES)).T
    one = torch.ones(())
    pairs = PairLogprobs(
        real=main[:, real],
        synthetic=main[:, synthetic],
        initial=main[:, synthetic],
        reference_real=opponent[:, real],
        reference_synthetic=opponent[:, synthetic],
        real_tokens=one,
        synthetic_tokens=one,
        initial_tokens=one,
    )
    return (data[:, real].exp() * opponent[:, synthetic].exp() * Objective(loss, beta)(pairs)).sum()


def _minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The policy at the minimum, from its logits by LBFGS."""
    logits = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(logits.log_softmax(-1))
        value.backward()
        return value

    optimiser.step(closure)
    return logits.detach().log_softmax(-1)


def _iterate(opponent: Tensor, beta: float) -> Tensor:
    """One iteration of self-play to the exact minimum."""
    return _minimise(lambda main: _expected_loss(main, opponent, DATA, beta), opponent)


def _distance(policy: Tensor) -> Tensor:
    """To the data, in log space and up to each prompt's constant, [PROMPTS, RESPONSES]."""
    gap = policy - DATA
    return gap - gap.mean(-1, keepdim=True)


def _total_variation(policy: Tensor) -> float:
    return ((policy.exp() - DATA.exp()).abs().sum(-1) / 2).max().item()


@pytest.mark.parametrize("beta", [1.0, 2.0, 5.0])
def test_minimum_is_the_closed_form(beta: float) -> None:
    """Theorem 5.4: p_{t+1} is proportional to p_t (p_data / p_t)^(1 / lambda)."""
    expected = (START + (DATA - START) / beta).log_softmax(-1)
    assert _total_variation(START) > 0.3, "the test has something to show"
    torch.testing.assert_close(_iterate(START, beta).exp(), expected.exp(), atol=1e-6, rtol=0)


def test_beta_one_lands_on_the_data_in_one_iteration() -> None:
    torch.testing.assert_close(_iterate(START, 1.0).exp(), DATA.exp(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("beta", [0.4, 0.45, 0.7, 2.0, 5.0])
def test_an_iteration_multiplies_the_distance_to_the_data(beta: float) -> None:
    torch.testing.assert_close(_distance(_iterate(START, beta)), (1 - 1 / beta) * _distance(START), atol=1e-5, rtol=0)


def test_below_one_half_iterating_diverges() -> None:
    policy, distances = START, [_distance(START).norm().item()]
    for _ in range(3):
        policy = _iterate(policy, 0.45)
        distances.append(_distance(policy).norm().item())
    assert distances == sorted(distances)
    assert distances[-1] == pytest.approx(distances[0] * (11 / 9) ** 3, rel=1e-4)


def test_between_one_half_and_one_iterating_overshoots_and_converges() -> None:
    policy, alignments = START, []
    for _ in range(8):
        before, policy = policy, _iterate(policy, 0.7)
        alignments.append((_distance(before) * _distance(policy)).sum().item())
    assert all(alignment < 0 for alignment in alignments), "each iteration lands beyond the data"
    assert _total_variation(policy) < 1e-2 * _total_variation(START)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 5.0])
def test_data_is_a_fixed_point_for_any_beta(beta: float) -> None:
    """Theorem 5.2, first half."""
    torch.testing.assert_close(_iterate(DATA, beta).exp(), DATA.exp(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", MARGIN_LOSSES)
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_at_the_data_no_policy_has_a_lower_loss(loss: str, beta: float) -> None:
    at_data = _expected_loss(DATA, DATA, DATA, beta, loss)
    for seed in range(20):
        for step in (0.01, 1.0):
            elsewhere = (DATA + step * _policy(100 + seed)).log_softmax(-1)
            assert _expected_loss(elsewhere, DATA, DATA, beta, loss) >= at_data - 1e-12


@pytest.mark.parametrize("loss", MARGIN_LOSSES)
def test_away_from_the_data_the_opponent_is_no_minimum(loss: str) -> None:
    """Theorem 5.2, second half; the first step is beta * |loss'(0)| times that of supervised fine-tuning."""
    logits = START.clone().requires_grad_()
    main = logits.log_softmax(-1)
    (slope,) = torch.autograd.grad(_expected_loss(main, START, DATA, 0.1, loss), logits, retain_graph=True)
    (supervised,) = torch.autograd.grad(-(DATA.exp() * main).sum(), logits)
    assert slope.norm() > 1e-3
    torch.testing.assert_close(slope, (0.05 if loss == "logistic" else 0.1) * supervised)


def test_the_noise_contrastive_loss_lands_on_the_data_in_one_iteration() -> None:
    """SPACE (arXiv 2512.07175): its minimum is the data's distribution, with beta 1, whoever the opponent is."""
    landed = _minimise(lambda main: _expected_loss(main, START, DATA, 1.0, "noise_contrastive"), START)
    torch.testing.assert_close(landed.exp(), DATA.exp(), atol=1e-6, rtol=0)


def test_the_noise_contrastive_loss_still_pulls_to_the_data_when_the_opponent_is_there() -> None:
    """There the margin losses are flat around the data in no direction either, but SPACE's curvature is that of
    supervised fine-tuning's likelihood: a player that has drifted comes back."""
    drifted = (DATA + 0.5 * _policy(7)).log_softmax(-1)
    back = _minimise(lambda main: _expected_loss(main, DATA, DATA, 1.0, "noise_contrastive"), drifted)
    torch.testing.assert_close(back.exp(), DATA.exp(), atol=1e-6, rtol=0)

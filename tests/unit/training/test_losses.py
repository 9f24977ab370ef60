"""The losses and the margin, by numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest
import torch
from torch import Tensor

from spinlm.config import OBJECTIVE_KEYS, TrainingSection
from spinlm.training.losses import LOSSES, MARGIN_LOSSES, MarginLoss, Objective, PairLogprobs

E = math.e


def _value_and_slope(loss: MarginLoss, z: float) -> tuple[float, float]:
    margin = torch.tensor([z], dtype=torch.float64, requires_grad=True)
    value = loss(margin)
    (slope,) = torch.autograd.grad(value.sum(), margin)
    return value.item(), slope.item()


def _grid() -> Tensor:
    return torch.linspace(-5, 5, 201, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "z", "value", "slope"),
    [
        ("logistic", 0.0, math.log(2), -0.5),
        ("logistic", math.log(3), math.log(4 / 3), -0.25),  # sigmoid(ln 3) = 3/4
        ("logistic", -math.log(3), math.log(4), -0.75),
        ("logistic", 2.0, 0.1269280110429726, -0.11920292202211757),
        ("hinge", 0.0, 1.0, -1.0),
        ("hinge", -2.5, 3.5, -1.0),
        ("hinge", 0.999, 0.001, -1.0),
        ("hinge", 1.0, 0.0, 0.0),  # the kink itself belongs to the flat side
        ("hinge", 1.001, 0.0, 0.0),
        ("exponential", 0.0, 1.0, -1.0),
        ("exponential", 1.0, 1 / E, -1 / E),
        ("exponential", -2.0, E * E, -E * E),
        ("correlation", 0.0, 1.0, -1.0),
        ("correlation", 4.0, -3.0, -1.0),
        ("correlation", -4.0, 5.0, -1.0),
    ],
)
def test_value_and_slope_by_hand(name: str, z: float, value: float, slope: float) -> None:
    assert _value_and_slope(MARGIN_LOSSES[name], z) == pytest.approx((value, slope), rel=1e-12, abs=1e-12)


def test_every_loss_has_a_hand_worked_case() -> None:
    assert set(MARGIN_LOSSES) == {"logistic", "hinge", "exponential", "correlation"}


@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_is_what_the_theory_asks_for(name: str) -> None:
    loss, z = MARGIN_LOSSES[name], _grid().requires_grad_()
    values = loss(z)
    (slopes,) = torch.autograd.grad(values.sum(), z)
    assert (slopes <= 0).all(), "decreasing"
    assert (slopes.diff() >= -1e-12).all(), "convex: the slope never falls"
    assert _value_and_slope(loss, 0.0)[1] < 0, "a negative slope at 0"
    middle = loss((_grid()[:-1] + _grid()[1:]) / 2)
    assert (middle <= (values[:-1] + values[1:]) / 2 + 1e-12).all(), "convex: below its chords"


@pytest.mark.parametrize("z", [-1e4, 1e4])
def test_logistic_stays_finite_far_out_in_float32(z: float) -> None:
    margin = torch.tensor([z], requires_grad=True)
    value = MARGIN_LOSSES["logistic"](margin)
    (slope,) = torch.autograd.grad(value.sum(), margin)
    assert value.item() == max(0.0, -z)
    assert slope.item() == (-1.0 if z < 0 else 0.0)


def _pairs(**changes: Tensor) -> PairLogprobs:
    """Two pairs: log-probs of -10 and -3 (real), -20 and -1 (synthetic), where the reference has -12, -3, -15, -2.5."""
    values = {
        "real": torch.tensor([-10.0, -3.0]),
        "synthetic": torch.tensor([-20.0, -1.0]),
        "initial": torch.tensor([-16.0, -1.0]),
        "reference_real": torch.tensor([-12.0, -3.0]),
        "reference_synthetic": torch.tensor([-15.0, -2.5]),
        "real_tokens": torch.tensor([4.0, 2.0]),
        "synthetic_tokens": torch.tensor([10.0, 1.0]),
        "initial_tokens": torch.tensor([8.0, 1.0]),
    }
    return PairLogprobs(**{**values, **changes})


def _log1pexp(x: float) -> float:
    return math.log(1 + math.exp(x))


def test_margin_by_hand() -> None:
    objective = Objective(beta=0.1)
    # 0.1 * ((-10 + 12) - (-20 + 15)) and 0.1 * ((-3 + 3) - (-1 + 2.5))
    assert objective.margin(_pairs()).tolist() == pytest.approx([0.7, -0.15], rel=1e-6)
    assert objective.rewards(_pairs()).flatten().tolist() == pytest.approx([0.2, 0.0, -0.5, 0.15], rel=1e-6)
    assert objective(_pairs()).tolist() == pytest.approx([_log1pexp(-0.7), _log1pexp(0.15)], rel=1e-6)


def test_margin_rises_with_the_real_logprob_and_falls_with_the_synthetic() -> None:
    real, synthetic = torch.tensor([-4.0, -9.0], requires_grad=True), torch.tensor([-2.0, -7.0], requires_grad=True)
    margin = Objective(beta=2.0).margin(_pairs(real=real, synthetic=synthetic))
    slopes = torch.autograd.grad(margin.sum(), (real, synthetic))
    assert [slope.tolist() for slope in slopes] == [[2.0, 2.0], [-2.0, -2.0]]


@pytest.mark.parametrize("length_normalised", [False, True])
def test_margin_is_zero_where_nothing_has_moved(length_normalised: bool) -> None:
    still = _pairs(reference_real=torch.tensor([-10.0, -3.0]), reference_synthetic=torch.tensor([-20.0, -1.0]))
    assert Objective(beta=5.0, length_normalised=length_normalised).margin(still).tolist() == [0.0, 0.0]


def test_length_normalised_margin_by_hand() -> None:
    objective = Objective(beta=0.1, length_normalised=True)
    # 0.1 * ((-10 + 12) / 4 - (-20 + 15) / 10) and 0.1 * (0 / 2 - 1.5 / 1)
    assert objective.margin(_pairs()).tolist() == pytest.approx([0.1, -0.15], rel=1e-6)


def test_nll_anchor_by_hand() -> None:
    plain, anchored = Objective(beta=0.1)(_pairs()), Objective(beta=0.1, nll_weight=0.2)(_pairs())
    # 0.2 * 10 / 4 and 0.2 * 3 / 2: per token, and of the main player alone
    assert (anchored - plain).tolist() == pytest.approx([0.5, 0.3], rel=1e-5)


def test_nll_anchor_pulls_at_the_real_response_only() -> None:
    real, synthetic = torch.tensor([-4.0, -9.0], requires_grad=True), torch.tensor([-2.0, -7.0], requires_grad=True)
    pairs = _pairs(real=real, synthetic=synthetic)
    added = Objective(nll_weight=1.0)(pairs) - Objective()(pairs)
    slopes = torch.autograd.grad(added.sum(), (real, synthetic))
    assert slopes[0].tolist() == pytest.approx([-1 / 4, -1 / 2])
    assert slopes[1].tolist() == pytest.approx([0.0, 0.0], abs=1e-7)


def test_noise_contrastive_by_hand() -> None:
    # rewards with beta 1: real 2 and 0, synthetic -5 and 1.5; mu 1 is two logistic classifications
    found = Objective("noise_contrastive", beta=1.0)(_pairs())
    expected = [_log1pexp(-2.0) + _log1pexp(-5.0), _log1pexp(0.0) + _log1pexp(1.5)]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    # mu 3, from its definition: s(r) = 1 / (1 + 3 exp(-r)), -log s(real) - 3 log(1 - s(synthetic))
    found = Objective("noise_contrastive", beta=1.0, noise_ratio=3.0)(_pairs())

    def s(reward: float) -> float:
        return 1 / (1 + 3 * math.exp(-reward))

    expected = [-math.log(s(real)) - 3 * math.log(1 - s(synthetic)) for real, synthetic in ((2.0, -5.0), (0.0, 1.5))]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_noise_contrastive_judges_each_response_by_itself() -> None:
    """Shifting both rewards leaves the margin as it is, and so every margin loss; not this one."""
    shifted = _pairs(real=torch.tensor([-13.0, -6.0]), synthetic=torch.tensor([-23.0, -4.0]))
    for loss in MARGIN_LOSSES:
        assert Objective(loss)(shifted).tolist() == pytest.approx(Objective(loss)(_pairs()).tolist(), rel=1e-5)
    there, here = Objective("noise_contrastive")(shifted), Objective("noise_contrastive")(_pairs())
    assert (there - here).abs().min() > 0.01


def test_triplet_by_hand() -> None:
    found = Objective("triplet", beta=0.1, history_weight=0.5)(_pairs())
    # current advantages 0.1 * (-10 + 20), 0.1 * (-3 + 1); historical ones 0.1 * (-20 + 16), 0
    expected = [_log1pexp(-1.0) + 0.5 * _log1pexp(0.4), _log1pexp(0.2) + 0.5 * math.log(2)]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_triplet_per_token_by_hand() -> None:
    found = Objective("triplet", beta=2.0, length_normalised=True)(_pairs())
    # per token: real -2.5, -1.5; synthetic -2, -1; initial -2, -1
    expected = [_log1pexp(1.0) + math.log(2), _log1pexp(1.0) + math.log(2)]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_triplet_has_no_reference() -> None:
    elsewhere = _pairs(reference_real=torch.tensor([-1.0, -99.0]), reference_synthetic=torch.tensor([-7.0, 5.0]))
    assert Objective("triplet")(elsewhere).tolist() == Objective("triplet")(_pairs()).tolist()


def test_where_the_synthetic_response_is_the_starting_players_its_history_pulls_nowhere() -> None:
    synthetic = torch.tensor([-2.0, -7.0], requires_grad=True)
    history = Objective("triplet", history_weight=1.0)(_pairs(synthetic=synthetic, initial=synthetic))
    alone = Objective("triplet", history_weight=0.0)(_pairs(synthetic=synthetic, initial=synthetic))
    (slope,) = torch.autograd.grad((history - alone).sum(), synthetic)
    assert slope.tolist() == pytest.approx([0.0, 0.0], abs=1e-7)


def test_every_loss_and_setting_is_the_recipes() -> None:
    assert typing.get_args(TrainingSection.model_fields["loss"].annotation) == LOSSES
    assert {"beta", *OBJECTIVE_KEYS} == {field.name for field in dataclasses.fields(Objective)}

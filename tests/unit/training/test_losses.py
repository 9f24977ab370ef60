"""The losses and the margin, by numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spinlm.training.losses import LOSSES, Loss, spin_margin

E = math.e


def _value_and_slope(loss: Loss, z: float) -> tuple[float, float]:
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
    assert _value_and_slope(LOSSES[name], z) == pytest.approx((value, slope), rel=1e-12, abs=1e-12)


def test_every_loss_has_a_hand_worked_case() -> None:
    assert set(LOSSES) == {"logistic", "hinge", "exponential", "correlation"}


@pytest.mark.parametrize("name", LOSSES)
def test_is_what_the_theory_asks_for(name: str) -> None:
    loss, z = LOSSES[name], _grid().requires_grad_()
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
    value = LOSSES["logistic"](margin)
    (slope,) = torch.autograd.grad(value.sum(), margin)
    assert value.item() == max(0.0, -z)
    assert slope.item() == (-1.0 if z < 0 else 0.0)


def test_margin_by_hand() -> None:
    real, synthetic = torch.tensor([-10.0, -3.0]), torch.tensor([-20.0, -1.0])
    opponent_real, opponent_synthetic = torch.tensor([-12.0, -3.0]), torch.tensor([-15.0, -2.5])
    margin = spin_margin(real, synthetic, opponent_real, opponent_synthetic, beta=0.1)
    # 0.1 * ((-10 + 12) - (-20 + 15)) and 0.1 * ((-3 + 3) - (-1 + 2.5))
    assert margin.tolist() == pytest.approx([0.7, -0.15], rel=1e-6)


def test_margin_rises_with_the_real_logprob_and_falls_with_the_synthetic() -> None:
    real, synthetic = torch.tensor([-4.0, -9.0], requires_grad=True), torch.tensor([-2.0, -7.0], requires_grad=True)
    margin = spin_margin(real, synthetic, torch.tensor([-5.0, -5.0]), torch.tensor([-5.0, -5.0]), beta=2.0)
    slopes = torch.autograd.grad(margin.sum(), (real, synthetic))
    assert [slope.tolist() for slope in slopes] == [[2.0, 2.0], [-2.0, -2.0]]


def test_margin_is_zero_where_nothing_has_moved() -> None:
    logprobs = torch.tensor([-123.456, -0.001])
    margin = spin_margin(logprobs, logprobs - 7, logprobs, logprobs - 7, beta=5.0)
    assert margin.tolist() == [0.0, 0.0]

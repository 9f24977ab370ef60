"""The held-out measures, by numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from spinlm.config import EvaluationSection
from spinlm.evaluation.measures import (
    HIGHER_IS_BETTER,
    HeldOutAnswer,
    chosen_measure,
    mean,
    measure,
    ratio,
    repetition,
    select_best,
    share,
    wilson,
)


@pytest.mark.parametrize(
    ("value", "count", "low", "high"),
    [
        (0.5, 100, 0.403832, 0.596168),  # the textbook's
        (0.0, 10, 0.0, 0.277533),  # z² / (n + z²)
        (1.0, 10, 0.722467, 1.0),
        (0.1, 20, 0.027867, 0.301034),
        (1.0, 1, 0.206549, 1.0),  # 1 / (1 + z²)
    ],
)
def test_wilson_by_hand(value: float, count: int, low: float, high: float) -> None:
    assert wilson(value, count) == pytest.approx((low, high), abs=2e-6)


def test_wilson_is_where_the_score_test_is_at_its_limit() -> None:
    """Its ends solve |found - p| = z sqrt(p (1 - p) / n)."""
    for found, count in itertools.product((0.2, 0.55, 0.9), (5, 40, 1440)):
        for end in wilson(found, count):
            assert abs(found - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), rel=1e-9)


@pytest.mark.parametrize(
    ("ids", "n", "expected"),
    [
        ([1, 2, 3, 4, 5, 6], 4, 0.0),
        ([1, 1, 1, 1, 1, 1], 4, 2 / 3),  # three 4-grams, one kind
        ([1, 2, 3, 4, 1, 2, 3, 4], 4, 1 / 5),  # 1234 2341 3412 4123 1234
        ([1, 2, 1, 2, 1], 2, 1 / 2),  # 12 21 12 21
        ([7, 7, 7, 7], 4, 0.0),
        ([7, 7, 7], 4, 0.0),
        ([], 4, 0.0),
    ],
)
def test_repetition_by_hand(ids: list[int], n: int, expected: float) -> None:
    assert repetition(ids, n) == pytest.approx(expected)


def test_share_of_yes_and_no_has_wilsons_interval() -> None:
    measured = share([1, 0, 1, 1])
    assert (measured.value, measured.prompts) == (0.75, 4)
    assert (measured.low, measured.high) == wilson(0.75, 4)


def test_ratio_is_sum_over_sum_not_a_mean_of_ratios() -> None:
    measured = ratio([2.0, 9.0], [1.0, 9.0])
    assert (measured.value, measured.prompts) == (1.1, 2)
    # a resample has each of the two prompts twice a quarter of the time: 18 / 18 = 1 and 4 / 2 = 2
    assert (measured.low, measured.high) == (1.0, 2.0)


def test_bootstrap_interval_is_the_normal_ones_where_there_are_many_prompts() -> None:
    values = [(37 * i % 101) / 10 for i in range(1010)]  # 0 to 10, evenly: standard deviation 2.9155
    measured = mean(values)
    half = 1.96 * math.sqrt((101**2 - 1) / 12) / 10 / math.sqrt(1010)
    assert measured.value == pytest.approx(5.0)
    assert measured.low == pytest.approx(5 - half, abs=0.1 * half)
    assert measured.high == pytest.approx(5 + half, abs=0.1 * half)
    assert mean(values) == measured, "the same each time"


def test_nothing_to_average_is_not_a_number() -> None:
    measured = mean([])
    assert measured.prompts == 0
    assert math.isnan(measured.value) and math.isnan(measured.low) and math.isnan(measured.high)


def _answers() -> list[HeldOutAnswer]:
    return [
        HeldOutAnswer(
            real_logprob=-6.0,
            real_tokens=2,
            sampled=[[1, 1, 1, 1, 1], [1, 2, 3]],
            sampled_truncated=[True, False],
            sampled_correct=[True, False],
            greedy_correct=True,
        ),
        HeldOutAnswer(
            real_logprob=-4.0,
            real_tokens=8,
            sampled=[[5], [1, 2, 3, 4, 5, 6, 7]],
            sampled_truncated=[False, False],
            sampled_correct=[True, True],
            greedy_correct=False,
        ),
    ]


def test_measures_of_two_prompts_by_hand() -> None:
    values = {name: measured.value for name, measured in measure(_answers()).items()}
    assert values == pytest.approx(
        {
            "real_nll": 1.0,  # (6 + 4) nats over (2 + 8) tokens
            "truncation_rate": 0.25,
            "repetition_rate": 0.125,  # ((1/2 + 0) / 2 + 0) / 2
            "length_sampled": 4.0,
            "length_real": 5.0,
            "accuracy_sampled": 0.75,
            "accuracy_greedy": 0.5,
        }
    )
    assert all(measured.prompts == 2 for measured in measure(_answers()).values())


def test_margins_of_a_main_player_by_hand() -> None:
    measured = measure(_answers(), margins=[[1.0, -3.0], [0.5, 0.0]])
    assert measured["discriminability"].value == 0.5  # a margin of 0 tells nothing apart
    assert measured["margin"].value == pytest.approx((-1.0 + 0.25) / 2)


def test_examples_without_margins_do_not_count() -> None:
    measured = measure(_answers(), margins=[[], [2.0, 4.0]])
    assert (measured["discriminability"].value, measured["discriminability"].prompts) == (1.0, 1)
    assert (measured["margin"].value, measured["margin"].prompts) == (3.0, 1)


@pytest.mark.parametrize("margins", [None, [], [[], []]])
def test_no_margins_no_discriminability(margins: list[list[float]] | None) -> None:
    assert {"discriminability", "margin"}.isdisjoint(measure(_answers(), margins))


def test_a_mean_of_ones_and_zeros_that_are_no_yes_and_no_has_the_bootstraps_interval() -> None:
    assert (mean([1.0, 1.0, 1.0]).low, share([1.0, 1.0, 1.0]).low) == (1.0, wilson(1.0, 3)[0])


def test_no_verifier_no_accuracy_and_nothing_held_out_no_measures() -> None:
    plain = [HeldOutAnswer(-1.0, 1, [[1]], [False])]
    assert {"accuracy_sampled", "accuracy_greedy", "discriminability", "margin"}.isdisjoint(measure(plain))
    assert measure([]) == {}


def _candidates(measure_name: str, *values: float) -> dict[str, dict[str, Any]]:
    return {f"iteration-{i}": {measure_name: {"value": value}} for i, value in enumerate(values)}


@pytest.mark.parametrize("measure_name", ["accuracy_sampled", "accuracy_greedy"])
def test_best_is_highest(measure_name: str) -> None:
    assert select_best(_candidates(measure_name, 0.1, 0.9, 0.3), measure_name) == "iteration-1"


@pytest.mark.parametrize("measure_name", ["real_nll", "truncation_rate", "repetition_rate"])
def test_best_is_lowest(measure_name: str) -> None:
    assert select_best(_candidates(measure_name, 0.4, 0.9, 0.3), measure_name) == "iteration-2"


@pytest.mark.parametrize("measure_name", HIGHER_IS_BETTER)
def test_of_equals_the_first_is_best(measure_name: str) -> None:
    assert select_best(_candidates(measure_name, 0.5, 0.5, 0.5), measure_name) == "iteration-0"


def test_every_measure_that_a_recipe_may_select_by_has_a_direction_and_is_measured() -> None:
    for name in HIGHER_IS_BETTER:
        assert EvaluationSection(select_by=name).select_by == name  # type: ignore[arg-type]
        assert name in measure(_answers())


def test_auto_is_sampled_accuracy_where_there_is_a_verifier() -> None:
    assert chosen_measure("auto", measure(_answers())) == "accuracy_sampled"
    assert chosen_measure("auto", measure([HeldOutAnswer(-1.0, 1, [[1]], [False])])) == "real_nll"
    assert chosen_measure("repetition_rate", measure(_answers())) == "repetition_rate"

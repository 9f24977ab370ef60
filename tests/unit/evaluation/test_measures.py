"""The held-out measures, by numbers worked out by hand."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict
from statistics import NormalDist, stdev
from typing import Any

import numpy as np
import pytest

from spinlm.config import EvaluationSection
from spinlm.evaluation.measures import (
    HIGHER_IS_BETTER,
    HeldOutExample,
    Measured,
    SampledAnswer,
    chosen_measure,
    difference,
    is_better,
    mean,
    measure,
    ratio,
    repetition,
    select_best,
    share,
    unpaired_difference,
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


@pytest.mark.parametrize(("count", "t"), [(8, 2.364624), (20, 2.093024), (60, 2.000995)])
def test_bootstrap_interval_of_few_prompts_is_as_wide_as_students(count: int, t: float) -> None:
    """Plain percentiles would be sqrt((n - 1) / n) 1.96 / t of that: 22 % too narrow for eight prompts."""
    values = [NormalDist().inv_cdf((place + 0.5) / count) for place in range(count)]
    measured, half = mean(values), t * stdev(values) / math.sqrt(count)
    assert (measured.high - measured.low) / 2 == pytest.approx(half, rel=0.12)


def test_nothing_to_average_is_not_a_number() -> None:
    measured = mean([])
    assert measured.prompts == 0
    assert math.isnan(measured.value) and math.isnan(measured.low) and math.isnan(measured.high)


def _examples(*margins: list[float]) -> list[HeldOutExample]:
    return [
        HeldOutExample(
            id="0",
            real_logprob=-6.0,
            real_tokens=2,
            sampled=[
                SampledAnswer(5, truncated=True, repetition=0.5, logprob=-10.0, start_logprob=-12.0, correct=True),
                SampledAnswer(3, truncated=False, repetition=0.0, logprob=-6.0, start_logprob=-5.0, correct=False),
            ],
            greedy_correct=True,
            margins=margins[0] if margins else [],
        ),
        HeldOutExample(
            id="1",
            real_logprob=-4.0,
            real_tokens=8,
            sampled=[
                SampledAnswer(1, truncated=False, repetition=0.0, logprob=-1.0, start_logprob=-2.0, correct=True),
                SampledAnswer(7, truncated=False, repetition=0.0, logprob=-7.0, start_logprob=-9.0, correct=True),
            ],
            greedy_correct=False,
            margins=margins[1] if margins else [],
        ),
    ]


PLAIN = [HeldOutExample("0", -1.0, 1, [SampledAnswer(1, False, 0.0, -1.0)])]
"""Without a verifier, and of a player without an opponent."""


def test_measures_of_two_prompts_by_hand() -> None:
    values = {name: measured.value for name, measured in measure(_examples()).items()}
    assert values == pytest.approx(
        {
            "real_nll": 1.0,  # (6 + 4) nats over (2 + 8) tokens
            "truncation_rate": 0.25,
            "repetition_rate": 0.125,  # ((1/2 + 0) / 2 + 0) / 2
            "length_sampled": 4.0,
            "length_real": 5.0,
            "accuracy_sampled": 0.75,
            "accuracy_greedy": 0.5,
            "drift": 0.25,  # (2 - 1 + 1 + 2) nats over (5 + 3 + 1 + 7) tokens
        }
    )
    assert all(measured.prompts == 2 for measured in measure(_examples()).values())


def test_margins_of_a_main_player_by_hand() -> None:
    measured = measure(_examples([1.0, -3.0], [0.5, 0.0]))
    assert measured["discriminability"].value == 0.5  # a margin of 0 tells nothing apart
    assert measured["margin"].value == pytest.approx((-1.0 + 0.25) / 2)


def test_examples_without_margins_do_not_count() -> None:
    measured = measure(_examples([], [2.0, 4.0]))
    assert (measured["discriminability"].value, measured["discriminability"].prompts) == (1.0, 1)
    assert (measured["margin"].value, measured["margin"].prompts) == (3.0, 1)


def test_no_margins_no_discriminability() -> None:
    assert {"discriminability", "margin"}.isdisjoint(measure(_examples([], [])))


def test_an_example_comes_back_from_its_row() -> None:
    for example in _examples([1.0], []):
        assert HeldOutExample.of(json.loads(json.dumps(asdict(example)))) == example


class TestDifference:
    def test_the_same_prompts_are_drawn_for_both(self) -> None:
        """Each prompt is 0.5 nats a token better than before, however hard it is: no noise at all."""
        before = [_of_nll(nll) for nll in (1.0, 4.0, 9.0, 2.0, 3.0, 5.0)]
        after = [_of_nll(nll - 0.5) for nll in (1.0, 4.0, 9.0, 2.0, 3.0, 5.0)]
        change = difference(after, before, "real_nll")
        assert (change.value, change.low, change.high) == pytest.approx((-0.5, -0.5, -0.5))
        assert measure(after)["real_nll"].high > measure(before)["real_nll"].low, "their own intervals overlap"

    def test_two_prompts_by_hand(self) -> None:
        """+2 on one prompt and -1 on the other: of four resamples one has only the one, one only the other."""
        change = difference([_of_nll(3.0), _of_nll(2.0)], [_of_nll(1.0), _of_nll(3.0)], "real_nll")
        assert change == Measured(0.5, -1.0, 2.0, 2)

    def test_is_of_the_measures_themselves(self) -> None:
        mine, theirs = _examples([1.0, -3.0], [0.5, 0.0]), _examples([1.0, 3.0], [0.5, 0.5])
        for name in measure(mine):
            expected = measure(mine)[name].value - measure(theirs)[name].value
            assert difference(mine, theirs, name).value == pytest.approx(expected)

    def test_only_prompts_that_count_for_both(self) -> None:
        change = difference(_examples([4.0], [2.0]), _examples([1.0], []), "margin")
        assert (change.value, change.prompts) == (3.0, 1)
        assert difference(_examples(), _examples(), "margin").prompts == 0

    @pytest.mark.parametrize(("changed", "better"), [(1, False), (5, False), (6, True)])
    def test_a_few_prompts_that_changed_may_be_chance(self, changed: int, better: bool) -> None:
        """Six of six the same way have a chance of 1 in 32 in a sign test, five of five of 1 in 16."""
        change = difference([_of_nll(1.0)] * changed, [_of_nll(3.0)] * changed, "real_nll")
        assert (change.value, change.low, change.high) == (-2.0, -2.0, -2.0 if better else 0.0)
        assert is_better(change, "real_nll") is better

    def test_the_best_of_many_has_a_wider_interval(self) -> None:
        """Bonferroni's: the percentiles of a normal distribution move from 1.96 to 2.81 standard errors for ten."""
        steps = [NormalDist().inv_cdf((place + 0.5) / 200) for place in range(200)]
        mine, theirs = [_of_nll(5 + step) for step in steps], [_of_nll(5.0)] * 200
        alone, of_ten = (difference(mine, theirs, "real_nll", choices) for choices in (1, 10))
        ratio_of_widths = (of_ten.high - of_ten.low) / (alone.high - alone.low)
        assert ratio_of_widths == pytest.approx(2.807 / 1.960, rel=0.1)

    @pytest.mark.parametrize(
        ("name", "low", "high", "better"),
        [
            ("accuracy_sampled", 0.01, 0.2, True),
            ("accuracy_sampled", 0.0, 0.2, False),
            ("accuracy_sampled", -0.2, -0.01, False),
            ("real_nll", -0.2, -0.01, True),
            ("real_nll", -0.2, 0.0, False),
            ("real_nll", 0.01, 0.2, False),
        ],
    )
    def test_beyond_noise_is_an_interval_on_the_good_side(
        self, name: str, low: float, high: float, better: bool
    ) -> None:
        assert is_better(Measured((low + high) / 2, low, high, 10), name) is better


class TestUnpairedDifference:
    def test_two_prompts_each_by_hand(self) -> None:
        """Each mean is 1 or 3 in a quarter of its resamples, so their difference is 2 or -2 in a sixteenth."""
        change = unpaired_difference([_of_nll(1.0), _of_nll(3.0)], [_of_nll(1.0), _of_nll(3.0)], "real_nll")
        assert change == Measured(0.0, -2.0, 2.0, 2)

    def test_its_interval_is_that_of_two_independent_means(self) -> None:
        """1.96 times the root of the sum of their variances, of 900 and 400 prompts."""
        draw = np.random.default_rng(3)
        mine, theirs = draw.normal(2.0, 1.0, 900), draw.normal(1.5, 2.0, 400)
        change = unpaired_difference(*([_of_nll(nll) for nll in side] for side in (mine, theirs)), "real_nll")
        assert change.value == pytest.approx(mine.mean() - theirs.mean())
        assert change.prompts == 400
        expected = 2 * 1.96 * math.sqrt(mine.var() / 900 + theirs.var() / 400)
        assert change.high - change.low == pytest.approx(expected, rel=0.08)

    def test_nothing_to_compare(self) -> None:
        assert unpaired_difference([_of_nll(1.0)], [], "real_nll").prompts == 0
        assert math.isnan(unpaired_difference([], [_of_nll(1.0)], "real_nll").value)


def _of_nll(nll: float) -> HeldOutExample:
    return HeldOutExample("0", -nll, 1, [])


def test_a_mean_of_ones_and_zeros_that_are_no_yes_and_no_has_the_bootstraps_interval() -> None:
    assert (mean([1.0, 1.0, 1.0]).low, share([1.0, 1.0, 1.0]).low) == (1.0, wilson(1.0, 3)[0])


def test_no_verifier_no_accuracy_and_nothing_held_out_no_measures() -> None:
    assert {"accuracy_sampled", "accuracy_greedy", "discriminability", "margin", "drift"}.isdisjoint(measure(PLAIN))
    assert measure([]) == {}


def _candidates(measure_name: str, *values: float) -> dict[str, dict[str, Any]]:
    return {f"iteration-{i}": {measure_name: {"value": value}} for i, value in enumerate(values)}


@pytest.mark.parametrize("measure_name", ["accuracy_sampled", "accuracy_greedy"])
def test_best_is_highest(measure_name: str) -> None:
    assert select_best(_candidates(measure_name, 0.1, 0.9, 0.3), measure_name) == "iteration-1"


@pytest.mark.parametrize("measure_name", ["accuracy_greedy", "real_nll"])
def test_a_player_that_has_no_number_is_never_the_best(measure_name: str) -> None:
    for values in ((math.nan, 0.9), (0.9, math.nan)):
        best = select_best(_candidates(measure_name, *values), measure_name)
        assert best == f"iteration-{values.index(0.9)}"


@pytest.mark.parametrize("measure_name", ["real_nll", "truncation_rate", "repetition_rate"])
def test_best_is_lowest(measure_name: str) -> None:
    assert select_best(_candidates(measure_name, 0.4, 0.9, 0.3), measure_name) == "iteration-2"


@pytest.mark.parametrize("measure_name", HIGHER_IS_BETTER)
def test_of_equals_the_first_is_best(measure_name: str) -> None:
    assert select_best(_candidates(measure_name, 0.5, 0.5, 0.5), measure_name) == "iteration-0"


def test_every_measure_that_a_recipe_may_select_by_has_a_direction_and_is_measured() -> None:
    for name in HIGHER_IS_BETTER:
        assert EvaluationSection(select_by=name).select_by == name  # type: ignore[arg-type]
        assert name in measure(_examples())


def test_auto_is_sampled_accuracy_where_there_is_a_verifier() -> None:
    assert chosen_measure("auto", measure(_examples())) == "accuracy_sampled"
    assert chosen_measure("auto", measure(PLAIN)) == "real_nll"
    assert chosen_measure("repetition_rate", measure(_examples())) == "repetition_rate"

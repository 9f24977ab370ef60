"""Win rates and grades by numbers worked out by hand, in worlds whose truth is known, and against scikit-learn."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from spinlm.evaluation.measures import Measured, wilson
from spinlm.evaluation.winrate import (
    WEAK,
    Comparison,
    first_preferred,
    grades_by,
    length_controlled_win_rate,
    length_differences,
    mean_grade,
    position_bias,
    win_rate,
    won_at_equal_length,
)


def compared(first: float, second: float | None = None, length: int = 10, other_length: int = 10) -> Comparison:
    return Comparison(first, first if second is None else second, length, other_length)


def mirrored(comparison: Comparison) -> Comparison:
    """The same verdicts, seen from the other side."""
    return Comparison(
        1 - comparison.shown_second, 1 - comparison.shown_first, comparison.other_length, comparison.length
    )


def world(count: int, longer_by: float, merit: float, taste_for_length: float, seed: int = 0) -> list[Comparison]:
    """A judge whose log-odds are the player's merit and its taste for length; the player's answers are longer."""
    rng = np.random.default_rng(seed)
    differences = np.rint(rng.normal(longer_by, 100, count))
    feature = np.tanh(differences / differences.std(ddof=1))
    won = rng.random(count) < 1 / (1 + np.exp(-merit - taste_for_length * feature))
    return [
        compared(float(one), length=1000 + int(difference), other_length=1000)
        for one, difference in zip(won, differences, strict=True)
    ]


def by_scikit_learn(won: np.ndarray, differences: np.ndarray, weights: np.ndarray) -> float:
    """The same regression, by an independent implementation."""
    model = LogisticRegression(C=WEAK, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    outcomes = np.repeat([1, 0], len(won))
    model.fit(np.tile(differences, 2)[:, None], outcomes, np.concatenate([weights * won, weights * (1 - won)]))
    return float(1 / (1 + np.exp(-model.intercept_[0])))


class TestPreference:
    @pytest.mark.parametrize(
        ("shown_first", "shown_second", "preference", "agrees"),
        [
            (1.0, 1.0, 1.0, True),
            (0.0, 0.0, 0.0, True),
            (0.5, 0.5, 0.5, True),
            (1.0, 0.0, 0.5, False),
            (0.0, 1.0, 0.5, False),
            (1.0, 0.5, 0.5, False),
            (0.5, 0.0, 0.5, False),
        ],
    )
    def test_a_win_is_one_in_both_orders(
        self, shown_first: float, shown_second: float, preference: float, agrees: bool
    ) -> None:
        comparison = compared(shown_first, shown_second)
        assert (comparison.preference, comparison.agrees) == (preference, agrees)


class TestWinRate:
    def test_ties_are_half(self) -> None:
        comparisons = [compared(1), compared(1), compared(1, 0), compared(0)]
        measured = win_rate(comparisons)
        assert (measured.value, measured.prompts) == (2.5 / 4, 4)
        assert measured.low < 2.5 / 4 < measured.high

    def test_the_interval_is_the_bootstraps(self) -> None:
        """With n values of equal spread, about 1.96 standard errors to each side."""
        comparisons = [compared(value) for value in (0.0, 0.5, 1.0) * 100]
        measured = win_rate(comparisons)
        error = math.sqrt(1 / 6 / 300)
        assert measured.low == pytest.approx(0.5 - 1.96 * error, abs=0.005)
        assert measured.high == pytest.approx(0.5 + 1.96 * error, abs=0.005)

    def test_all_won(self) -> None:
        """The interval is Wilson's, which doesn't claim certainty."""
        assert astuple(win_rate([compared(1)] * 10)) == (1.0, *wilson(1.0, 10), 10)


class TestPosition:
    def test_a_judge_that_sees_only_the_order(self) -> None:
        comparisons = [compared(1, 0)] * 4
        assert (win_rate(comparisons).value, position_bias(comparisons).value) == (0.5, 1.0)
        assert first_preferred(comparisons).value == 1.0

    def test_by_hand(self) -> None:
        comparisons = [compared(1, 1), compared(0, 0), compared(0.5, 1), compared(0, 1)]
        assert position_bias(comparisons).value == 0.5
        assert first_preferred(comparisons).value == (0.5 + 0.5 + 0.25 + 0.0) / 4


class TestLengthControl:
    def test_the_feature(self) -> None:
        comparisons = [compared(1, length=length, other_length=100) for length in (70, 130, 100)]
        assert length_differences(comparisons) == pytest.approx([-math.tanh(1), math.tanh(1), 0])

    @pytest.mark.parametrize("lengths", [[150], [150, 150, 150]])
    def test_without_spread_there_is_nothing_to_control_for(self, lengths: list[int]) -> None:
        comparisons = [compared(1, length=length, other_length=100) for length in lengths]
        assert not length_differences(comparisons).any()

    def test_by_hand(self) -> None:
        """Four long answers that won three times, four short ones that won once: at equal length, half."""
        comparisons = [compared(w, length=200, other_length=100) for w in (1, 1, 1, 0)]
        comparisons += [compared(w, length=100, other_length=200) for w in (1, 0, 0, 0)]
        assert length_controlled_win_rate(comparisons).value == pytest.approx(0.5, abs=1e-9)

    def test_by_hand_where_the_player_is_longer(self) -> None:
        """At +1 it wins 3 of 4 (log-odds ln 3), at -1 1 of 2 (0): the line crosses 0 at ln(3)/2."""
        won = np.array([1, 1, 1, 0, 1, 0], dtype=float)
        side = np.array([1, 1, 1, 1, -1, -1], dtype=float)
        expected = 1 / (1 + math.exp(-math.log(3) / 2))
        # The weak penalty moves it in the fourth digit.
        assert won_at_equal_length(won, side, np.ones((1, 6)))[0] == pytest.approx(expected, abs=1e-3)

    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("count", [5, 40, 400])
    def test_equals_scikit_learn(self, seed: int, count: int) -> None:
        rng = np.random.default_rng(seed)
        differences = np.tanh(rng.normal(0.3, 1, count))
        won = rng.choice([0.0, 0.5, 1.0], count) if seed % 2 else (differences > 0.2).astype(float)
        won[0], won[1] = 1.0, 0.0
        times = rng.multinomial(count, np.full(count, 1 / count), size=3).astype(float)
        ours = won_at_equal_length(won, differences, times)
        for mine, weights in zip(ours, times, strict=True):
            share = weights @ won / count
            expected = share if share in (0, 1) else by_scikit_learn(won, differences, weights)
            assert mine == pytest.approx(expected, abs=1e-6)

    def test_where_newtons_own_steps_go_too_far(self) -> None:
        """Undamped, they end in numbers that are none."""
        won = np.array([0.0, 1.0, 1.0, 1.0])
        differences = np.array([1.0, -0.929, 1.0, 0.793])
        times = np.array([31.0, 176.0, 2.0, 1242.0])
        expected = by_scikit_learn(won, differences, times)
        assert won_at_equal_length(won, differences, times[None])[0] == pytest.approx(expected, abs=1e-6)

    def test_a_judge_with_a_taste_for_length_only(self) -> None:
        comparisons = world(2000, longer_by=100, merit=0.0, taste_for_length=3.0)
        raw, controlled = win_rate(comparisons), length_controlled_win_rate(comparisons)
        assert raw.low > 0.7
        assert controlled.low < 0.5 < controlled.high
        assert controlled.value == pytest.approx(0.5, abs=0.04)

    def test_a_judge_that_sees_nothing_but_length(self) -> None:
        """The longer one always wins: no finite fit but for the penalty, and nothing is claimed."""
        lengths = np.rint(np.random.default_rng(0).normal(50, 100, 400)).astype(int)
        comparisons = [compared(float(d > 0), length=1000 + d, other_length=1000) for d in lengths.tolist()]
        assert win_rate(comparisons).low > 0.6
        controlled = length_controlled_win_rate(comparisons)
        assert controlled.low < 0.5 < controlled.high

    def test_a_better_player(self) -> None:
        """Longer answers, and a judge that doesn't care: both rates are the merit."""
        merit = math.log(0.75 / 0.25)
        comparisons = world(2000, longer_by=100, merit=merit, taste_for_length=0.0)
        assert win_rate(comparisons).value == pytest.approx(0.75, abs=0.03)
        assert length_controlled_win_rate(comparisons).value == pytest.approx(0.75, abs=0.03)

    def test_a_better_player_with_short_answers(self) -> None:
        """The raw rate hides the merit, the controlled one shows it."""
        merit = math.log(0.75 / 0.25)
        comparisons = world(2000, longer_by=-150, merit=merit, taste_for_length=3.0)
        assert win_rate(comparisons).high < 0.45
        assert length_controlled_win_rate(comparisons).value == pytest.approx(0.75, abs=0.05)

    def test_the_interval_covers_the_truth(self) -> None:
        """Of 60 worlds, about 95 % of the intervals hold 0.5."""
        covered = 0
        for seed in range(60):
            comparisons = world(80, longer_by=60, merit=0.0, taste_for_length=2.0, seed=seed)
            measured = length_controlled_win_rate(comparisons)
            covered += measured.low <= 0.5 <= measured.high
        assert 52 <= covered <= 60

    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_one_side_always_wins(self, value: float) -> None:
        comparisons = [compared(value, length=length) for length in (5, 10, 20)]
        assert length_controlled_win_rate(comparisons) == win_rate(comparisons)

    def test_all_ties(self) -> None:
        comparisons = [compared(0.5, length=length) for length in (5, 10, 20)]
        assert astuple(length_controlled_win_rate(comparisons)) == (0.5, 0.5, 0.5, 3)


class TestSwappingThePlayers:
    @pytest.mark.parametrize("seed", range(4))
    def test_mirrors_everything(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        comparisons = [
            Comparison(*rng.choice([0.0, 0.5, 1.0], 2).tolist(), *rng.integers(1, 500, 2).tolist()) for _ in range(50)
        ]
        others = [mirrored(comparison) for comparison in comparisons]
        for rate in (win_rate, length_controlled_win_rate):
            mine, theirs = rate(comparisons), rate(others)
            assert theirs.value == pytest.approx(1 - mine.value, abs=1e-9)
            assert theirs.low == pytest.approx(1 - mine.high, abs=1e-9)
            assert theirs.high == pytest.approx(1 - mine.low, abs=1e-9)
        assert position_bias(others) == position_bias(comparisons)
        assert first_preferred(others).value == pytest.approx(first_preferred(comparisons).value)


class TestGrades:
    def test_over_all_turns(self) -> None:
        measured = mean_grade([[8, 6], [10], [], [1, 2]])
        assert (measured.value, measured.prompts) == (27 / 5, 3)

    def test_a_questions_turns_are_drawn_together(self) -> None:
        """Ten questions whose two turns are alike say as much as ten, not as twenty."""
        alike = [[float(grade)] * 2 for grade in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)]
        once = [[grade] for grade, _ in alike]
        assert mean_grade(alike) == mean_grade(once)

    def test_by_category(self) -> None:
        by = grades_by(["maths", "prose", "maths", "none"], [[2, 4], [9], [6], []])
        assert {name: (measured.value, measured.prompts) for name, measured in by.items()} == {
            "maths": (4.0, 2),
            "prose": (9.0, 1),
        }

    def test_no_grades(self) -> None:
        assert isinstance(mean_grade([[]]), Measured)
        assert math.isnan(mean_grade([[]]).value)

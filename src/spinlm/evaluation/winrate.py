"""Win rates and grades from a judge's verdicts: pure functions, each value with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spinlm.evaluation.measures import BOOTSTRAP_SAMPLES, Measured, interval, ratio, share

WEAK = 100.0
"""The inverse strength of the L2 penalty on the effect of length: a normal prior of standard deviation 10."""

MOST_STEPS = 200
"""Of a fit; some ten are enough unless length alone decides nearly everything."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """What a judge prefers on one question, asked in both orders.

    Attributes:
        shown_first: Its preference for the player, 1, 0.5 or 0, where the player's answer is shown first.
        shown_second: The same where it is shown second.
        length: Of the player's answer, in characters.
        other_length: Of the other's.
    """

    shown_first: float
    shown_second: float
    length: int
    other_length: int

    @property
    def preference(self) -> float:
        """1 where the player is preferred in both orders, 0 where the other is; else half a win."""
        return self.shown_first if self.shown_first == self.shown_second else 0.5

    @property
    def agrees(self) -> bool:
        """Whether both orders came to the same."""
        return self.shown_first == self.shown_second


def win_rate(comparisons: Sequence[Comparison]) -> Measured:
    """The mean preference for the player, ties as half; by bootstrap over questions, Wilson's where none is tied."""
    return share([comparison.preference for comparison in comparisons])


def length_controlled_win_rate(comparisons: Sequence[Comparison]) -> Measured:
    """What the win rate would be if both answers were always of the same length (arXiv 2404.04475).

    A logistic regression of the preference on an intercept and tanh(difference of lengths / its standard
    deviation), read at a difference of zero. Left out of the paper's: the term for the difficulty of each
    instruction, which needs other models' answers to the same questions, and the two artificial contestants
    that its authors regularise by. The effect of length has a weak L2 penalty (`WEAK`) in place of their
    cross-validated L1; the intercept has none. The interval is by bootstrap over questions, each draw fitted
    anew. Where one side always wins, length explains nothing, and it is the win rate itself.
    """
    won = np.array([comparison.preference for comparison in comparisons])
    count = len(won)
    if count == 0 or won.min() == won.max() != 0.5:
        return win_rate(comparisons)
    differences = length_differences(comparisons)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=BOOTSTRAP_SAMPLES)
    value = won_at_equal_length(won, differences, np.ones((1, count)))
    return Measured(
        float(value[0]), *interval(won_at_equal_length(won, differences, drawn.astype(float)), count), count
    )


def length_differences(comparisons: Sequence[Comparison]) -> Floats:
    """tanh of each difference of lengths in standard deviations; 0 where there is no spread to control for."""
    differences = np.array([c.length - c.other_length for c in comparisons], dtype=float)
    spread = differences.std(ddof=1) if len(differences) > 1 else 0.0
    return np.tanh(differences / spread) if spread > 0 else np.zeros_like(differences)


def position_bias(comparisons: Sequence[Comparison]) -> Measured:
    """The share of questions on which the two orders don't come to the same."""
    return share([float(not comparison.agrees) for comparison in comparisons])


def first_preferred(comparisons: Sequence[Comparison]) -> Measured:
    """The mean preference for the answer that is shown first; a judge without position bias has 0.5."""
    return share([(c.shown_first + 1 - c.shown_second) / 2 for c in comparisons])


def mean_grade(grades: Sequence[Sequence[float]]) -> Measured:
    """The mean over all grades, with its interval by bootstrap over questions.

    Args:
        grades: Of each question, those that were given; a question without any is left out.
    """
    given = [of_question for of_question in grades if of_question]
    return ratio([sum(of_question) for of_question in given], [len(of_question) for of_question in given])


def grades_by(groups: Sequence[str], grades: Sequence[Sequence[float]]) -> Mapping[str, Measured]:
    """The mean grade of each group of questions, in the order in which the groups appear."""
    members: dict[str, list[Sequence[float]]] = {}
    for group, of_question in zip(groups, grades, strict=True):
        if of_question:
            members.setdefault(group, []).append(of_question)
    return {group: mean_grade(of_group) for group, of_group in members.items()}


def won_at_equal_length(won: Floats, differences: Floats, times: Floats) -> Floats:
    """The preference that logistic regressions expect at a difference of zero, one for each draw of questions.

    Newton's method, its steps damped so that each of them goes uphill (generalised self-concordance,
    arXiv 1703.04599). A draw that one side wins entirely has no finite fit: there it is that outcome.

    Args:
        won: (questions,) preferences from 0 to 1.
        differences: (questions,) from -1 to 1.
        times: (draws, questions) how often each is drawn.

    Returns:
        (draws,) from 0 to 1.
    """
    expected: Floats = times @ won / times.sum(axis=1)
    mixed = (expected > 0) & (expected < 1)
    times = times[mixed]
    design = np.stack([np.ones_like(differences), differences])  # (2, questions)
    penalty = np.array([0.0, 1 / WEAK])
    weights = np.zeros((len(times), 2))  # (draws, 2): intercept, effect of length
    for _ in range(MOST_STEPS):
        chances = 1 / (1 + np.exp(-weights @ design))
        uphill = (times * (won - chances)) @ design.T - penalty * weights
        curvature = np.einsum("dq,iq,jq->dij", times * chances * (1 - chances), design, design) + np.diag(penalty)
        step = np.linalg.solve(curvature, uphill[..., None])[..., 0]
        size = math.sqrt(2) * np.linalg.norm(step, axis=1, keepdims=True)  # sqrt(2): the most a question weighs
        weights += step * np.where(size > 0, np.log1p(size) / np.maximum(size, 1e-300), 1.0)
        if not len(size) or size.max() < 1e-9:
            break
    expected[mixed] = 1 / (1 + np.exp(-weights[:, 0]))
    return expected

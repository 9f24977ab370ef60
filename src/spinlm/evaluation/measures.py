"""Measures on the held-out part, each with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BOOTSTRAP_SAMPLES = 2000
HIGHER_IS_BETTER = {
    "accuracy_sampled": True,
    "accuracy_greedy": True,
    "real_nll": False,
    "truncation_rate": False,
    "repetition_rate": False,
}
"""The measures that can name the best iteration."""


@dataclass(frozen=True)
class Measured:
    """A value with its 95 % interval over `prompts` held-out prompts."""

    value: float
    low: float
    high: float
    prompts: int


@dataclass(frozen=True)
class HeldOutAnswer:
    """What a player makes of one held-out example.

    Attributes:
        real_logprob: Its log-prob of the real response.
        real_tokens: The real response's length.
        sampled: The token ids of its sampled responses.
        sampled_truncated: Which of them were cut at the cap.
        sampled_correct: Which of them the verifier accepts; None without a verifier.
        greedy_correct: Whether it accepts the greedy one; None without a verifier or a greedy response.
    """

    real_logprob: float
    real_tokens: int
    sampled: list[list[int]]
    sampled_truncated: list[bool]
    sampled_correct: list[bool] | None = None
    greedy_correct: bool | None = None


def measure(answers: Sequence[HeldOutAnswer], margins: Sequence[Sequence[float]] | None = None) -> dict[str, Measured]:
    """All measures of one player.

    Args:
        answers: One for each held-out example.
        margins: For a main player: for each example, the margins of the real response against each fresh
            response of its opponent that differs from it.

    Returns:
        Nothing at all where nothing was held out.
    """
    if not answers:
        return {}
    measured = {
        "real_nll": ratio([-a.real_logprob for a in answers], [a.real_tokens for a in answers]),
        "truncation_rate": share([_mean(a.sampled_truncated) for a in answers]),
        "repetition_rate": mean([_mean([repetition(ids) for ids in a.sampled]) for a in answers]),
        "length_sampled": mean([_mean([len(ids) for ids in a.sampled]) for a in answers]),
        "length_real": mean([float(a.real_tokens) for a in answers]),
    }
    sampled = [_mean(a.sampled_correct) for a in answers if a.sampled_correct is not None]
    greedy = [float(a.greedy_correct) for a in answers if a.greedy_correct is not None]
    if sampled:
        measured["accuracy_sampled"] = share(sampled)
    if greedy:
        measured["accuracy_greedy"] = share(greedy)
    told_apart = [of_example for of_example in margins or [] if of_example]
    if told_apart:
        measured["discriminability"] = share([_mean([m > 0 for m in of_example]) for of_example in told_apart])
        measured["margin"] = mean([_mean(of_example) for of_example in told_apart])
    return measured


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """The share of a response's n-grams that already stood in it (seq-rep-n of arXiv 1908.04319)."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def mean(values: Sequence[float]) -> Measured:
    """The mean over prompts, with its interval by bootstrap."""
    return ratio(values, [1.0] * len(values))


def share(values: Sequence[float]) -> Measured:
    """The mean of shares: with Wilson's interval where each prompt says yes or no, else by bootstrap."""
    array = np.asarray(values, dtype=float)
    if len(array) and np.isin(array, (0.0, 1.0)).all():
        return Measured(float(array.mean()), *wilson(float(array.mean()), len(array)), len(array))
    return mean(values)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Measured:
    """Sum over sum, with the interval by bootstrap over prompts (percentiles, fixed seed)."""
    top, bottom = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if not len(top):
        return Measured(math.nan, math.nan, math.nan, 0)
    drawn = np.random.default_rng(0).integers(0, len(top), size=(BOOTSTRAP_SAMPLES, len(top)))
    low, high = np.percentile(top[drawn].sum(axis=1) / bottom[drawn].sum(axis=1), (2.5, 97.5))
    return Measured(float(top.sum() / bottom.sum()), float(low), float(high), len(top))


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval at 95 %, which stays honest at 0 and 1."""
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def chosen_measure(select_by: str, measures: Mapping[str, Any]) -> str:
    """The measure that names the best: `auto` is sampled accuracy where there is a verifier."""
    if select_by != "auto":
        return select_by
    return "accuracy_sampled" if "accuracy_sampled" in measures else "real_nll"


def select_best(candidates: Mapping[str, Mapping[str, Any]], measure_name: str) -> str:
    """The player with the best value of a measure; of equals, the first.

    Args:
        candidates: Each player's measures, by name, in order.
        measure_name: One of HIGHER_IS_BETTER.
    """
    sign = 1 if HIGHER_IS_BETTER[measure_name] else -1
    return max(candidates, key=lambda name: sign * candidates[name][measure_name]["value"])


def _mean(values: Sequence[float] | Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0

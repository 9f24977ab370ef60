"""Measures on the held-out part, each with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import ndtr, stdtrit

BOOTSTRAP_SAMPLES = 2000
LEAST_CHANGES = 6
"""Fewer prompts that changed, all of them for the better, can't be told from chance (a sign test's p is above 0.03)."""
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
class SampledAnswer:
    """A player's sampled response to a held-out prompt.

    Attributes:
        tokens: Its length.
        truncated: Whether it was cut at the cap.
        repetition: See `repetition`.
        logprob: The player's own log-prob of it.
        start_logprob: The starting player's, for an iteration's main player.
        correct: Whether the verifier accepts it; None without a verifier.
    """

    tokens: int
    truncated: bool
    repetition: float
    logprob: float
    start_logprob: float | None = None
    correct: bool | None = None


@dataclass(frozen=True)
class HeldOutExample:
    """What a player makes of one held-out example: a row of its `examples.jsonl`.

    Attributes:
        id: The example's.
        real_logprob: Its log-prob of the real response.
        real_tokens: The real response's length.
        sampled: Its sampled responses.
        greedy_correct: Whether the verifier accepts the greedy one; None without a verifier or a greedy response.
        margins: For a main player: of the real response against each fresh response of its opponent that differs.
    """

    id: str
    real_logprob: float
    real_tokens: int
    sampled: list[SampledAnswer]
    greedy_correct: bool | None = None
    margins: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> HeldOutExample:
        return cls(**{**row, "sampled": [SampledAnswer(**answer) for answer in row["sampled"]]})


Part = tuple[float, float] | None
"""What an example adds to the sums above and below a measure's fraction line; None: it doesn't count."""


def _over_sampled(value: Callable[[SampledAnswer], float | bool | None]) -> Callable[[HeldOutExample], Part]:
    """The mean over an example's sampled responses."""

    def part(example: HeldOutExample) -> Part:
        values = [found for answer in example.sampled if (found := value(answer)) is not None]
        return (_mean(values), 1.0) if values else None

    return part


def _drift(example: HeldOutExample) -> Part:
    """The log-ratio of the responses that the player drew itself: its expectation is the divergence."""
    ratios = [a.logprob - a.start_logprob for a in example.sampled if a.start_logprob is not None]
    return (sum(ratios), float(sum(a.tokens for a in example.sampled))) if ratios else None


PARTS: Mapping[str, Callable[[HeldOutExample], Part]] = {
    "real_nll": lambda e: (-e.real_logprob, float(e.real_tokens)),
    "truncation_rate": _over_sampled(lambda answer: answer.truncated),
    "repetition_rate": _over_sampled(lambda answer: answer.repetition),
    "length_sampled": _over_sampled(lambda answer: answer.tokens),
    "length_real": lambda e: (float(e.real_tokens), 1.0),
    "accuracy_sampled": _over_sampled(lambda answer: answer.correct),
    "accuracy_greedy": lambda e: None if e.greedy_correct is None else (float(e.greedy_correct), 1.0),
    "discriminability": lambda e: (_mean([margin > 0 for margin in e.margins]), 1.0) if e.margins else None,
    "margin": lambda e: (_mean(e.margins), 1.0) if e.margins else None,
    "drift": _drift,
}
"""Every measure as a fraction whose two sums run over the held-out examples."""

SHARES = frozenset({"truncation_rate", "accuracy_sampled", "accuracy_greedy", "discriminability"})
"""Those that are shares of yes and no."""


def measure(examples: Sequence[HeldOutExample]) -> dict[str, Measured]:
    """All measures of one player; those that no example counts for are left out."""
    measured = {}
    for name, part in PARTS.items():
        parts = [found for example in examples if (found := part(example)) is not None]
        if parts:
            tops, bottoms = zip(*parts, strict=True)
            measured[name] = share(tops) if name in SHARES else ratio(tops, bottoms)
    return measured


def difference(
    mine: Sequence[HeldOutExample], theirs: Sequence[HeldOutExample], name: str, choices: int = 1
) -> Measured:
    """A player's measure minus another's, on the prompts that count for both.

    Both are drawn together in the bootstrap: what makes a prompt hard or easy for both is not noise here.

    Args:
        mine: The player's examples.
        theirs: The other's, of the same prompts in the same order.
        name: One of PARTS.
        choices: How many players this one was chosen from as the best on the same prompts: the interval is then
            Bonferroni's, of 1 - 0.05 / choices.
    """
    part = PARTS[name]
    both = [(a, b) for a, b in zip(map(part, mine), map(part, theirs), strict=True) if a is not None and b is not None]
    if not both:
        return Measured(math.nan, math.nan, math.nan, 0)
    sums = np.asarray(both, dtype=float)  # [prompts, player, numerator and denominator]
    changed = int((sums[:, 0] != sums[:, 1]).any(axis=1).sum())
    return _difference(sums.sum(axis=0), _drawn_sums(sums), len(sums), changed, choices)


def unpaired_difference(mine: Sequence[HeldOutExample], theirs: Sequence[HeldOutExample], name: str) -> Measured:
    """The same of players that don't answer the same prompts: each is drawn by itself, so the interval is wider.

    Its `prompts` are those of the player that has fewer.
    """
    part = PARTS[name]
    sides = [
        np.asarray([found for example in examples if (found := part(example)) is not None], dtype=float)
        for examples in (mine, theirs)
    ]  # [prompts, numerator and denominator] each
    if not all(len(side) for side in sides):
        return Measured(math.nan, math.nan, math.nan, 0)
    sums = np.stack([side.sum(axis=0) for side in sides])
    drawn = np.stack([_drawn_sums(side, seed) for seed, side in enumerate(sides)], axis=1)
    fewer = min(map(len, sides))
    return _difference(sums, drawn, fewer, fewer)


def _difference(sums: np.ndarray, drawn: np.ndarray, prompts: int, changed: int, choices: int = 1) -> Measured:
    """Of two fractions, from their sums [player, numerator and denominator] and as many bootstrap draws of them."""

    def differences(total: np.ndarray) -> np.ndarray:
        return np.asarray(total[..., 0, 0] / total[..., 0, 1] - total[..., 1, 0] / total[..., 1, 1])

    low, high = interval(differences(drawn), prompts, choices)
    if changed < LEAST_CHANGES:
        low, high = min(low, 0.0), max(high, 0.0)
    return Measured(float(differences(sums)), low, high, prompts)


def is_better(change: Measured, name: str) -> bool:
    """Whether a difference is an improvement beyond noise: its whole interval is on the good side of 0."""
    return change.low > 0 if HIGHER_IS_BETTER[name] else change.high < 0


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
    """Sum over sum, with the interval by bootstrap over prompts."""
    sums = np.stack([np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)], axis=1)
    if not len(sums):
        return Measured(math.nan, math.nan, math.nan, 0)
    top, bottom = sums.sum(axis=0)
    drawn = _drawn_sums(sums)
    return Measured(float(top / bottom), *interval(drawn[:, 0] / drawn[:, 1], len(sums)), len(sums))


def _drawn_sums(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Sums over the bootstrap's resamples of prompts, the same each time.

    Args:
        values: [prompts, ...].
        seed: Of the resamples.

    Returns:
        [BOOTSTRAP_SAMPLES, ...].
    """
    generator, prompts = np.random.default_rng(seed), len(values)
    counts = (np.bincount(generator.integers(0, prompts, prompts), minlength=prompts) for _ in range(BOOTSTRAP_SAMPLES))
    return np.stack([np.tensordot(count, values, axes=1) for count in counts])


def interval(drawn: np.ndarray, prompts: int, choices: int = 1) -> tuple[float, float]:
    """The bootstrap's 95 % interval, by percentiles that are moved out where prompts are few.

    Plain percentiles are too narrow by the factor between Student's t with n in its variance and the normal
    distribution (the expanded percentile interval of Hesterberg, arXiv 1411.5279).
    """
    outside = 0.0
    if prompts > 1:
        inside = 1 - 0.025 / choices
        outside = float(ndtr(-math.sqrt(prompts / (prompts - 1)) * stdtrit(prompts - 1, inside)))
    low, high = np.percentile(drawn, (100 * outside, 100 * (1 - outside)))
    return float(low), float(high)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval at 95 %, which stays honest at 0 and 1."""
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def chosen_measure(select_by: str, measures: Collection[str]) -> str:
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
    values = {name: sign * candidate[measure_name]["value"] for name, candidate in candidates.items()}
    return max(values, key=lambda name: -math.inf if math.isnan(values[name]) else values[name])


def _mean(values: Sequence[float | bool]) -> float:
    return sum(values) / len(values) if values else 0.0

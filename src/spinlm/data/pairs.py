"""Pairs of responses, and prompts with all the responses that share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """A prompt, the real and a synthetic response, and the opponent's log-probs of both.

    Attributes:
        prompt_ids: The prompt.
        real_ids: The real response.
        synthetic_ids: The opponent's, or a past opponent's.
        opponent_real_logprob: Of the real response, by whom the main player starts from.
        opponent_synthetic_logprob: Of the synthetic response, by the same.
        synthetic_truncated: Whether the synthetic response was cut at the token cap.
        reference_real_logprob: What the main player's is measured against, where that isn't the opponent's own.
        reference_synthetic_logprob: The same of the synthetic response.
        initial_ids: The starting player's response, where the loss asks for one.
        id: What messages call it.
    """

    prompt_ids: list[int]
    real_ids: list[int]
    synthetic_ids: list[int]
    opponent_real_logprob: float
    opponent_synthetic_logprob: float
    synthetic_truncated: bool = False
    reference_real_logprob: float | None = None
    reference_synthetic_logprob: float | None = None
    initial_ids: list[int] | None = None
    id: str = ""

    @property
    def reference_logprobs(self) -> tuple[float, float]:
        """Of the real and the synthetic response."""
        real, synthetic = self.reference_real_logprob, self.reference_synthetic_logprob
        return (
            self.opponent_real_logprob if real is None else real,
            self.opponent_synthetic_logprob if synthetic is None else synthetic,
        )


@dataclass(frozen=True)
class Group:
    """A prompt and responses to it, as token ids."""

    prompt_ids: Sequence[int]
    responses: Sequence[Sequence[int]]


def drop_identical(pairs: Sequence[Pair]) -> tuple[list[Pair], int]:
    """The pairs whose responses differ, and how many don't: no margin tells the responses of those apart."""
    differing = [pair for pair in pairs if pair.real_ids != pair.synthetic_ids]
    return differing, len(pairs) - len(differing)


def by_prompt(pairs: Sequence[Pair]) -> list[list[int]]:
    """The places of the pairs that have a prompt in common, prompt by prompt in order of appearance."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, pair in enumerate(pairs):
        places.setdefault(tuple(pair.prompt_ids), []).append(place)
    return list(places.values())


@dataclass(frozen=True)
class PairGroups:
    """Each prompt of some pairs once, with each of its different responses once.

    Attributes:
        groups: The prompts with their responses.
        real: For each pair, the number of its real response, counted over all groups.
        synthetic: The number of its synthetic response.
        initial: The number of the starting player's response; of the synthetic one where it has none.
    """

    groups: list[Group]
    real: list[int]
    synthetic: list[int]
    initial: list[int]


def group_pairs(pairs: Sequence[Pair]) -> PairGroups:
    """The pairs' prompts and responses, none of them twice."""
    groups: list[Group] = []
    real, synthetic, initial = ([0] * len(pairs) for _ in range(3))
    count = 0
    for places in by_prompt(pairs):
        numbers: dict[tuple[int, ...], int] = {}

        def number_of(ids: Sequence[int], numbers: dict[tuple[int, ...], int] = numbers, start: int = count) -> int:
            return numbers.setdefault(tuple(ids), start + len(numbers))

        for place in places:
            pair = pairs[place]
            real[place], synthetic[place] = number_of(pair.real_ids), number_of(pair.synthetic_ids)
            initial[place] = synthetic[place] if pair.initial_ids is None else number_of(pair.initial_ids)
        groups.append(Group(pairs[places[0]].prompt_ids, list(numbers)))
        count += len(numbers)
    return PairGroups(groups, real, synthetic, initial)

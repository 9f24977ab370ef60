"""Pairs of responses, and prompts with all the responses that share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """A prompt, the real and a synthetic response, and the opponent's log-probs of both."""

    prompt_ids: list[int]
    real_ids: list[int]
    synthetic_ids: list[int]
    opponent_real_logprob: float
    opponent_synthetic_logprob: float
    synthetic_truncated: bool = False


@dataclass(frozen=True)
class Group:
    """A prompt and responses to it, as token ids."""

    prompt_ids: Sequence[int]
    responses: Sequence[Sequence[int]]


def drop_identical(pairs: Sequence[Pair]) -> tuple[list[Pair], int]:
    """The pairs whose responses differ, and how many don't: those would only add zero gradients."""
    differing = [pair for pair in pairs if pair.real_ids != pair.synthetic_ids]
    return differing, len(pairs) - len(differing)


def by_prompt(pairs: Sequence[Pair]) -> list[list[int]]:
    """The places of the pairs that have a prompt in common, prompt by prompt in order of appearance."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, pair in enumerate(pairs):
        places.setdefault(tuple(pair.prompt_ids), []).append(place)
    return list(places.values())


def group_pairs(pairs: Sequence[Pair]) -> tuple[list[Group], list[int], list[int]]:
    """Each prompt once with each of its different responses once.

    Returns:
        The groups, and for each pair the number of its real and of its synthetic response, counted over all groups.
    """
    groups: list[Group] = []
    real, synthetic = [0] * len(pairs), [0] * len(pairs)
    count = 0
    for places in by_prompt(pairs):
        numbers: dict[tuple[int, ...], int] = {}
        for place in places:
            real[place] = numbers.setdefault(tuple(pairs[place].real_ids), count + len(numbers))
            synthetic[place] = numbers.setdefault(tuple(pairs[place].synthetic_ids), count + len(numbers))
        groups.append(Group(pairs[places[0]].prompt_ids, list(numbers)))
        count += len(numbers)
    return groups, real, synthetic

"""What stages hand on: a player's answers and scores, an iteration's pairs, an evaluation; and what is made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spinlm.data.pairs import Pair
from spinlm.data.prepare import TokenizedExample
from spinlm.evaluation.measures import (
    HeldOutExample,
    SampledAnswer,
    repetition,
)
from spinlm.evaluation.verifiers import correct
from spinlm.files import digest
from spinlm.generation.engine import Response
from spinlm.players.models import Player


@dataclass(frozen=True)
class Answers:
    """For each example, a player's responses to its prompt; named by the hash of the shards they are kept in."""

    responses: list[list[Response]]
    hash: str

    def __getitem__(self, place: int) -> list[Response]:
        return self.responses[place]

    def __len__(self) -> int:
        return len(self.responses)


@dataclass(frozen=True)
class ScoredPairs:
    """An iteration's pairs that differ, how many don't, and a name for them all."""

    pairs: list[Pair]
    identical: int
    hash: str


@dataclass(frozen=True)
class Scores:
    """A player's log-probs: of each example's real response, and by source of its other responses.

    A synthetic response equal to the real one has its log-prob.
    """

    real: list[float]
    others: dict[str, list[list[float]]]
    hash: str


@dataclass(frozen=True)
class Evaluation:
    """A player on the held-out part."""

    player: Player
    sampled: Answers
    greedy: Answers | None
    scores: Scores
    examples: list[HeldOutExample]
    measures: dict[str, dict[str, Any]]


def mixture_weights(mixture: list[float] | str | None, iteration: int) -> dict[int, float]:
    """The weight of each iteration's opponent in an iteration's reference, its own the first; they sum to 1.

    Args:
        mixture: The recipe's `training.mixture`.
        iteration: Opponents 0 to this one have played.
    """
    if mixture is None:
        return {iteration: 1.0}
    opponents = range(iteration, -1, -1)
    given = [1.0] * len(opponents) if isinstance(mixture, str) else mixture
    weights = {t: weight for t, weight in zip(opponents, given, strict=False) if weight > 0}
    return {t: weight / sum(weights.values()) for t, weight in weights.items()}


def mixed(parts: Sequence[Scores], weights: Sequence[float]) -> Scores:
    """Log-probs under the geometric mixture of some players, up to its normaliser, which a pair's margin doesn't see.

    The weighted sum of their log-probs (alpha-SPIN, arXiv 2404.04291).
    """
    if len(parts) == 1:
        return parts[0]

    def mix(values: Iterable[float]) -> float:
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    real = [mix(values) for values in zip(*(part.real for part in parts), strict=True)]
    others = {
        source: [
            [mix(values) for values in zip(*rows, strict=True)]
            for rows in zip(*(part.others[source] for part in parts), strict=True)
        ]
        for source in parts[0].others
    }
    return Scores(real, others, digest([[part.hash for part in parts], list(weights)]))


def regenerated(pair: Pair, response: Response, number: int) -> Pair:
    """A pair with a new synthetic response, that of a round of regeneration, which nobody has scored yet."""
    return replace(
        pair,
        id=f"{pair.id}, round {number}",
        synthetic_ids=response.token_ids,
        synthetic_truncated=response.finish_reason == "length",
        opponent_real_logprob=math.nan,
        opponent_synthetic_logprob=math.nan,
        reference_real_logprob=None,
        reference_synthetic_logprob=None,
    )


def held_out_margins(
    examples: Sequence[TokenizedExample], opponent: Evaluation, scores: Scores, beta: float, length_normalised: bool
) -> list[list[float]]:
    """A main player's held-out margins of each real response against those fresh ones of its opponent that differ."""
    margins = []
    for place, example in enumerate(examples):
        real = (scores.real[place] - opponent.scores.real[place]) / _divisor(example.real_ids, length_normalised)
        responses = opponent.sampled[place]
        logprobs = zip(scores.others["opponent"][place], opponent.scores.others["own"][place], strict=True)
        margins.append(
            [
                beta * (real - (mine - theirs) / _divisor(response.token_ids, length_normalised))
                for response, (mine, theirs) in zip(responses, logprobs, strict=True)
                if response.token_ids != example.real_ids
            ]
        )
    return margins


def _divisor(ids: Sequence[int], length_normalised: bool) -> int:
    return len(ids) if length_normalised else 1


def held_out_examples(
    examples: Sequence[TokenizedExample],
    sampled: Answers,
    greedy: Answers | None,
    scores: Scores,
    start_scores: Scores | None = None,
    margins: Sequence[list[float]] | None = None,
) -> list[HeldOutExample]:
    """What a player makes of each held-out example.

    Args:
        examples: The held-out part.
        sampled: The player's sampled responses, any number for each.
        greedy: Its greedy ones.
        scores: Its log-probs of the real responses and, as `own`, of the sampled ones.
        start_scores: The starting player's.
        margins: For each example, see HeldOutExample.
    """
    rows = []
    for place, example in enumerate(examples):
        verifier = example.verifier
        own = scores.others["own"][place]
        start = [None] * len(own) if start_scores is None else start_scores.others["own"][place]
        rows.append(
            HeldOutExample(
                id=example.id,
                real_logprob=scores.real[place],
                real_tokens=len(example.real_ids),
                sampled=[
                    SampledAnswer(
                        tokens=len(response.token_ids),
                        truncated=response.finish_reason == "length",
                        repetition=repetition(response.token_ids),
                        logprob=logprob,
                        start_logprob=start_logprob,
                        correct=None if verifier is None else correct(response.text, verifier),
                    )
                    for response, logprob, start_logprob in zip(sampled[place], own, start, strict=True)
                ],
                greedy_correct=None if verifier is None or greedy is None else correct(greedy[place][0].text, verifier),
                margins=[] if margins is None else margins[place],
            )
        )
    return rows

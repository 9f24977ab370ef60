"""Mixtures of opponents, by numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from spinlm.data.pairs import Pair
from spinlm.generation.engine import Response
from spinlm.results import Scores, mixed, mixture_weights, regenerated


@pytest.mark.parametrize(
    ("mixture", "iteration", "expected"),
    [
        (None, 3, {3: 1.0}),
        ("uniform", 0, {0: 1.0}),
        ("uniform", 3, {3: 0.25, 2: 0.25, 1: 0.25, 0: 0.25}),
        ([1.0], 2, {2: 1.0}),
        ([3.0, 1.0], 0, {0: 1.0}),  # nobody has played before
        ([3.0, 1.0], 2, {2: 0.75, 1: 0.25}),
        ([2.0, 0.0, 2.0], 2, {2: 0.5, 0: 0.5}),
        ([2.0, 0.0, 2.0], 1, {1: 1.0}),
    ],
)
def test_weights_by_hand(mixture: Any, iteration: int, expected: dict[int, float]) -> None:
    found = mixture_weights(mixture, iteration)
    assert found == expected
    assert next(iter(found)) == iteration, "this iteration's own opponent first"


def test_a_mixture_of_log_probs_by_hand() -> None:
    one = Scores([-1.0, -2.0], {"1": [[-3.0, -4.0], [-5.0, -6.0]]}, "a")
    other = Scores([-5.0, -6.0], {"1": [[-7.0, -8.0], [-1.0, -2.0]]}, "b")
    found = mixed([one, other], [0.75, 0.25])
    assert found.real == [-2.0, -3.0]
    assert found.others == {"1": [[-4.0, -5.0], [-4.0, -5.0]]}
    assert len({found.hash, mixed([one, other], [0.5, 0.5]).hash, mixed([other, one], [0.75, 0.25]).hash}) == 3


def test_the_opponent_alone_is_no_mixture() -> None:
    scores = Scores([-1.0], {}, "a")
    assert mixed([scores], [1.0]) is scores


def test_a_regenerated_pair_is_to_be_scored_anew() -> None:
    pair = Pair([1], [2], [3], -1.0, -2.0, True, -0.5, -0.25, [4], "7")
    found = regenerated(pair, Response([5, 6], "x", "stop", -3.0), 3)
    assert found.id == "7, round 3"
    assert (found.prompt_ids, found.real_ids, found.synthetic_ids, found.initial_ids) == ([1], [2], [5, 6], [4])
    assert math.isnan(found.opponent_real_logprob) and math.isnan(found.opponent_synthetic_logprob)
    assert found.reference_real_logprob is found.reference_synthetic_logprob is None
    assert not found.synthetic_truncated

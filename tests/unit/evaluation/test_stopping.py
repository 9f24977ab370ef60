"""When to stop, in worlds of a few prompts."""

from __future__ import annotations

import pytest

from spinlm.config import StopSection
from spinlm.evaluation.measures import HeldOutExample
from spinlm.evaluation.stopping import iterations_without_gain, reason_to_stop


def _player(*nlls: float, margins: float = 1.0) -> list[HeldOutExample]:
    """A player by its negative log-likelihood of each held-out response of one token."""
    return [HeldOutExample(str(i), -nll, 1, [], margins=[margins]) for i, nll in enumerate(nlls)]


START = _player(5.0, 3.0, 4.0, 2.0, 5.0, 3.0, 4.0, 2.0)
BETTER = _player(4.0, 2.5, 3.0, 1.5, 4.0, 2.5, 3.0, 1.5)  # on every prompt
NOISY = _player(3.0, 4.0, 3.0, 1.0, 3.0, 4.0, 3.0, 1.0)  # better by as much on average, but not on all
A_LITTLE = _player(*(nll - 0.1 for nll in (5.0, 3.0, 4.0, 2.0, 5.0, 3.0, 4.0, 2.0)))
A_LITTLE_MORE = _player(*(nll - 0.2 for nll in (5.0, 3.0, 4.0, 2.0, 5.0, 3.0, 4.0, 2.0)))


@pytest.mark.parametrize(
    ("lineage", "expected"),
    [
        ([START], 0),
        ([START, BETTER], 0),
        ([START, NOISY], 1),
        ([START, NOISY, NOISY], 2),
        ([START, BETTER, BETTER], 1),
        ([START, BETTER, START, NOISY], 2),  # worse than the best, though NOISY is on average better than START
        ([START, START, BETTER], 0),
        ([START, A_LITTLE, A_LITTLE_MORE], 0),
    ],
)
def test_iterations_without_gain(lineage: list[list[HeldOutExample]], expected: int) -> None:
    assert iterations_without_gain(lineage, "real_nll") == expected


def test_nothing_is_asked_for_by_default() -> None:
    assert not StopSection().is_asked_for
    assert reason_to_stop(StopSection(), [START, START, START, START], "real_nll") is None


def test_patience() -> None:
    section = StopSection(patience=2)
    assert section.is_asked_for
    assert reason_to_stop(section, [START, START], "real_nll") is None
    reason = reason_to_stop(section, [START, START, START], "real_nll")
    assert reason == "real_nll hasn't improved beyond noise for 2 iterations (stop.patience: 2)"


@pytest.mark.parametrize(("margins", "stops"), [(1.0, False), (-1.0, True)])
def test_an_opponent_that_is_not_told_from_people(margins: float, stops: bool) -> None:
    section = StopSection(min_discriminability=0.55)
    lineage = [START, _player(4.0, 2.5, 3.0, 1.5, 4.0, 2.5, 3.0, 1.5, margins=margins)]
    reason = reason_to_stop(section, lineage, "real_nll")
    assert (reason is not None) is stops
    assert reason is None or "on only 0% of the held-out pairs (stop.min_discriminability: 0.55)" in reason

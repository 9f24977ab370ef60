"""When there should be no further iteration."""

from __future__ import annotations

from collections.abc import Sequence

from spinlm.config import StopSection
from spinlm.evaluation.measures import HeldOutExample, difference, is_better, measure


def reason_to_stop(section: StopSection, lineage: Sequence[Sequence[HeldOutExample]], name: str) -> str | None:
    """Why to stop now, in plain words; None to go on.

    Args:
        section: When to stop.
        lineage: The starting player's examples, then those of each iteration's main player.
        name: The measure that patience looks at.
    """
    least = section.min_discriminability
    if least is not None and (found := _discriminability(lineage[-1])) < least:
        return (
            f"the main player tells its opponent from people on only {found:.0%} of the held-out pairs "
            f"(stop.min_discriminability: {least})"
        )
    since = iterations_without_gain(lineage, name)
    if section.patience is not None and since >= section.patience:
        return f"{name} hasn't improved beyond noise for {since} iterations (stop.patience: {section.patience})"
    return None


def _discriminability(player: Sequence[HeldOutExample]) -> float:
    """A coin's, where all of the opponent's responses are the real ones."""
    found = measure(player).get("discriminability")
    return 0.5 if found is None else found.value


def iterations_without_gain(lineage: Sequence[Sequence[HeldOutExample]], name: str) -> int:
    """How many of the last players aren't better, beyond noise, than the last that was better than those before it.

    Small gains add up: each player is compared with that one, not with its predecessor.
    """
    standard = 0
    for number in range(1, len(lineage)):
        if is_better(difference(lineage[number], lineage[standard], name), name):
            standard = number
    return len(lineage) - 1 - standard

"""What each iteration's diagnostics say, and why a loop ended early: read from the run directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spinlm.config import Recipe
from spinlm.evaluation.diagnostics import Warned
from spinlm.rundir import STOPPED, RunDir


@dataclass(frozen=True)
class Diagnostics:
    """An iteration's: its numbers, and the warnings they give rise to."""

    values: Mapping[str, float]
    warnings: Sequence[Warned]


@dataclass(frozen=True)
class Stopped:
    """After how many iterations the loop ended, where that wasn't the recipe's last, and why."""

    iterations: int
    reason: str


def diagnostics(run: RunDir, recipe: Recipe) -> dict[str, Diagnostics]:
    """Of each iteration that has them, by its main player's name."""
    found = {}
    for t in range(recipe.iterations):
        key = f"iterations/{t}/diagnostics.json"
        if run.has_record(key):
            content = run.committed_json(key)
            warnings = [Warned(**warning) for warning in content["warnings"]]
            found[f"iteration-{t}"] = Diagnostics(content["values"], warnings)
    return found


def stopped(run: RunDir) -> Stopped | None:
    """Why the loop ended early; None where it didn't."""
    return Stopped(**run.committed_json(STOPPED)) if run.has_record(STOPPED) else None

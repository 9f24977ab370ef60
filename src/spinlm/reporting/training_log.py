"""What the trainings of a run logged; of one that is under way, what its last checkpoint knows."""

from __future__ import annotations

import json
from contextlib import suppress
from hashlib import sha256
from typing import Any

from spinlm.config import Recipe
from spinlm.files import read_json, unsealed
from spinlm.reporting.summary import is_iteration
from spinlm.rundir import RunDir

_STATE = "trainer_state.json"

Row = dict[str, Any]
"""What one logging step logged, `step` among it."""


def trained_players(recipe: Recipe) -> list[str]:
    """Everybody who is trained in a run, in the order of play."""
    names = ["sft"] if recipe.sft is not None else []
    names += [f"iteration-{t}" for t in range(recipe.iterations)]
    return [*names, *(["control"] if recipe.evaluation.control else [])]


def folder_of(player: str) -> str:
    """Where a player's training is kept."""
    return f"iterations/{player.removeprefix('iteration-')}" if is_iteration(player) else player


def weights_hash(run: RunDir, player: str) -> str | None:
    """Of the weights that a run has under a player's name; None for the base, and for who isn't trained here."""
    keys = [f"{folder_of(player)}/{kind}" for kind in ("adapter", "model")]
    return next((run.hash(key) for key in keys if run.has_record(key)), None)


def committed_log(run: RunDir, player: str) -> list[Row]:
    """A player's training, where it is committed; else nothing."""
    key = f"{folder_of(player)}/training.jsonl"
    return run.committed_rows(key) if run.has_record(key) else []


def log_so_far(run: RunDir, player: str) -> list[Row]:
    """A player's training, or as much of it as the last whole checkpoint of one under way holds."""
    return committed_log(run, player) or _checkpointed(run, folder_of(player))


def _checkpointed(run: RunDir, folder: str) -> list[Row]:
    """The mark beside a checkpoint is written when the checkpoint is whole; it may be removed while we read."""
    marks = run.checkpoints(folder).glob("*/checkpoint-*.json")
    for mark in sorted(marks, key=lambda path: int(path.stem.removeprefix("checkpoint-")), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):
            state = (mark.with_suffix("") / _STATE).read_bytes()
            if sha256(state).hexdigest() == unsealed(read_json(mark))[_STATE]:
                return list(json.loads(state)["log_history"])
    return []

"""What is done, what is left, how long it took: read from the run directory alone."""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass

from spinlm.config import Recipe
from spinlm.rundir import STOPPED, RunDir, read_json, read_jsonl


@dataclass(frozen=True)
class StageStatus:
    """One stage of a run.

    Attributes:
        name: `iteration 0: generate`, …
        done: How much of it is committed.
        total: How much there is; 0 while that isn't known yet.
        seconds: Spent on it so far.
    """

    name: str
    done: int
    total: int
    seconds: float

    @property
    def state(self) -> str:
        if self.total and self.done >= self.total:
            return "done"
        return f"{self.done} of {self.total}" if self.total and self.done else "to do"


def status(run: RunDir) -> list[StageStatus]:
    """Every stage of a run, in order.

    Raises:
        UserError: There is no run, or its records can't be read.
    """
    recipe = run.recipe()
    keys = {record["key"] for record in run.records()}
    seconds = _seconds(run)
    train_shards = held_out_shards = 0
    if "data" in keys:
        train_shards, held_out_shards = (_shards(run, part, recipe) for part in ("train", "held_out"))
    weights = "adapter" if recipe.adapter is not None else "model"
    stages = [StageStatus("data", int("data" in keys), 1, seconds["data"])]

    def add(name: str, folder: str, total: int) -> None:
        done = sum(key.startswith(f"{folder}/") for key in keys)
        stages.append(StageStatus(name, done, total, seconds[folder]))

    def add_training(name: str, folder: str) -> None:
        stages.append(StageStatus(name, int(f"{folder}/{weights}" in keys), 1, seconds[folder]))

    def add_evaluation(player: str) -> None:
        folder = f"evaluation/{player}"
        spent = sum(value for what, value in seconds.items() if what.startswith(f"{folder}/"))
        stages.append(StageStatus(f"evaluate {player}", int(f"{folder}/measures.json" in keys), 1, spent))

    if recipe.sft is not None:
        add_training("sft", "sft")
    if held_out_shards or "data" not in keys:
        add_evaluation("base")
        if recipe.sft is not None:
            add_evaluation("sft")
    for t in range(iterations_to_play(run, recipe)):
        add(f"iteration {t}: generate", f"iterations/{t}/synthetic", train_shards)
        add(f"iteration {t}: score", f"iterations/{t}/opponent_logprobs", train_shards)
        add_training(f"iteration {t}: train", f"iterations/{t}")
        if held_out_shards or "data" not in keys:
            add_evaluation(f"iteration-{t}")
    if recipe.evaluation.control:
        add_training("control", "control")
        add_evaluation("control")
    return stages


def iterations_to_play(run: RunDir, recipe: Recipe) -> int:
    """The recipe's; of a run that stopped, as many as were played."""
    if not run.has_record(STOPPED):
        return recipe.iterations
    kind = "adapter" if recipe.adapter is not None else "model"
    trained = [t for t in range(recipe.iterations) if run.has_record(f"iterations/{t}/{kind}")]
    return max(int(read_json(run.path / STOPPED)["iterations"]), len(trained))


def _shards(run: RunDir, part: str, recipe: Recipe) -> int:
    examples = len(read_jsonl(run.path / "data" / f"{part}.jsonl"))
    if part == "train" and recipe.generation.max_prompts is not None:
        examples = min(examples, recipe.generation.max_prompts)
    return -(-examples // recipe.generation.shard_size)


def _seconds(run: RunDir) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    path = run.path / "timings.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):  # a line that was cut short by a crash
            row = json.loads(line)
            seconds[row["what"]] += row["seconds"]
    return seconds

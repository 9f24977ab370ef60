"""What is done, what is left, how long it took: read from the run directory alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from spinlm.config import Recipe
from spinlm.files import read_log
from spinlm.rundir import STOPPED, TIMINGS, RunDir


@dataclass(frozen=True)
class StageStatus:
    """One stage of a run.

    Attributes:
        name: `iteration 0: generate`, …
        done: How much of it is committed.
        total: How much there is; 0 while that isn't known yet.
        seconds: Spent on it so far.
        tokens: Generated, scored or trained on so far; 0 where they aren't counted.
    """

    name: str
    done: int
    total: int
    seconds: float
    tokens: int = 0

    @property
    def is_done(self) -> bool:
        return self.total > 0 and self.done >= self.total

    @property
    def state(self) -> str:
        if self.is_done:
            return "done"
        return f"{self.done} of {self.total}" if self.total and self.done else "to do"


def status(run: RunDir) -> list[StageStatus]:
    """Every stage of a run, in order.

    Raises:
        UserError: There is no run, or its records can't be read.
    """
    recipe = run.recipe()
    keys = {record["key"] for record in run.records()}
    seconds, tokens = _spent(run)
    train_shards = held_out_shards = 0
    if "data" in keys:
        train_shards, held_out_shards = (_shards(run, part, recipe) for part in ("train", "held_out"))
    stages = [StageStatus("data", int("data" in keys), 1, seconds["data"])]

    def add(name: str, folder: str, total: int) -> None:
        done = sum(key.startswith(f"{folder}/") for key in keys)
        stages.append(StageStatus(name, done, total, seconds[folder], tokens[folder]))

    def add_training(name: str, folder: str) -> None:
        done, log = int(f"{folder}/{recipe.weights}" in keys), f"{folder}/training.jsonl"
        trained_on = sum(row.get("tokens", 0) for row in run.committed_rows(log)) if log in keys else 0
        stages.append(StageStatus(name, done, 1, seconds[folder], int(trained_on)))

    def add_evaluation(player: str) -> None:
        folder = f"evaluation/{player}"
        spent = sum(value for what, value in seconds.items() if what.startswith(f"{folder}/"))
        read = sum(value for what, value in tokens.items() if what.startswith(f"{folder}/"))
        stages.append(StageStatus(f"evaluate {player}", int(f"{folder}/measures.json" in keys), 1, spent, read))

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


def besides(run: RunDir) -> list[StageStatus]:
    """What took time besides the recipe's stages: each benchmark, and the answers that judges are given.

    There is as much of it as was asked for, so none of it is left.
    """
    seconds, tokens = _spent(run)
    stages = []
    for name in dict.fromkeys(what.split("/")[1] for what in seconds if what.startswith("benchmarks/")):
        spent, read = (
            sum(value for what, value in of.items() if what.startswith(f"benchmarks/{name}/"))
            for of in (seconds, tokens)
        )
        title = "answers for judges" if name == "answers" else f"benchmark {name}"
        stages.append(StageStatus(title, 1, 1, float(spent), int(read)))
    return stages


def iterations_to_play(run: RunDir, recipe: Recipe) -> int:
    """The recipe's; of a run that stopped, as many as were played."""
    if not run.has_record(STOPPED):
        return recipe.iterations
    trained = [t for t in range(recipe.iterations) if run.has_record(f"iterations/{t}/{recipe.weights}")]
    return max(int(run.committed_json(STOPPED)["iterations"]), len(trained))


def _shards(run: RunDir, part: str, recipe: Recipe) -> int:
    examples = run.committed("data", f"{part}.jsonl").count(b"\n")
    if part == "train" and recipe.generation.max_prompts is not None:
        examples = min(examples, recipe.generation.max_prompts)
    return -(-examples // recipe.generation.shard_size)


def _spent(run: RunDir) -> tuple[Mapping[str, float], Mapping[str, int]]:
    """Seconds and tokens by what they were spent on."""
    seconds: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)
    for row in read_log(run.path / TIMINGS):
        with suppress(KeyError, TypeError, ValueError, OverflowError):  # a row that no run has written
            what, spent, read = str(row["what"]), float(row["seconds"]), int(row.get("tokens", 0))
            seconds[what] += spent
            tokens[what] += read
    return seconds, tokens

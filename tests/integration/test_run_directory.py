"""Who holds a run directory, which recipe it belongs to, and what another run may take over from it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from integration.command import Waiting, contents, differing, flip_a_byte, refused, rows, spinlm, succeeded, waiting_at
from spinlm.rundir import RunDir

RUN = ("run", "recipe.yaml", "evaluation.control=true")


@pytest.fixture
def first(place: Path) -> Iterator[Waiting]:
    waiting = waiting_at("iterations/0/synthetic/00001", RUN, place)
    yield waiting
    waiting.kill()


def test_one_process_at_a_time(place: Path, finished: Path, first: Waiting) -> None:
    before = contents(place / "runs/recipe", without=())
    holder = re.fullmatch(r"pid (\d+) on .+\n", str((place / "runs/recipe/lock").read_text()))
    assert holder is not None
    refused(spinlm(*RUN, cwd=place), "runs/recipe", f"pid {holder[1]}", "another process")
    refused(spinlm("generate", *RUN[1:], cwd=place), f"pid {holder[1]}")
    assert contents(place / "runs/recipe", without=()) == before
    assert "1 of 3" in succeeded(spinlm("status", "runs/recipe", cwd=place)).out

    succeeded(first.go_on())
    assert differing(finished / "runs/recipe", place / "runs/recipe") == []


def test_a_killed_process_holds_nothing(place: Path, first: Waiting) -> None:
    first.kill()
    succeeded(spinlm("generate", *RUN[1:], "--iteration", "0", cwd=place))


def test_a_changed_recipe_is_refused(copied: Path) -> None:
    before = contents(copied / "runs/recipe", without=())
    changes = ("training.beta=0.2", "seed=1", "training.weight_decay=0.1")
    message = refused(spinlm(*RUN, *changes, cwd=copied), "--fork")
    assert [line.strip() for line in message.splitlines() if "->" in line and line.startswith("  ")] == [
        "seed: 0 -> 1",
        "training.beta: 0.1 -> 0.2",
        "training.weight_decay: 0.0 -> 0.1",
    ]
    for stage in ("generate", "train", "evaluate"):
        refused(spinlm(stage, *RUN[1:], "training.beta=0.2", cwd=copied), "training.beta: 0.1 -> 0.2")
    assert contents(copied / "runs/recipe", without=()) == before


def test_a_directory_of_something_else_is_refused(place: Path) -> None:
    (place / "runs/recipe").mkdir(parents=True)
    (place / "runs/recipe/thesis.tex").write_text("keep")
    refused(spinlm(*RUN, cwd=place), "runs/recipe", "holds files but no run")
    assert contents(place / "runs/recipe") == {"thesis.tex": b"keep"}


def _records(run: Path) -> dict[str, dict[str, Any]]:
    return {record["key"]: record for record in RunDir(run).records()}


def _same(one: Path, other: Path, part: Callable[[dict[str, Any]], Any]) -> set[str]:
    mine, theirs = _records(one), _records(other)
    return {key for key in mine.keys() & theirs.keys() if part(mine[key]) == part(theirs[key])}


def test_only_the_files_that_a_dataset_is_read_from_count(place: Path) -> None:
    """One of them has a name that is no text; the run is among what may come and go beside them."""
    dataset = place / "dataset"
    dataset.mkdir()
    (place / "data.jsonl").rename(dataset / os.fsdecode(b"rows-\xff.jsonl"))
    generate = ("generate", "recipe.yaml", "sft=null", "data.source=dataset", "run_dir=dataset/run", "--iteration", "0")
    succeeded(spinlm(*generate, cwd=place))
    succeeded(spinlm("report", "dataset/run", cwd=place))
    before = contents(dataset / "run")
    for name in (".DS_Store", "README.md", "older/rows.jsonl", ".rows.jsonl"):
        (dataset / name).parent.mkdir(exist_ok=True)
        (dataset / name).write_text("{}")
    succeeded(spinlm(*generate, cwd=place))
    succeeded(spinlm("report", "dataset/run", cwd=place))
    assert contents(dataset / "run") == before
    tiny.write_dataset(dataset / "more.jsonl")
    refused(spinlm(*generate, cwd=place), "was made from something else than what is there now (files)")


def test_a_fork_takes_over_what_still_holds(copied: Path) -> None:
    old, new = copied / "runs/recipe", copied / "runs/new"
    before = contents(old, without=())
    succeeded(spinlm(*RUN, "training.beta=0.2", "--fork", "runs/new", cwd=copied))
    assert contents(old, without=()) == before

    untouched_by_beta = (
        "layout.json",
        "data",
        "sft/",
        "iterations/0/synthetic/",
        "iterations/0/opponent_logprobs/",
        "control/",
    )
    untouched_by_beta += tuple(f"evaluation/{player}/" for player in ("base", "sft", "control"))
    expected = {key for key in _records(old) if key.startswith(untouched_by_beta)}
    assert _records(new).keys() == _records(old).keys()
    assert _same(old, new, lambda record: record["inputs"]) == expected
    assert expected <= _same(old, new, lambda record: record["hash"])
    for weights in ("iterations/0/adapter", "iterations/1/adapter"):
        assert _records(new)[weights]["hash"] != _records(old)[weights]["hash"]
    made = {row["what"] for row in rows(new / "timings.jsonl")}
    assert not [what for what in made if what.startswith(untouched_by_beta)]
    assert {"iterations/0", "iterations/1/synthetic", "evaluation/iteration-1/sampled"} <= made
    assert json.loads((new / "run.json").read_text())["forked_from"] == str(old)

    again = contents(new, without=())
    succeeded(spinlm("run", "recipe.yaml", *RUN[2:], "training.beta=0.2", "run_dir=runs/new", cwd=copied))
    assert contents(new, without=()) == again


def test_a_fork_is_what_a_new_run_would_be(copied: Path) -> None:
    damaged = "iterations/0/synthetic/00001.jsonl"
    flip_a_byte(copied / "runs/recipe" / damaged)
    said = succeeded(spinlm(*RUN, "training.replay=0", "--fork", "runs/fork", cwd=copied)).out
    assert said.count(f"runs/recipe/{damaged}: not what was committed there, so it isn't taken over") == 1
    succeeded(spinlm(*RUN, "training.replay=0", "run_dir=runs/anew", cwd=copied))
    assert differing(copied / "runs/fork", copied / "runs/anew") == ["report.md", "run.json"]


def test_a_fork_with_another_seed_takes_over_nothing_random(place: Path) -> None:
    """Not even where the data are the same whatever the seed, since nothing is held out."""
    arguments = ("run", "recipe.yaml", "data.held_out=0", "iterations=1")
    said = succeeded(spinlm(*arguments, cwd=place)).out
    assert "0 held out, so nothing will be measured (data.held_out)" in said
    succeeded(spinlm(*arguments, "seed=1", "--fork", "runs/new", cwd=place))
    old, new = place / "runs/recipe", place / "runs/new"
    assert "data" in _same(old, new, lambda record: record["hash"])
    players, names = ("base", "sft", "iteration-0"), ("examples.jsonl", "measures.json")
    not_random = {f"evaluation/{player}/{name}" for player in players for name in names}  # of nothing
    not_random.add("layout.json")
    assert _same(old, new, lambda record: record["hash"]) == {"data"} | not_random
    assert _same(old, new, lambda record: record["inputs"]) <= not_random


def test_a_fork_of_nothing(place: Path) -> None:
    refused(spinlm(*RUN, "--fork", "runs/new", cwd=place), "runs/recipe", "not a run directory")
    assert not (place / "runs").exists()

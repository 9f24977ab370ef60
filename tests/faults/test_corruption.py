"""Files of a run that are lost or changed: found, named, and made anew only when asked to; and never read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import spinlm as package
from integration.command import (
    contents,
    differing,
    flip_a_byte,
    forget,
    refused,
    spinlm,
    succeeded,
    write_recipe,
)
from spinlm.errors import UserError
from spinlm.rundir import CorruptArtifact

RUN = ("run", "recipe.yaml", "evaluation.control=true")

FILES = {
    "data/train.jsonl": "data",
    "data/held_out.jsonl": "data",
    "data/dropped.jsonl": "data",
    "layout.json": "data",
    "sft/adapter/adapter_config.json": "sft",
    "sft/training.jsonl": "sft",
    "iterations/0/synthetic/00001.jsonl": "generate",
    "iterations/1/opponent_logprobs/00002.jsonl": "score",
    "iterations/0/adapter/adapter_model.safetensors": "train",
    "iterations/1/training.jsonl": "train",
    "iterations/0/diagnostics.json": "evaluate",
    "evaluation/base/measures.json": "evaluate",
    "evaluation/base/logprobs/00000.jsonl": "evaluate",
    "evaluation/sft/greedy/00000.jsonl": "evaluate",
    "evaluation/iteration-0/sampled/00000.jsonl": "evaluate",
    "evaluation/iteration-0/examples.jsonl": "evaluate",
    "evaluation/iteration-1/start_logprobs/00000.jsonl": "evaluate",
    "control/adapter/adapter_model.safetensors": "control",
}
"""A file of each kind of artifact, and the stage that makes it."""

RECORDS = {
    "commits/data.json": "data",
    "commits/iterations--0--adapter.json": "train",
    "commits/iterations--1--synthetic--00000.jsonl.json": "generate",
}

CHANGEABLE = {name: stage for name, stage in (FILES | RECORDS).items() if name != "data/dropped.jsonl"}
"""Those that have a byte to change: nothing was dropped."""


def cut_to_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def cut_to_nothing(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: tuple[Callable[[Path], None], ...] = (flip_a_byte, cut_to_half, cut_to_nothing)

EACH = [(name, DAMAGES[number % len(DAMAGES)]) for number, name in enumerate(CHANGEABLE)]
"""Each file with a damage."""

OTHERS = [pair for pair in product(CHANGEABLE, DAMAGES) if pair not in EACH]
"""Each with the other damages."""


@pytest.mark.parametrize(("name", "damage"), [*EACH, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)])
def test_a_changed_byte_or_a_write_cut_short_is_found(copied: Path, name: str, damage: Callable[[Path], None]) -> None:
    run = copied / "runs/recipe"
    damage(run / name)
    before = contents(run, without=())
    refused(spinlm(*RUN, cwd=copied), name, f"The stage {CHANGEABLE[name]!r} makes it anew", "--repair")
    assert contents(run, without=()) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_so_it_is_in_the_header(copied: Path, finished: Path, damage: Callable[[Path], None]) -> None:
    """Whatever reads it; and the recipe that is given makes it anew, where that is wanted."""
    header = copied / "runs/recipe/run.json"
    damage(header)
    before = contents(copied / "runs/recipe", without=())
    for arguments in (RUN, ("status", "runs/recipe"), ("report", "runs/recipe"), ("export", "runs/recipe", "out")):
        refused(spinlm(*arguments, cwd=copied), "runs/recipe/run.json: not what was written", "--repair")
    refused(spinlm("evaluate", "runs/recipe", cwd=copied), "runs/recipe/run.json: not what was written")
    assert contents(copied / "runs/recipe", without=()) == before
    out = succeeded(spinlm(*RUN, "--repair", cwd=copied)).out
    assert "run.json: not what was committed, so it is made anew" in out
    assert differing(finished / "runs/recipe", copied / "runs/recipe") == []


def test_a_number_that_is_still_one_is_no_less_found(copied: Path) -> None:
    """In a file that can be read, and says something else."""
    header = copied / "runs/recipe/run.json"
    header.write_text(header.read_text().replace('"seed": 0', '"seed": 1'))
    refused(spinlm("report", "runs/recipe", cwd=copied), "runs/recipe/run.json: not what was written")
    refused(spinlm(*RUN, "seed=1", cwd=copied), "runs/recipe/run.json: not what was written")


def test_nothing_of_it_is_read_from_python(copied: Path) -> None:
    run = package.Run(copied / "runs/recipe")
    measures = run.path / "evaluation/iteration-1/measures.json"
    measures.write_text(json.dumps(json.loads(measures.read_text())))
    cut_to_half(run.path / "iterations/1/adapter/adapter_model.safetensors")
    with pytest.raises(CorruptArtifact, match=r"evaluation/iteration-1/measures\.json: not what was committed"):
        _ = run.measures
    with pytest.raises(CorruptArtifact, match=r"adapter_model\.safetensors: not what was committed"):
        _ = run.latest
    with pytest.raises(CorruptArtifact, match=r"measures\.json: not what was committed"):
        _ = run.evaluations
    (run.path / "best").unlink()
    (run.path / "best").symlink_to(copied / "model")
    with pytest.raises(UserError, match="best: leads out of the run"):
        _ = run.best


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (
            {"training": {"mixture": "uniform"}, "stop": {"patience": 2}, "iterations": 3},
            ("iterations/1/mixture/0/00001.jsonl", "stopped.json"),
        ),
        (
            {"keep": "best", "iterations": 1},
            ("iterations/0/kept.json",),
        ),
    ],
)
def test_so_it_is_in_what_other_recipes_make(place: Path, changes: dict[str, Any], names: tuple[str, ...]) -> None:
    write_recipe(place / "recipe.yaml", {"sft": None, **changes})
    succeeded(spinlm("run", "recipe.yaml", cwd=place))
    run = place / "runs/recipe"
    as_it_was = contents(run)
    for name, damage in product(names, DAMAGES):
        damage(run / name)
        refused(spinlm("run", "recipe.yaml", cwd=place), name, "--repair")
        succeeded(spinlm("run", "recipe.yaml", "--repair", cwd=place))
        assert contents(run) == as_it_was


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(copied: Path, name: str) -> None:
    run = copied / "runs/recipe"
    (run / name).unlink()
    before = contents(run, without=())
    refused(spinlm(*RUN, cwd=copied), name, "missing", f"The stage {FILES[name]!r} makes it anew", "--repair")
    assert contents(run, without=()) == before


def test_a_missing_directory_is_found(copied: Path) -> None:
    shutil.rmtree(copied / "runs/recipe/iterations/0/adapter")
    refused(spinlm(*RUN, cwd=copied), "iterations/0/adapter: missing", "'train'", "--repair")


def test_a_file_too_many_is_found(copied: Path) -> None:
    (copied / "runs/recipe/data/more.jsonl").write_text("{}\n")
    refused(spinlm(*RUN, cwd=copied), "data/more.jsonl", "'data'", "--repair")


def test_repair_makes_all_of_it_anew(copied: Path, finished: Path) -> None:
    run = copied / "runs/recipe"
    for number, name in enumerate(FILES):
        if number % 2 or name not in CHANGEABLE:
            (run / name).unlink()
        else:
            flip_a_byte(run / name)
    for name in RECORDS:
        flip_a_byte(run / name)
    outcome = succeeded(spinlm(*RUN, "--repair", cwd=copied))
    for key in ("data", "sft/adapter", "iterations/0/synthetic/00001.jsonl", "iterations/0/adapter"):
        assert f"{key}: not what was committed, so it is made anew" in outcome.out
    assert "iterations/1/synthetic/00001.jsonl" not in outcome.out
    assert differing(finished / "runs/recipe", run) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES | RECORDS)
def test_repair_makes_one_anew_and_nothing_else(copied: Path, finished: Path, name: str) -> None:
    run = copied / "runs/recipe"
    (run / name).unlink()
    out = succeeded(spinlm(*RUN, "--repair", cwd=copied)).out
    assert out.count("not what was committed") == (name in FILES)
    assert differing(finished / "runs/recipe", run) == []


def test_an_artifact_without_record_was_interrupted(copied: Path, finished: Path) -> None:
    run = copied / "runs/recipe"
    for name in RECORDS:
        (run / name).unlink()
    flip_a_byte(run / "iterations/0/adapter/adapter_model.safetensors")
    succeeded(spinlm(*RUN, cwd=copied))
    assert differing(finished / "runs/recipe", run) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"recipe": {}}', "\udcff"])
def test_an_unreadable_header(copied: Path, content: str) -> None:
    run = copied / "runs/recipe"
    (run / "run.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    before = contents(run, without=())
    for arguments in (RUN, ("status", "runs/recipe"), ("export", "runs/recipe", "out")):
        refused(spinlm(*arguments, cwd=copied), "run.json")
    assert contents(run, without=()) == before


def test_links_and_report_are_made_anew_without_asking(copied: Path, finished: Path) -> None:
    run = copied / "runs/recipe"
    (run / "report.md").write_text("something else")
    (run / "best").unlink()
    (run / "latest").unlink()
    (run / "latest").symlink_to("nowhere")
    refused(spinlm("export", "runs/recipe", "out", cwd=copied), "best")
    succeeded(spinlm(*RUN, cwd=copied))
    assert differing(finished / "runs/recipe", run) == []


def test_evaluation_alone_is_made_anew_from_what_is_there(copied: Path, finished: Path) -> None:
    run = copied / "runs/recipe"
    forget(run, "evaluation/iteration-1")
    succeeded(spinlm("evaluate", *RUN[1:], cwd=copied))
    assert differing(finished / "runs/recipe", run) == []


def test_evaluation_alone_stops_before_an_iteration_that_is_gone(copied: Path) -> None:
    run = copied / "runs/recipe"
    forget(run, "iterations/0/adapter")
    before = (run / "evaluation/iteration-1/measures.json").read_bytes()
    refused(spinlm("evaluate", *RUN[1:], cwd=copied), "no iteration is trained yet")
    assert (run / "evaluation/iteration-1/measures.json").read_bytes() == before


def test_another_model_or_dataset_under_the_same_name_replaces_nothing(copied: Path) -> None:
    run = copied / "runs/recipe"
    for changed in (copied / "model/config.json", copied / "data.jsonl"):
        before, as_it_was = contents(run), changed.read_bytes()
        changed.write_bytes(as_it_was + b"\n")
        refused(spinlm(*RUN, cwd=copied), "was made from something else", "--fork NEW_RUN", "--repair")
        assert contents(run) == before
        changed.write_bytes(as_it_was)
    succeeded(spinlm(*RUN, cwd=copied))


def test_what_a_fork_cannot_measure_or_fit_is_refused_before_it_plays(copied: Path) -> None:
    for fork, override, words in (
        ("runs/measure", "evaluation.select_by=accuracy_sampled", "has no verifier"),
        ("runs/fit", "generation.max_new_tokens=500", "takes 128"),
    ):
        refused(spinlm(*RUN, override, "--fork", fork, cwd=copied), words)
        assert not (copied / fork / "iterations").exists()

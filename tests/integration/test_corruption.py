"""Files of a run that are lost or changed: found, named, and made anew only when asked to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from integration.command import contents, differing, flip_a_byte, forget, refused, spinlm, succeeded

RUN = ("run", "recipe.yaml", "evaluation.control=true")

FILES = {
    "data/train.jsonl": "data",
    "data/dropped.jsonl": "data",
    "sft/adapter/adapter_config.json": "sft",
    "sft/training.jsonl": "sft",
    "iterations/0/synthetic/00001.jsonl": "generate",
    "iterations/1/opponent_logprobs/00002.jsonl": "score",
    "iterations/0/adapter/adapter_model.safetensors": "train",
    "iterations/1/training.jsonl": "train",
    "evaluation/base/measures.json": "evaluate",
    "evaluation/iteration-0/sampled/00000.jsonl": "evaluate",
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


@pytest.mark.parametrize("name", CHANGEABLE)
def test_a_changed_byte_is_found(copied: Path, name: str) -> None:
    run = copied / "runs/recipe"
    flip_a_byte(run / name)
    before = contents(run, without=())
    refused(spinlm(*RUN, cwd=copied), name, f"The stage {CHANGEABLE[name]!r} makes it anew", "--repair")
    assert contents(run, without=()) == before


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

"""The stages one by one, and what there is to see of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.command import Outcome, contents, differing, forget, refused, rows, spinlm, succeeded


def test_one_by_one_they_make_what_run_makes(place: Path, tmp_path: Path) -> None:
    def stage(*arguments: str) -> Outcome:
        return succeeded(spinlm(*arguments, "recipe.yaml", cwd=place))

    for _ in range(2):
        stage("generate")
        stage("train")
    stage("evaluate")
    succeeded(spinlm("run", "recipe.yaml", "run_dir=runs/at-once", cwd=place))
    assert differing(place / "runs/recipe", place / "runs/at-once") == ["report.md", "run.json"]
    one, other = ((place / "runs" / name / "report.md").read_text() for name in ("recipe", "at-once"))
    assert one.replace("# recipe", "# at-once") == other


def test_an_iteration_can_be_named(place: Path) -> None:
    succeeded(spinlm("generate", "recipe.yaml", "--iteration", "0", cwd=place))
    run = place / "runs/recipe"
    assert len(rows(run / "iterations/0/synthetic/00000.jsonl")) == 4
    assert not (run / "iterations/0/opponent_logprobs").exists()
    refused(spinlm("generate", "recipe.yaml", "--iteration", "2", cwd=place), "2", "0 to 1")


@pytest.mark.parametrize(
    ("stage", "options", "missing", "makes_it"),
    [
        ("train", (), ("data",), "data"),
        ("train", (), ("sft",), "sft"),
        ("train", ("--iteration", "1"), ("iterations/1/synthetic",), "generate"),
        ("train", ("--iteration", "1"), ("iterations/0/adapter",), "train"),
        ("generate", ("--iteration", "1"), ("iterations/0/adapter",), "train"),
        ("evaluate", (), ("sft",), "sft"),
        ("evaluate", (), ("iterations/0/adapter", "iterations/1/adapter"), "train"),
    ],
)
def test_a_stage_refuses_where_its_input_is_missing(
    copied: Path, stage: str, options: tuple[str, ...], missing: tuple[str, ...], makes_it: str
) -> None:
    forget(copied / "runs/recipe", *missing)
    before = contents(copied / "runs/recipe")
    message = refused(spinlm(stage, "recipe.yaml", "evaluation.control=true", *options, cwd=copied))
    assert f"the stage {makes_it!r}" in message or f"spinlm {makes_it}" in message
    assert contents(copied / "runs/recipe") == before


def test_status_of_a_finished_run(finished: Path) -> None:
    status = succeeded(spinlm("status", "runs/recipe", cwd=finished)).out
    assert "all done" in status
    assert "to do" not in status


def test_status_of_a_half_finished_run(half_finished: Path) -> None:
    lines = succeeded(spinlm("status", "runs/recipe", cwd=half_finished)).out.splitlines()
    states = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in lines if line.count("│") == 4}
    assert states["iteration 0: train"] == "done"
    assert states["iteration 1: generate"] == "1 of 3"
    assert states["iteration 1: score"] == "to do"
    assert states["control"] == "to do"
    assert "all done" not in "\n".join(lines)


@pytest.mark.parametrize("command", ["status", "report"])
def test_status_and_report_of_no_run(place: Path, command: str) -> None:
    refused(spinlm(command, "runs/recipe", cwd=place), "runs/recipe", "not a run directory")

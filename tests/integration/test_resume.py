"""A run that is killed and started again ends with the same bytes as one that is left alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from integration.command import (
    CHECKPOINTED,
    RECORDED,
    after,
    before,
    contents,
    differing,
    flip_a_byte,
    forget,
    killed_at,
    spinlm,
    succeeded,
)

RUN = ("run", "recipe.yaml", "evaluation.control=true")


def test_killed_in_every_stage(finished: Path, resumed: Path) -> None:
    assert differing(finished / "runs/recipe", resumed / "runs/recipe") == []


@pytest.mark.slow
def test_full_fine_tuning(finished_full: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(finished_full, place, ignore=shutil.ignore_patterns("runs"))
    killed_at(
        after(CHECKPOINTED, "checkpoints/sft/.*/checkpoint-2.json"),
        after(CHECKPOINTED, "checkpoints/iterations/0/.*/checkpoint-2.json"),
        before(RECORDED, "commits/iterations--0--model.json"),
        after(RECORDED, "commits/iterations--1--training.jsonl.json"),
        None,
        arguments=("run", "recipe.yaml"),
        cwd=place,
    )
    assert differing(finished_full / "runs/recipe", place / "runs/recipe") == []


@pytest.fixture(scope="module")
def in_training(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, killed in its last training when a checkpoint is written and the one before not yet removed."""
    place = tmp_path_factory.mktemp("in-training") / "place"
    shutil.copytree(finished, place, symlinks=True)
    forget(
        place / "runs/recipe",
        "iterations/1/training.jsonl",
        "iterations/1/adapter",
        "evaluation/iteration-1",
        "control",
    )
    killed_at(after(CHECKPOINTED, "iterations/1/.*/checkpoint-3.json"), arguments=RUN, cwd=place)
    return place


@pytest.mark.parametrize(
    "damaged", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "the mark", "every checkpoint"]
)
def test_goes_on_from_the_checkpoint_before_a_damaged_one(
    in_training: Path, finished: Path, tmp_path: Path, damaged: str
) -> None:
    place = tmp_path / "place"
    shutil.copytree(in_training, place, symlinks=True)
    (checkpoint,) = place.glob("runs/recipe/checkpoints/iterations/1/*/checkpoint-3")
    assert checkpoint.with_name("checkpoint-2").is_dir()
    if damaged == "the mark":
        checkpoint.with_name("checkpoint-3.json").write_text('{"adapter_mod')
    elif damaged == "every checkpoint":
        for file in checkpoint.parent.rglob("*.safetensors"):
            file.unlink()
    else:
        flip_a_byte(checkpoint / damaged)
    out = succeeded(spinlm(*RUN, cwd=place)).out
    assert ("iteration 1: train step 1/6" in out) == (damaged == "every checkpoint")
    assert "iteration 1: train step 3/6" in out
    assert "checkpoint-3: not what was written, so training goes on from before it" in out
    assert ("checkpoint-2: not what was written" in out) == (damaged == "every checkpoint")
    assert differing(finished / "runs/recipe", place / "runs/recipe") == []


def test_a_finished_run_holds_no_trace_of_interruptions(resumed: Path) -> None:
    assert not [name for name in contents(resumed / "runs/recipe") if name.startswith((".", "checkpoints"))]

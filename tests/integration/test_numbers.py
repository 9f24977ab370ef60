"""Numbers that aren't finite, through the real command."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.command import (
    CHECKPOINTED,
    TORCHRUN,
    after,
    differing,
    killed_at,
    refused,
    rows,
    spinlm,
    spinlm_process,
    succeeded,
    write_recipe,
)

RUN = ("run", "recipe.yaml")
FIRST, SECOND, THIRD = "data.jsonl:12", "data.jsonl:14", "data.jsonl:11"
"""The examples whose margins are below zero at steps 6, 9 and 12 of 12: exp(-beta * ...) overflows there."""


@pytest.fixture
def overflowing(place: Path) -> Path:
    training = {
        "loss": "exponential",
        "beta": 1e6,
        "learning_rate": 0.03,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
    }
    write_recipe(place / "recipe.yaml", {"iterations": 1, "sft": None, "training": training})
    return place


def test_an_overflow_stops_with_its_pair_and_the_last_good_checkpoint(overflowing: Path) -> None:
    message = refused(
        spinlm(*RUN, cwd=overflowing), "training stopped at step 6: the loss is inf; the last good checkpoint is runs"
    )
    assert f"/checkpoint-5; the pairs in question: {FIRST} (iteration 0, response 0). Lower learning_rate" in message
    assert not (overflowing / "runs/recipe/iterations/0/training.jsonl").exists()
    assert spinlm(*RUN, cwd=overflowing).err == message
    more = refused(
        spinlm(*RUN, "--fork", "runs/two", "training.skip_nonfinite=2", cwd=overflowing), "stopped at step 12"
    )
    assert "after 2 such steps were skipped; the last good checkpoint is runs/two/" in more and THIRD in more


def test_skipped_steps_are_told_counted_and_remembered(overflowing: Path) -> None:
    arguments = (*RUN, "training.skip_nonfinite=3")
    out = succeeded(spinlm(*arguments, cwd=overflowing)).out
    for number, step, example in ((1, 6, FIRST), (2, 9, SECOND), (3, 12, THIRD)):
        assert (
            f"iteration 0: train step {step} skipped ({number} of 3 that training.skip_nonfinite allows): the loss is "
            f"inf; the pairs in question: {example} (iteration 0, response 0)"
        ) in out
    assert "warning, iteration 0: Steps were skipped. 3 steps were skipped" in out
    run = overflowing / "runs/recipe"
    start, *logged = rows(run / "iterations/0/training.jsonl")
    assert start["start_loss"] == pytest.approx(1.0, abs=1e-5)
    assert [row["skipped_nonfinite"] for row in logged] == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert [row["step"] for row in logged if "loss" not in row] == [6, 9, 12]
    assert (
        "## Skipped steps\n\nTheir loss or gradient was NaN or infinite:\n\n- iteration-0: 3\n"
        in (run / "report.md").read_text()
    )
    counted = [row for row in rows(run / "metrics.jsonl") if row["metric"] == "skipped_nonfinite"]
    assert [row["value"] for row in counted if row["source"] == "diagnostics"] == [3]
    assert "Steps were skipped" in (run / "report.html").read_text()
    succeeded(spinlm("export", "runs/recipe", "out", cwd=overflowing))
    assert "3 steps were skipped" in (overflowing / "out/README.md").read_text()

    run.rename(overflowing / "runs/whole")
    place = after(CHECKPOINTED, "checkpoints/iterations/0/.*/checkpoint-8.json")
    killed_at(place, None, arguments=arguments, cwd=overflowing)
    assert differing(run, overflowing / "runs/whole") == []


@pytest.mark.slow
def test_two_processes_skip_the_same_steps(overflowing: Path) -> None:
    """The optimiser's batch is one pair in each process: one has the overflow, both skip."""
    changes = ("training.skip_nonfinite=6", "training.max_grad_norm=0.1")
    succeeded(spinlm(*RUN, *changes, "training.gradient_accumulation_steps=2", "run_dir=runs/one", cwd=overflowing))
    two = succeeded(spinlm_process(*RUN, *changes, "run_dir=runs/two", cwd=overflowing, launcher=TORCHRUN))
    one, other = (
        [row["skipped_nonfinite"] for row in rows(overflowing / f"runs/{name}/iterations/0/training.jsonl")[1:]]
        for name in ("one", "two")
    )
    assert one == other and one[-1] > 0
    assert two.out.count(" skipped (") == one[-1]
    stopped = spinlm_process(*RUN, "run_dir=runs/stopped", cwd=overflowing, launcher=TORCHRUN)
    assert (
        stopped.code != 0 and "training stopped at step" in stopped.err and "the pairs in question: data" in stopped.err
    )

"""SIGTERM and SIGINT end a run in order: nothing is lost, and it says how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from integration.command import (
    SHOWN,
    Outcome,
    Waiting,
    contents,
    differing,
    new_place,
    rows,
    spinlm,
    succeeded,
    waiting_at,
    write_recipe,
)
from spinlm.training.checkpoints import last_checkpoint

RUN = ("run", "recipe.yaml")

LOGGED_AT = {"save_steps": 3, "logging_steps": 3}
"""Iteration 1 takes 6 steps, and logs what 3 of them have in common."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Where the run has been left alone."""
    place = new_place(tmp_path_factory.mktemp("whole"), tiny_llama, {"training": LOGGED_AT, "sft": LOGGED_AT})
    succeeded(spinlm(*RUN, cwd=place))
    return place


@pytest.fixture
def here(place: Path) -> Path:
    write_recipe(place / "recipe.yaml", {"training": LOGGED_AT, "sft": LOGGED_AT})
    return place


def stopped(outcome: Outcome, code: int) -> str:
    """The last line of a run that ended in order."""
    assert outcome.code == code, f"{outcome.out}\n{outcome.err}"
    assert "Traceback" not in outcome.out + outcome.err
    return outcome.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_in_training_the_step_is_finished_and_saved(here: Path, whole: Path, number: int, code: int) -> None:
    waiting = waiting_at("iteration 1: train 3 6", RUN, here, call=SHOWN)
    os.kill(waiting.pid, number)
    outcome = waiting.go_on()
    name = signal.Signals(number).name
    assert f"spinlm: {name}: finishing the step and saving a checkpoint; Ctrl-C now stops at once" in outcome.err
    assert stopped(outcome, code) == (
        f"spinlm: stopped by {name} after step 4, which is saved; the same command goes on from here"
    )
    run = here / "runs/recipe"
    (training,) = (run / "checkpoints/iterations/1").iterdir()
    assert last_checkpoint(training) == training / "checkpoint-4"  # between two that are logged and saved anyway
    assert not (run / ".staging").exists()
    assert (run / "lock").read_text() == ""
    succeeded(spinlm(*RUN, cwd=here))
    assert differing(whole / "runs/recipe", run) == []


@pytest.mark.slow
def test_what_supervised_training_logs_goes_on_too(here: Path, whole: Path) -> None:
    changes = ("sft.num_train_epochs=2", "run_dir=runs/longer")
    succeeded(spinlm(*RUN, *changes, cwd=whole))
    waiting = waiting_at("sft 3 6", (*RUN, *changes), here, call=SHOWN)
    os.kill(waiting.pid, signal.SIGTERM)
    assert "after step 4" in stopped(waiting.go_on(), 143)
    succeeded(spinlm(*RUN, *changes, cwd=here))
    assert [row["step"] for row in rows(here / "runs/longer/sft/training.jsonl")] == [3, 6]
    assert differing(whole / "runs/longer", here / "runs/longer") == []


@pytest.mark.slow
def test_the_best_is_chosen_from_the_checkpoints_of_the_recipe(here: Path) -> None:
    """One that is there only because of a signal is none of them."""
    keep = ("keep=best", "run_dir=runs/best")
    waiting = waiting_at("iteration 1: train 3 6", (*RUN, *keep), here, call=SHOWN)
    os.kill(waiting.pid, signal.SIGINT)
    assert "after step 4" in stopped(waiting.go_on(), 130)
    candidates = [path.name for path in (here / "runs/best/iterations/1/candidates").iterdir()]
    assert candidates == ["000003"]


@pytest.mark.parametrize(
    "place_of",
    [
        "iterations/0/synthetic/00001",
        pytest.param("iterations/0/opponent_logprobs/00002", marks=pytest.mark.slow),
    ],
)
def test_elsewhere_it_ends_at_once_and_keeps_every_shard(here: Path, place_of: str) -> None:
    waiting = waiting_at(place_of, RUN, here)
    os.kill(waiting.pid, signal.SIGTERM)
    assert stopped(waiting.go_on(), 143) == "spinlm: stopped by SIGTERM; the same command goes on from here"
    found = contents(here / "runs/recipe")
    folder, _, number = place_of.rpartition("/")
    assert [name for name in found if name.startswith(folder)] == [
        f"{folder}/{earlier:05d}.jsonl" for earlier in range(int(number))
    ]
    assert not [name for name in found if name.startswith(".")]


def test_a_second_signal_ends_it_at_once(here: Path, whole: Path) -> None:
    waiting = waiting_at("iteration 1: train 3 6", RUN, here, call=SHOWN)
    twice(waiting)
    outcome = waiting.go_on()
    assert stopped(outcome, 130) == (
        "spinlm: stopped at once by Ctrl-C; the same command goes on from the last shard or checkpoint"
    )
    (training,) = (here / "runs/recipe/checkpoints/iterations/1").iterdir()
    assert last_checkpoint(training) is None
    succeeded(spinlm(*RUN, cwd=here))
    assert differing(whole / "runs/recipe", here / "runs/recipe") == []


@pytest.mark.slow
def test_a_round_of_regeneration_is_let_go_and_the_steps_before_it_are_saved(here: Path, whole: Path) -> None:
    rounds = ("training.regenerate_every=2", "run_dir=runs/rounds")
    begins = "spinlm.training.regeneration:RegeneratingTrainer._begin"
    waiting = waiting_at("^2$", (*RUN, *rounds), here, call=begins)  # of iteration 1, the only one with 6 steps
    os.kill(waiting.pid, signal.SIGTERM)
    assert stopped(waiting.go_on(), 143) == "spinlm: stopped by SIGTERM; the same command goes on from here"
    (training,) = (here / "runs/rounds/checkpoints/iterations/1").iterdir()
    assert last_checkpoint(training) == training / "checkpoint-4"
    assert not (here / "runs/rounds/iterations/1/rounds/00002.jsonl").exists()
    succeeded(spinlm(*RUN, *rounds, cwd=here))
    succeeded(spinlm(*RUN, *rounds, cwd=whole))
    assert differing(whole / "runs/rounds", here / "runs/rounds") == []


@pytest.mark.slow
def test_nobody_is_listening(here: Path, whole: Path) -> None:
    """`spinlm run | tee log` at Ctrl-C: tee goes first, and the step is saved all the same."""
    command = f"exec {sys.executable} -m spinlm run recipe.yaml training.num_train_epochs=100 training.save_steps=300"
    process = subprocess.Popen(command, shell=True, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    assert any(b"iteration 0: train step 3/" in line for line in process.stdout)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    (training,) = (here / "runs/recipe/checkpoints/iterations/0").iterdir()
    assert last_checkpoint(training) is not None


def twice(waiting: Waiting) -> None:
    """A second signal only once the first has been answered: signals that wait are one."""
    os.kill(waiting.pid, signal.SIGINT)
    assert "Ctrl-C now stops at once" in waiting.next_error_line()
    os.kill(waiting.pid, signal.SIGINT)


def test_before_anything_is_loaded(here: Path) -> None:
    program = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    lines = f"import spinlm.config as c; c.load_recipe = lambda *a: exec({program!r}); import spinlm.cli as m; m.main()"
    done = subprocess.run([sys.executable, "-c", lines, *RUN], cwd=here, capture_output=True, text=True)
    assert stopped(Outcome(done.returncode, done.stdout, done.stderr), 143).startswith("spinlm: stopped by SIGTERM")
    assert not (here / "runs").exists()

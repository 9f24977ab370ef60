"""Two processes of one run: a signal ends both in order; where one dies, the other names it and ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from integration.command import TORCHRUN, differing, new_place, spinlm_process, succeeded
from spinlm.training.checkpoints import last_checkpoint

pytestmark = pytest.mark.slow

RUN = (
    "run",
    "recipe.yaml",
    "iterations=1",
    "training.num_train_epochs=40",
    "training.save_steps=60",
    "training.logging_steps=1",
)
WITHIN = 60.0
"""Seconds until all of them have ended."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Where the two have been left alone."""
    place = new_place(tmp_path_factory.mktemp("whole") / "place", tiny_llama)
    succeeded(spinlm_process(*RUN, cwd=place, launcher=TORCHRUN))
    return place


def read_until(line: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert any(line in said for said in process.stdout)


IN_TRAINING = "iteration 0: train step 5/"


@pytest.fixture
def launched(place: Path) -> Iterator[subprocess.Popen[str]]:
    """Both, when they have taken some steps of iteration 0."""
    process = start(TORCHRUN, place)
    read_until(IN_TRAINING, process)
    yield process
    process.kill()
    process.communicate()


def start(launcher: tuple[str, ...], cwd: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, *RUN],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def goes_on(place: Path, whole: Path) -> str:
    """Resumed, it ends as the one that was left alone; what it said."""
    resumed = succeeded(spinlm_process(*RUN, cwd=place, launcher=TORCHRUN))
    assert differing(whole / "runs/recipe", place / "runs/recipe") == []
    return resumed.out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_both_in_order(launched: subprocess.Popen[str], place: Path, whole: Path, number: int) -> None:
    launched.send_signal(number)
    _, err = launched.communicate(timeout=WITHIN)
    assert launched.returncode != 0
    assert err.count(f"stopped by {signal.Signals(number).name} after step") == 2
    (training,) = (place / "runs/recipe/checkpoints/iterations/0").iterdir()
    assert last_checkpoint(training) is not None
    assert IN_TRAINING not in goes_on(place, whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_torchrun_dies(launched: subprocess.Popen[str], place: Path, whole: Path, rank: int) -> None:
    workers = {int(child.environ()["RANK"]): child for child in psutil.Process(launched.pid).children()}
    workers[rank].kill()
    _, err = launched.communicate(timeout=WITHIN)
    assert launched.returncode != 0
    assert f"process {rank} (pid {workers[rank].pid} on {socket.gethostname()}) has died" in err, err
    assert not workers[1 - rank].is_running()
    goes_on(place, whole)


@pytest.mark.parametrize("dies_in", [IN_TRAINING, "data: 12 examples"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_without_a_launcher_dies(place: Path, whole: Path, rank: int, dies_in: str) -> None:
    """Nobody else looks after the two: started by hand, on two machines, say."""
    both = started_by_hand(place)
    read_until(dies_in, both[0])
    both[rank].kill()
    other = both[1 - rank]
    _, err = other.communicate(timeout=WITHIN)
    both[rank].communicate()
    assert other.returncode == 2
    assert "Traceback" not in err
    assert f"spinlm: process {rank} (pid {both[rank].pid} on {socket.gethostname()}) has died" in err, err
    goes_on(place, whole)


def started_by_hand(place: Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [start(("-m", "spinlm"), place, **address, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)]

"""Two starts at once: one runs, the other is told so, and nothing is harmed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.starts import Starts
from integration.command import Outcome, Waiting, differing, refused, spinlm_process, succeeded, waiting_at

RUN = ("run", "recipe.yaml", "evaluation.control=true")

AT_ONCE = """
import os, sys
from pathlib import Path
from spinlm.config import recipe_from
from spinlm.errors import UserError
from spinlm.rundir import RunDir

RECIPE = recipe_from({"run_dir": "r", "model": {"name": "m"}, "data": {"source": "d"}}, where="here")

def start(place):
    run = RunDir(place)
    try:
        with run.locked():
            (place.parent / f"{place.name}.holder").touch(exist_ok=False)
            run.begin(RECIPE, {})
            with run.artifact(f"{os.getpid()}.json", "data", {}).staging() as staged:
                staged.write_text("{}")
            run.verify(f"{os.getpid()}.json")
            (place.parent / f"{place.name}.holder").unlink()
    except UserError as error:
        return 0 if "another process is running this (" in str(error) else print(error) or 1
    return 2

for number in range(40):
    waits, goes = os.pipe()
    children = []
    for _ in range(4):
        if not (child := os.fork()):
            code = 1
            try:
                os.close(goes)
                os.read(waits, 1)
                code = start(Path(sys.argv[1]) / str(number))
            finally:
                os._exit(code)
        children.append(child)
    os.close(waits), os.close(goes)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, 2} and 2 in codes, codes
"""


def test_whoever_begins_has_it_alone(tmp_path: Path) -> None:
    """Four processes let go at the same moment, on forty new directories: nobody is in while another is."""
    done = subprocess.run([sys.executable, "-c", AT_ONCE, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.slow
def test_two_at_once_of_a_new_run_and_of_one_that_is_there(place: Path, finished: Path) -> None:
    with Starts(None, place) as starts:
        for _ in range(2):
            one_ran(starts.together(*RUN, count=2))
            assert differing(finished / "runs/recipe", place / "runs/recipe") == []


@pytest.fixture
def first(place: Path) -> Iterator[Waiting]:
    waiting = waiting_at("iterations/0/synthetic/00001", RUN, place)
    (place / "runs/recipe/lock").unlink()
    yield waiting
    waiting.kill()


@pytest.mark.slow
def test_somebody_removed_the_lock(place: Path, finished: Path, first: Waiting) -> None:
    """It is taken again."""
    succeeded(first.go_on())
    assert (place / "runs/recipe/lock").exists()
    assert differing(finished / "runs/recipe", place / "runs/recipe") == []


@pytest.mark.slow
def test_somebody_removed_the_lock_and_started_another(place: Path, finished: Path, first: Waiting) -> None:
    """The first one ends, and harms nothing of what the second one has made."""
    succeeded(spinlm_process(*RUN, cwd=place))
    refused(first.go_on(), "runs/recipe/lock: was removed, and another process has started this run since")
    assert differing(finished / "runs/recipe", place / "runs/recipe") == []


def one_ran(outcomes: list[Outcome]) -> None:
    """The others were refused; unless one came so late that the run was over."""
    assert 0 in [outcome.code for outcome in outcomes]
    for outcome in outcomes:
        if outcome.code != 0:
            refused(outcome, "runs/recipe: another process is running this (pid ", "Wait for it, or stop it first.")

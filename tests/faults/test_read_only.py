"""A run directory that can't be written: what only reads works, and what writes says so in one message."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.starts import Starts
from integration.command import contents, refused, succeeded

RUN = ("run", "recipe.yaml", "evaluation.control=true")


@pytest.fixture
def starts(copied: Path) -> Iterator[Starts]:
    """In a process that permissions bind, root's too, on a run without any to write."""
    launcher: tuple[str, ...] = ()
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere, and there is no setpriv to take that from it")
        launcher = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--")
    paths = [copied / "runs", *(path for path in (copied / "runs").rglob("*") if not path.is_symlink())]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    with Starts(None, copied, launcher=launcher) as starts:
        yield starts
    for path in paths:
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_it_is_read_and_nothing_else(starts: Starts, copied: Path) -> None:
    before = contents(copied / "runs/recipe", without=())
    for command in (RUN, ("generate", *RUN[1:]), ("evaluate", "runs/recipe"), ("run", *RUN[1:], "--fork", "runs/new")):
        refused(starts(*command), "runs/", "Permission denied")
    refused(starts("report", "runs/recipe"), "report.html: can't be written: Permission denied", "--out FILE")
    assert "all done" in succeeded(starts("status", "runs/recipe")).out
    assert "report: page.html" in succeeded(starts("report", "runs/recipe", "--out", "page.html")).out
    succeeded(starts("export", "runs/recipe", "out"))
    assert (copied / "out/adapter_model.safetensors").is_file()
    refused(starts("export", "runs/recipe", "runs/out"), "runs/.out.part: Permission denied")
    assert contents(copied / "runs/recipe", without=()) == before

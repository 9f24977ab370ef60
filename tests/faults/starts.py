"""The command on a disk and with a clock that have faults; see disk.c and forked.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration.command import Outcome


@dataclass(frozen=True)
class Call:
    """A call that changed something in the run directory.

    Attributes:
        kind: `create`, `write`, `truncate`, `fsync`, `rename`, `mkdir`, `symlink`, `unlink`.
        place: Of what, within the run directory; `.` is that itself.
        other: Where it was renamed to.
    """

    kind: str
    place: str
    other: str = ""


class Starts:
    """Starts of the command in one place, one after the other or at the same moment."""

    def __init__(self, disk: Path | None, cwd: Path, run: str = "runs/recipe", launcher: Sequence[str] = ()) -> None:
        """
        Args:
            disk: The faulty disk, compiled; None: there are no faults.
            cwd: Where the command is started.
            run: The run directory there, which the faults are of.
            launcher: What Python is started by.
        """
        self._log = cwd / "calls.log"
        self._disk = disk
        self._run = (cwd / run).resolve()
        self._process = subprocess.Popen(
            [*launcher, sys.executable, str(Path(__file__).with_name("forked.py"))],
            cwd=cwd,
            env={**os.environ, **({} if disk is None else {"LD_PRELOAD": str(disk)})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Starts:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()

    def __call__(
        self, *arguments: str, full_from: Sequence[tuple[str, str]] = (), links: bool = True, seconds_back: int = 0
    ) -> Outcome:
        """One start.

        Args:
            arguments: The command's.
            full_from: Kinds of calls, and patterns of their places: the disk is full from the first of them on.
            links: Whether the file system has hard links.
            seconds_back: How far the clock goes back each time that it is read.
        """
        self._log.unlink(missing_ok=True)
        (outcome,) = self._starts(arguments, [self._faults(full_from, links, seconds_back)])
        return outcome

    def together(self, *arguments: str, count: int = 2) -> list[Outcome]:
        """Several at the same moment, without a fault."""
        return self._starts(arguments, [self._faults((), True, 0)] * count)

    def calls(self) -> list[Call]:
        """What the last start has changed, and in which order."""
        lines = self._log.read_text(encoding="utf-8").splitlines() if self._log.exists() else []
        return [Call(*line.split("\t")) for line in lines]

    def was_full_from(self) -> Call | None:
        """Where the disk was full first; None where it never was."""
        return next((Call(call.place, call.other) for call in self.calls() if call.kind == "full"), None)

    def _faults(self, full_from: Sequence[tuple[str, str]], links: bool, seconds_back: int) -> dict[str, Any]:
        return {
            "armed": self._disk is not None,
            "directory": str(self._run),
            "log": str(self._log),
            "full_from": list(full_from),
            "links": links,
            "seconds_back": seconds_back,
        }

    def _starts(self, arguments: Sequence[str], faults: Sequence[dict[str, Any]]) -> list[Outcome]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"arguments": list(arguments), "faults": list(faults)}) + "\n")
        self._process.stdin.flush()
        return [Outcome(**outcome) for outcome in json.loads(self._process.stdout.readline())]

"""The command as a process group that can be shot at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

FORKSERVER = Path(__file__).with_name("forkserver.py")

LONGEST = 300.0
"""Seconds: nothing here takes as long; whatever does hangs."""


class ForkServer:
    """Starts `spinlm ARGUMENTS` as forks of a process that has imported the libraries, one at a time."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, str(FORKSERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        assert self._read(LONGEST) == "ready"
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def play(self, arguments: tuple[str, ...], cwd: Path, output: Path, delay: float, number: int) -> int:
        """Send a signal to all of the command's processes after so many seconds, unless it has ended by then.

        Returns:
            Its exit code, or minus the signal it died of. To an orderly signal it may take 30 seconds to answer.
        """
        assert self._process.stdin is not None
        wanted = {"arguments": list(arguments), "cwd": str(cwd), "output": str(output)}
        self._process.stdin.write(json.dumps(wanted).encode() + b"\n")
        group = self._read(LONGEST)
        assert group is not None
        code = self._read(delay)
        if code is None:
            shoot(int(group), number)
            code = self._read(ORDERLY)
        if code is None:
            shoot(int(group), signal.SIGKILL)
            self._read(LONGEST)
            raise AssertionError(f"still there {ORDERLY} s after {signal.Signals(number).name}")
        return int(code)

    def _read(self, seconds: float) -> str | None:
        """The next line, or None if none comes in time. Unbuffered: what is waiting is seen to wait."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return None
        return self._process.stdout.readline().decode().strip()


ORDERLY = 30.0
"""Seconds that a signal may take to end a run in order."""


def play_afresh(arguments: tuple[str, ...], cwd: Path, output: Path, delay: float, number: int) -> int:
    """As `ForkServer.play`, by `python -m spinlm`: also while it is importing."""
    with output.open("a") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", "spinlm", *arguments],
            cwd=cwd,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        return process.wait(delay)
    except subprocess.TimeoutExpired:
        shoot(process.pid, number)
    try:
        return process.wait(ORDERLY)
    finally:
        shoot(process.pid, signal.SIGKILL)


def shoot(group: int, number: int) -> None:
    """Send a signal to a process group, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)

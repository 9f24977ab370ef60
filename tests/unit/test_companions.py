"""Processes that are stuck in waiting for one another, as in a collective operation, and one of them goes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys, threading
from datetime import timedelta
from torch.distributed import TCPStore
from spinlm import companions, interruption
from spinlm.errors import UserError

rank, behaviour = int(sys.argv[1]), sys.argv[2]
companions.SILENCE, companions.GRACE, companions.BEAT = 3.0, 1.0, 0.2
if rank == 0:
    store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=True, wait_for_workers=False)
try:
    with interruption.listening(), companions.watching(rank, 2):
        print("at work", flush=True)
        if rank == 0 and behaviour == "a lost connection":
            sys.stdin.readline()
            raise RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer")
        if rank == 0 and behaviour == "its own error":
            sys.stdin.readline()
            raise RuntimeError("a bug")
        if rank == 0:
            sys.stdin.readline() if behaviour == "done" else threading.Event().wait()
        sys.stdin.readline()
        if behaviour == "failed":
            raise UserError("no good")
except (UserError, interruption.Interrupted) as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""

GOES_ON = "the same command goes on from here"


class Two:
    """Two processes of which the first is in a wait that doesn't end."""

    def __init__(self, behaviour: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.waiting, self.going = (
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(rank), behaviour],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        )
        for process in (self.waiting, self.going):
            assert process.stdout is not None
            assert process.stdout.readline() == "at work\n"

    def outcome(self) -> tuple[int, str]:
        """Of the one that waits."""
        _, err = self.waiting.communicate(timeout=60)
        return self.waiting.returncode, err

    def end(self) -> None:
        for process in (self.waiting, self.going):
            process.kill()
            process.communicate()


def go(two: Two, behaviour: str) -> None:
    if behaviour in ("killed", "a lost connection"):
        two.going.kill()
    if behaviour == "a lost connection":
        two.going.wait()
        two.waiting.stdin.write("\n")  # type: ignore[union-attr]
        two.waiting.stdin.flush()  # type: ignore[union-attr]
    if behaviour == "frozen":
        two.going.send_signal(signal.SIGSTOP)
    if behaviour == "stopped":
        two.going.send_signal(signal.SIGTERM)
    if behaviour == "failed":
        two.going.communicate("\n")


@pytest.mark.parametrize(
    ("behaviour", "what"),
    [
        ("killed", "has died or can't be reached"),
        ("frozen", "has died or can't be reached"),
        pytest.param("a lost connection", "has died or can't be reached", marks=pytest.mark.slow),
        pytest.param("stopped", "was stopped", marks=pytest.mark.slow),
        pytest.param("failed", "has failed", marks=pytest.mark.slow),
    ],
)
def test_the_other_one_is_named(behaviour: str, what: str) -> None:
    two = Two(behaviour)
    try:
        go(two, behaviour)
        code, err = two.outcome()
        assert code == 2
        assert re.search(rf"process 1 \(pid {two.going.pid} on \S+\) {what}, so this one ends too", err), err
        assert GOES_ON in err
        assert "Traceback" not in err
    finally:
        two.end()


def test_the_one_that_connects_the_others() -> None:
    two = Two("killed")
    try:
        two.waiting.kill()
        assert two.going.stderr is not None
        err = two.going.stderr.read()  # to its end: its input stays open, so it waits
        assert "process 0" in err
        assert GOES_ON in err
        assert two.going.wait() == 2
    finally:
        two.end()


def test_one_that_is_done_is_not_missed() -> None:
    two = Two("done")
    try:
        two.going.communicate("\n", timeout=60)
        assert two.going.returncode == 0
        _, err = two.waiting.communicate("\n\n", timeout=60)
        assert (two.waiting.returncode, err) == (0, "")
    finally:
        two.end()


def test_an_error_of_its_own_stays_what_it_is() -> None:
    two = Two("its own error")
    try:
        _, err = two.waiting.communicate("\n", timeout=60)
        assert two.waiting.returncode == 1
        assert "RuntimeError: a bug" in err
    finally:
        two.end()


def test_one_process_has_none(tmp_path: Path) -> None:
    from spinlm.companions import watching

    with watching(0, 1):  # no address is given, so none is looked for
        pass

"""The other processes of a run: where one of them is gone, the others name it and end, instead of waiting for it.

Each process tells the store through which they found each other that it is alive, and looks whether the others have.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal

import psutil
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from spinlm import interruption
from spinlm.errors import UserError
from spinlm.interruption import Interrupted

BEAT = 1.0
"""Seconds between two signs of life."""

SILENCE = 30.0
"""Seconds after which a process that has given none is gone: a machine, or a connection, may be."""

GRACE = 10.0
"""Seconds that this process gets to end by itself, when another one is gone: it may be waiting for it for ever."""

State = Literal["at work", "done", "stopped", "failed"]


@contextmanager
def watching(rank: int, count: int) -> Iterator[None]:
    """Watch the other processes for a while, where there are any.

    Args:
        rank: Of this process.
        count: Of all.

    Raises:
        UserError: Another process is gone, which is named.
    """
    if count == 1:
        yield
        return
    watch = _Watch(rank, count)
    watch.look()  # whoever is gone at once is known, too
    watch.start()
    try:
        yield
    except Interrupted:
        watch.is_stopping = True
        if gone := watch.look():
            watch.end("failed")
            raise UserError(gone) from None
        watch.end("stopped")
        raise
    except UserError:
        watch.end("failed")
        raise
    except Exception as error:
        gone = watch.find() if _may_be_of_another(error) else None
        watch.end("failed")
        if gone:
            raise UserError(gone) from error
        raise
    else:
        watch.end("done")


def _may_be_of_another(error: Exception) -> bool:
    """Whether this may be what a process sees when another one that it works with is gone."""
    words = ("gloo", "nccl", "connection", "socket", "peer", "timed out")
    return isinstance(error, (RuntimeError, ConnectionError)) and any(word in str(error).lower() for word in words)


class _Watch(threading.Thread):
    """Looks after the others until it is ended, and ends the process where that is stuck."""

    def __init__(self, rank: int, count: int) -> None:
        super().__init__(daemon=True, name="spinlm-companions")
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=SILENCE))
        self._rank = rank
        self._others = [other for other in range(count) if other != rank]
        self._heard: dict[int, tuple[dict[str, Any], float]] = {}
        self._beats = 0
        self._using_store = threading.Lock()
        self._ended = threading.Event()
        self._found = threading.Event()
        self._gone: str | None = None
        self.is_stopping = False

    def run(self) -> None:
        while not self._ended.wait(BEAT):
            if self.look():
                self._found.set()
                if not self._ended.wait(GRACE):
                    interruption.say(str(self._gone))
                    os._exit(2)
                return

    def find(self) -> str | None:
        """Who is gone, once that is known. A signal until then is the launcher's, which has seen it too."""
        try:
            if self.look() is None:
                self._found.wait(SILENCE + GRACE)
        except Interrupted:
            self.look()
        return self._gone

    def look(self) -> str | None:
        """Give a sign of life, and say who is gone, if somebody is."""
        with self._using_store:
            try:
                self._say("at work")
                reasons = (self._why_gone(other) for other in self._others)
                self._gone = self._gone or next((reason for reason in reasons if reason), None)
            except (DistError, RuntimeError):
                dead = (_sentence(self._known_as(other)) for other in self._others if self._is_dead(other))
                self._gone = next(dead, _sentence("what connects the processes (the launcher, or process 0)"))
            return self._gone

    def end(self, state: State) -> None:
        """Nobody needs to wait for this process any more."""
        self._ended.set()
        with self._using_store:
            try:
                self._say(state)
            except (DistError, RuntimeError):
                return

    def _say(self, state: State) -> None:
        self._beats += 1
        sign = {"state": state, "beat": self._beats, "pid": os.getpid(), "host": socket.gethostname()}
        self._store.set(_key(self._rank), json.dumps(sign | {"processes": _processes()}))

    def _why_gone(self, other: int) -> str | None:
        now = time.monotonic()
        is_heard = self._store.check([_key(other)])
        sign = json.loads(self._store.get(_key(other))) if is_heard else {}
        before, since = self._heard.get(other, (sign, now))
        self._heard[other] = sign, since if sign == before else now
        match sign.get("state"):
            case "done":
                return None
            case "failed":
                return _sentence(self._known_as(other), "has failed")
            case "stopped":  # by a signal, to this process too or for it too
                is_meant_too = self.is_stopping or interruption.pending()
                return None if is_meant_too else _sentence(self._known_as(other), "was stopped")
        is_silent = now - self._heard[other][1] > SILENCE
        return _sentence(self._known_as(other)) if is_silent or self._is_dead(other) else None

    def _is_dead(self, other: int) -> bool:
        """Whether that is seen on this machine, by what it said last."""
        sign, _ = self._heard.get(other, ({}, 0.0))
        return sign.get("processes") == _processes() and not _is_alive(sign["pid"])

    def _known_as(self, other: int) -> str:
        sign, _ = self._heard.get(other, ({}, 0.0))
        return f"process {other}" + (f" (pid {sign['pid']} on {sign['host']})" if sign else "")


def _sentence(name: str, what: str = "has died or can't be reached") -> str:
    return (
        f"{name} {what}, so this one ends too: what it has said, or the system's log, tells why. Nothing committed is "
        "lost: the same command goes on from here."
    )


def _key(rank: int) -> str:
    """Of this start: torchrun's store outlives the one before."""
    return f"spinlm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{rank}"


@cache
def _processes() -> str:
    """What tells whose process ids this process can see: those of a machine's start and, in a container, its own."""
    seen = [socket.gethostname()]
    with suppress(OSError):
        seen += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").readlink())]
    return " ".join(seen)


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

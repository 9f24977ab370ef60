"""SIGINT and SIGTERM end a run in order: at once, or where that would lose something, as soon as it is saved.

A second signal ends it on the spot. Both are safe, as a crash is: what the first one saves is time.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

GO_ON = "the same command goes on from here"


class Interrupted(BaseException):
    """A signal asked the process to end.

    No `Exception`, which whoever mends errors would catch, and no `KeyboardInterrupt`, which command-line libraries do.

    Attributes:
        exit_code: 128 plus the signal's number, as shells have it.
    """

    def __init__(self, number: int, after: str = "") -> None:
        """
        Args:
            number: Of the signal.
            after: What was finished first.
        """
        super().__init__(f"stopped by {signal.Signals(number).name}{f' {after}' if after else ''}; {GO_ON}")
        self.exit_code = 128 + number


_asked: int | None = None
"""The signal that has come."""
_deferred = False
"""Whether somebody will look for it."""
_owns_process = False
"""Whether a second signal may end the process, not only what runs in it."""


@contextmanager
def listening(owns_process: bool = False) -> Iterator[None]:
    """Handle the two signals for a while, in the main thread: no other one may. Within itself it does nothing.

    Args:
        owns_process: A second signal ends the process; in somebody else's it raises `Interrupted` on the spot.
    """
    global _asked, _owns_process
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is _handle:
        yield
        return
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    _owns_process = owns_process
    try:
        yield
    finally:
        _asked = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """For a while a signal doesn't raise `Interrupted`: who asked for this looks at `pending` and ends in order.

    Raises:
        Interrupted: On leaving, where a signal has come and nobody did.
    """
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
    check()


def pending() -> int | None:
    """The signal that waits, if one does."""
    return _asked


def check() -> None:
    """Raise `Interrupted` where a signal has come: one that was raised in a destructor, say, has been lost."""
    if _asked is not None:
        raise Interrupted(_asked)


def _handle(number: int, frame: FrameType | None) -> None:
    global _asked
    is_second, _asked = _asked is not None, number
    if is_second and _owns_process:
        _write("stopped at once by a second signal; the same command goes on from the last shard or checkpoint")
        os._exit(128 + number)
    if is_second or not _deferred:
        raise Interrupted(number)
    _write(f"{signal.Signals(number).name}: finishing the step and saving a checkpoint; a second one stops at once")


def _write(words: str) -> None:
    """Past every buffer, which a handler must not touch."""
    os.write(2, f"spinlm: {words}\n".encode())

"""SIGINT and SIGTERM end a run in order: at once, or where that would lose something, as soon as it is saved.

A SIGINT after that ends it on the spot; a SIGTERM doesn't, for a launcher and its machine may both send one. All of it
is safe, as a crash is: what an orderly end saves is time.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
_listening = False
_owns_process = False
"""Whether a second signal may end the process, not only what runs in it."""


@contextmanager
def listening(owns_process: bool = False) -> Iterator[None]:
    """Handle the two signals for a while, in the main thread: no other one may. Within itself it does nothing.

    A signal that was ignored before still is: who started this in the background wants it so.

    Args:
        owns_process: A SIGINT after the first signal ends the process; in somebody else's it raises `Interrupted`.
    """
    global _asked, _listening, _owns_process
    if _listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heard = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in heard:
        signal.signal(number, _handle)
    _listening, _owns_process = True, owns_process
    try:
        yield
    finally:
        _asked, _listening = None, False
        for number in heard:
            signal.signal(number, before[number])


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
    if _asked is not None:
        _handle_another(number)
        return
    _asked = number
    if not _deferred:
        raise Interrupted(number)
    say(f"{signal.Signals(number).name}: finishing the step and saving a checkpoint; Ctrl-C now stops at once")


def _handle_another(number: int) -> None:
    if number != signal.SIGINT:
        return
    if not _owns_process:
        raise Interrupted(number)
    say("stopped at once by Ctrl-C; the same command goes on from the last shard or checkpoint")
    os._exit(128 + number)


def say(words: str) -> None:
    """To standard error past every buffer, which a handler must not touch; nobody may be listening any more."""
    with suppress(OSError):
        os.write(2, f"spinlm: {words}\n".encode())

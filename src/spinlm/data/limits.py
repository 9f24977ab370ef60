"""Limits of time and memory for what somebody else has written, such as a chat template."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

AGAIN = 0.5
"""Seconds until it is interrupted again: what is raised in a destructor is lost."""


@contextmanager
def limited(seconds: float, size: int) -> Iterator[None]:
    """Let something take only so long and so many bytes more, on Linux; elsewhere only so long.

    Only the main thread can be interrupted: in others there is no limit.

    Raises:
        TimeoutError: It took longer.
        MemoryError: It wanted more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, _interrupt)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        try:
            with _bounded(size):
                yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, *timer)
    except _OvertimeError:
        raise TimeoutError from None
    finally:
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def _bounded(size: int) -> Iterator[None]:
    used = Path("/proc/self/statm")
    if not used.exists():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(used.read_text().split()[0]) * resource.getpagesize() + size
    ends = [end for end in (*before, wanted) if end != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(ends), before[1]))
    try:
        yield
    finally:
        with suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_AS, before)


class _OvertimeError(BaseException):
    """Not an Exception: Jinja tries constant expressions while compiling, and goes on whatever Exception they raise."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    """But not who is about to end it."""
    if frame is None or frame.f_code.co_filename not in (__file__, contextlib.__file__):
        raise _OvertimeError

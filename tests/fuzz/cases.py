"""What every fuzz test asks of a case: accepted or refused by one message, within seconds and bounded memory."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import ClassVar, TypeVar

from hypothesis import HealthCheck, Phase, settings

from spinlm.errors import UserError

SECONDS = 10.0
"""Of this process's own time: others work here too."""
WALL_SECONDS = 120.0
"""In which whatever a case waits for has come."""
MOST_MEMORY = 3_000_000_000
"""Bytes that a case may have more than the process had before it."""

DEFAULT_CASES = 200
"""In all, where `--fuzz-cases` doesn't say otherwise."""

TOTAL = "SPINLM_FUZZ_CASES"

Result = TypeVar("Result")


class Tried:
    """What has been tried so far: shown at the end."""

    accepted: ClassVar[Counter[str]] = Counter()
    refused: ClassVar[Counter[str]] = Counter()
    seconds: ClassVar[dict[str, float]] = defaultdict(float)
    slowest: ClassVar[tuple[float, str]] = (0.0, "")

    @classmethod
    def lines(cls) -> Iterator[str]:
        kinds = sorted(cls.accepted.keys() | cls.refused.keys())
        for kind in kinds:
            accepted, refused = cls.accepted[kind], cls.refused[kind]
            yield (
                f"{kind}: {accepted + refused} cases, {accepted} accepted, {refused} refused, {cls.seconds[kind]:.0f} s"
            )
        total = sum((cls.accepted + cls.refused).values())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        yield (
            f"{total} cases in {sum(cls.seconds.values()):.0f} s; the slowest took {cls.slowest[0]:.2f} s "
            f"({cls.slowest[1]}); the process's peak memory: {peak / 1e6:.2f} GB"
        )


def cases(share: float) -> settings:
    """Settings for a test that has this share of all cases."""
    asked = os.environ.get(TOTAL)
    count = max(1, round(share * int(asked or DEFAULT_CASES)))
    return settings(
        max_examples=count,
        derandomize=asked is None,  # in the suite the same cases each time
        database=None,
        deadline=None,  # there is one of our own, which interrupts
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )


def accepted_or_refused(kind: str, action: Callable[[], Result]) -> Result | None:
    """Do it: what it gives, or None where it is refused by a UserError. Anything else is a failure."""
    started = time.perf_counter()
    try:
        with _within_limits():
            result = action()
        Tried.accepted[kind] += 1
        return result
    except UserError as error:
        is_message(str(error))
        Tried.refused[kind] += 1
        return None
    finally:
        took = time.perf_counter() - started
        Tried.seconds[kind] += took
        Tried.slowest = max(Tried.slowest, (took, kind))


def is_message(text: str) -> None:
    """One message, not a page of anything."""
    assert text.strip()
    assert len(text) < 20_000
    assert "Traceback" not in text


class TooSlow(BaseException):
    """A case took longer than it may."""


@contextmanager
def _within_limits() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGVTALRM, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST_MEMORY, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
        for timer in (signal.ITIMER_VIRTUAL, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)

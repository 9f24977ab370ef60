"""Limits of time and memory: they hold, what is within them isn't touched, and they are gone afterwards."""

from __future__ import annotations

import itertools
import resource
import signal
import threading

import pytest

from spinlm.data.limits import limited

LOTS = 100_000_000_000


def _for_ever() -> None:
    for _ in itertools.count():
        try:
            int("x")
        except Exception:  # as Jinja does while it compiles
            continue


def test_time() -> None:
    with pytest.raises(TimeoutError), limited(0.05, LOTS):
        _for_ever()


class EndlessEnd:
    def __del__(self) -> None:
        _for_ever()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_that_is_lost() -> None:
    with pytest.raises(TimeoutError), limited(0.05, LOTS):
        EndlessEnd()
        _for_ever()


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no such limit here")
def test_memory() -> None:
    with pytest.raises(MemoryError), limited(60, 100_000_000):
        bytes(1_000_000_000)
    assert len(bytes(200_000_000)) == 200_000_000


def test_what_was_set_before_is_set_again() -> None:
    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    with limited(60, LOTS):
        assert signal.getsignal(signal.SIGALRM) != before[0]
    with pytest.raises(KeyError), limited(60, LOTS):
        raise KeyError
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_in_another_thread_there_are_none() -> None:
    done: list[int] = []

    def work() -> None:
        with limited(60, 0):
            done.append(len(bytes(1000)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1000]

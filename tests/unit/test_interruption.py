from __future__ import annotations

import os
import signal
import threading

import pytest

from spinlm import interruption
from spinlm.interruption import Interrupted


def interrupt(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_what_is_listening(number: int, code: int) -> None:
    before = [signal.getsignal(one) for one in interruption.SIGNALS]
    words = f"stopped by {signal.Signals(number).name}; the same command goes on from here"
    with pytest.raises(Interrupted, match=words) as stop, interruption.listening():
        interrupt(number)
    assert stop.value.exit_code == code
    assert [signal.getsignal(one) for one in interruption.SIGNALS] == before
    assert interruption.pending() is None


def test_deferred_it_waits_for_who_looks(capfd: pytest.CaptureFixture[str]) -> None:
    done = []
    with pytest.raises(Interrupted), interruption.listening():
        with interruption.deferred():
            interrupt()
            assert interruption.pending() == signal.SIGTERM
            done.append("the step")
        done.append("never")
    assert done == ["the step"]
    assert capfd.readouterr().err == (
        "spinlm: SIGTERM: finishing the step and saving a checkpoint; Ctrl-C now stops at once\n"
    )


def test_an_error_is_not_hidden_by_a_signal_that_waits() -> None:
    with pytest.raises(ValueError, match="of the step"), interruption.listening(), interruption.deferred():
        interrupt()
        raise ValueError("of the step")


@pytest.mark.parametrize("first", interruption.SIGNALS)
def test_ctrl_c_after_that_ends_it_on_the_spot_in_a_process_that_is_not_ours(first: int) -> None:
    with pytest.raises(Interrupted), interruption.listening(), interruption.deferred():
        interrupt(first)
        interrupt(signal.SIGINT)
        raise AssertionError("went on")


def test_a_launcher_and_its_machine_may_both_send_one() -> None:
    done = []
    with pytest.raises(Interrupted), interruption.listening(), interruption.deferred():
        interrupt(signal.SIGTERM)
        interrupt(signal.SIGTERM)
        done.append("the step")
    assert done == ["the step"]


def test_what_was_ignored_still_is() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruption.listening():
            interrupt(signal.SIGINT)
            assert interruption.pending() is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_nobody_may_be_listening_to_what_it_says() -> None:
    out, pipe = os.pipe()
    os.close(out)
    stderr = os.dup(2)
    os.dup2(pipe, 2)
    try:
        with pytest.raises(Interrupted), interruption.listening(), interruption.deferred():
            interrupt()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(pipe)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_a_destructor_has_swallowed_is_found() -> None:
    class Swallows:
        def __del__(self) -> None:
            interrupt()

    with pytest.raises(Interrupted), interruption.listening():
        Swallows()
        interruption.check()


def test_within_itself_it_changes_nothing() -> None:
    with interruption.listening():
        handler = signal.getsignal(signal.SIGINT)
        with interruption.listening():
            assert signal.getsignal(signal.SIGINT) is handler
        assert signal.getsignal(signal.SIGINT) is handler


def test_another_thread_may_not_and_does_not() -> None:
    ended = []

    def elsewhere() -> None:
        with interruption.listening():
            ended.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert ended == [before]

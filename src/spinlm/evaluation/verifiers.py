"""Judging a response by the verifier of its reasoning-gym task.

Some of those verifiers run the text they are given as Python (`eval`, sympy's `parse_expr`). What a model
wrote is neither harmless nor sure to end, so such text is looked at first, and every judgement is limited
in time.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from spinlm.data.sources import fingerprint, reasoning_gym_task
from spinlm.errors import UserError

CPU_SECONDS = 5.0
"""A judgement that takes longer (`9**9**9` for a number) is one against the text."""

EVAL_TASKS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Tasks whose verifier runs a text by `eval`, to give part of the score to a Python list."""

FORMULA_TASKS = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
"""Tasks whose verifier runs a text by sympy's `parse_expr`."""

PLAIN_LIST = re.compile(r"""[\w\s,\[\]'"-]*""", re.ASCII)
PLAIN_FORMULA = re.compile(r"[\w\s.,=+\-*/^()]*", re.ASCII)
FUNCTIONS = frozenset(
    ["abs", "acos", "asin", "atan", "cos", "cosh", "exp", "ln", "log", "pi", "sec", "sin", "sinh", "sqrt", "tan"]
)


def correct(text: str, verifier: dict[str, Any]) -> bool:
    """Whether the verifier accepts a response entirely; a part of the score is not correct.

    Raises:
        UserError: As `score`.
    """
    return score(text, verifier) >= 1.0


def score(text: str, verifier: dict[str, Any]) -> float:
    """A response's score from 0 to 1, by the verifier of the entry that it answers.

    Most tasks compare the whole text, blanks at its ends aside, with the one answer. They give 1 to that,
    and less to an answer with other text around it, to one in another notation, or (0.01) to any attempt.

    A verifier that fails or doesn't end on a text which comes from a model has been given nonsense: 0. One
    that fails on the entry's own answer too is broken: that is raised. Time is limited in the main thread
    only, where Python can interrupt it.

    Args:
        text: The response.
        verifier: As in `spinlm.data.sources.Row`.

    Raises:
        UserError: reasoning-gym isn't installed, doesn't know the task, or makes another entry than the
            one the response was made for.
    """
    dataset = reasoning_gym_task(verifier["task"], verifier["size"], verifier["seed"], verifier["args"])
    entry = dataset[verifier["index"]]
    _check_same(entry, verifier)
    answer = text.strip()
    if not _harmless(answer, verifier["task"], entry["answer"]):
        return 0.0
    try:
        with _limited(CPU_SECONDS):
            result = float(dataset.score_answer(answer=answer, entry=entry))
    except (Exception, _TooLongError):
        dataset.score_answer(answer=entry["answer"], entry=entry)
        return 0.0
    return min(max(result, 0.0), 1.0)


class _TooLongError(BaseException):
    """Not an Exception, since a verifier may catch those."""


@contextmanager
def _limited(cpu_seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, by this process's own clock, so that a busy machine changes no score."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise _TooLongError

    previous = signal.signal(signal.SIGVTALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds, 1.0)  # again each second: it may be caught inside
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, previous)


def _harmless(text: str, task: str, answer: str) -> bool:
    """Whether the task's verifier may be given the text.

    A list task's text has no bracket that could call something. A formula's names are single letters,
    those in the entry's own answer, and school mathematics.
    """
    if task in EVAL_TASKS:
        return PLAIN_LIST.fullmatch(text) is not None
    if task in FORMULA_TASKS:
        names = set(re.findall(r"[^\W\d]\w*", text))
        known = FUNCTIONS | set(re.findall(r"[^\W\d]\w*", answer))
        return PLAIN_FORMULA.fullmatch(text) is not None and all(len(n) == 1 or n in known for n in names)
    return True


def _check_same(entry: dict[str, Any], verifier: dict[str, Any]) -> None:
    expected = verifier.get("sha256")
    if expected is not None and expected != fingerprint(entry):
        raise UserError(
            f"reasoning_gym:{verifier['task']}[{verifier['index']}] is not the entry that the data was made from, so "
            "no response to it can be judged: use the same version of reasoning-gym, and the same PYTHONHASHSEED"
        )

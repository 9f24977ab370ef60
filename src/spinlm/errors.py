"""The one error that a person is meant to read, and words for it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something in the input, the machine or the run directory that its user can put right.

    The message says what is wrong, where (file, row, key) and what to do. The command line prints it
    alone, without a traceback, and exits with code 2.
    """


class OutOfMemory(UserError):
    """Memory has run out.

    Attributes:
        phase: What needed it, as `spinlm plan` calls it: `sft`, `train`, `score`, `generate`; empty where it doesn't.
    """

    def __init__(self, what: str, words: str, phase: str, remedy: str, estimate: str = "") -> None:
        """
        Args:
            what: What was going on.
            words: Of the library that asked for memory.
            phase: As above.
            remedy: Which settings to change.
            estimate: What `spinlm plan` says of it.
        """
        self.phase = phase
        self._parts = (what, words, phase, remedy)
        sentences = [f"{what}: memory has run out ({words})", "Nothing committed is lost", remedy, estimate]
        super().__init__(". ".join(filter(None, sentences)) + ".")

    def with_estimate(self, estimate: str) -> OutOfMemory:
        """The same, with what `spinlm plan` says of it."""
        return OutOfMemory(*self._parts, estimate)


def first_line(error: Exception) -> str:
    """What another library says is wrong, without the pages that may follow."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def nearest(name: str, known: Iterable[str], count: int = 1) -> str:
    """`; did you mean this or that?`, where something known is like the name; else nothing."""
    matches = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""

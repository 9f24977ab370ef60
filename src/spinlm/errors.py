"""The one error that a person is meant to read, and words for it."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


class UserError(Exception):
    """Something in the input, the machine or the run directory that its user can put right.

    The message says what is wrong, where (file, row, key) and what to do. The command line prints it
    alone, without a traceback, and exits with code 2. What it quotes may be anybody's: it is made harmless to a
    terminal, and kept short.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_shortened("".join(map(_shown, message))))


LONGEST_MESSAGE = 8000
"""Characters."""


def _shown(character: str) -> str:
    """The character, or where it is none to be seen (control characters, lone surrogates), how Python writes it."""
    unseen = unicodedata.category(character).startswith("C") and character not in "\n\t"
    return character.encode("unicode_escape").decode() if unseen else character


def _shortened(text: str) -> str:
    """The beginning and the end, where what to do is said."""
    half = LONGEST_MESSAGE // 2
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} […] {text[-half:]}"


def first_line(error: Exception) -> str:
    """What another library says is wrong, without the pages that may follow."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def nearest(name: str, known: Iterable[str], count: int = 1) -> str:
    """`; did you mean this or that?`, where something known is like the name; else nothing."""
    matches = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""

"""The one error that a person is meant to read, words for it, and what no message may say."""

from __future__ import annotations

import difflib
import errno
import os
import re
import unicodedata
import urllib.parse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

SHORTEST_SECRET = 8
"""Characters; a shorter key (`EMPTY`, `x`) is a local server's placeholder, and may be a word."""

_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)S?$", re.IGNORECASE)
_IN_A_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


class UserError(Exception):
    """Something in the input, the machine or the run directory that its user can put right.

    The message says what is wrong, where (file, row, key) and what to do. The command line prints it
    alone, without a traceback, and exits with code 2. What it quotes may be anybody's: it is made harmless to a
    terminal, kept short, and no secret is left in it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_shortened("".join(map(_shown, without_secrets(message)))))


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


def without_secrets(text: str) -> str:
    """Text without the keys, tokens and passwords of the environment (by their variables' names) and of URLs."""
    values = {value.strip() for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    secrets = {value for value in values if len(value) >= SHORTEST_SECRET}
    in_urls = {urllib.parse.quote(os.fsencode(value), safe="") for value in secrets}
    for secret in sorted(secrets | in_urls, key=len, reverse=True):
        text = text.replace(secret, "[key]")
    return _IN_A_URL.sub("[key]", text)


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


_FAILING, _CLOSED = (errno.EROFS, errno.EIO), (errno.EACCES, errno.EPERM)
"""A write that fails names no file; what is closed to us may be something else, where no file is named."""


def disk_trouble(error: Exception, place: Path | str) -> UserError | None:
    """What to say where a disk is full, failing or closed to us; None where that isn't what is wrong.

    Args:
        error: What came up. Libraries that write for us report it each in their own way.
        place: Where something was written, unless the error knows better.
    """
    if _is_full(error):
        trouble, remedy = "the disk is full", "make space"
    elif isinstance(error, OSError) and (error.errno in _FAILING or (error.filename and error.errno in _CLOSED)):
        trouble, remedy = str(error.strerror), "see to it"
    else:
        return None
    named = getattr(error, "filename2", None) or getattr(error, "filename", None) or place
    return UserError(f"{named}: {trouble}. Nothing committed is lost: {remedy}, and run the same command again.")


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Where a disk is full, failing or closed to us while something is written there, that is said, with the place."""
    try:
        yield
    except Exception as error:
        if trouble := disk_trouble(error, place):
            raise trouble from error
        raise


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    by_safetensors = type(error).__name__ == "SafetensorError" and "write" in text
    by_torch = any(words in text for words in ("PytorchStreamWriter", "iostream error", "unexpected pos"))
    return not isinstance(error, UserError) and ("No space left on device" in text or by_safetensors or by_torch)


def first_line(error: Exception) -> str:
    """What another library says is wrong, without the pages that may follow."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def nearest(name: str, known: Iterable[str], count: int = 1) -> str:
    """`; did you mean this or that?`, where something known is like the name; else nothing."""
    matches = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""

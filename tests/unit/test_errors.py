"""What is said of a disk that takes no more."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from spinlm.errors import UserError, disk_trouble, writing


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/a"), "run/a: the disk is full. .*: make space, and run"),
        (OSError(errno.EDQUOT, "quota"), "run: the disk is full"),
        (OSError(errno.ENOSPC, "full", "a", None, "run/link"), "run/link: the disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "run/a"), "run/a: Read-only file system. .*: see to it"),
        (OSError(errno.EIO, "Input/output error"), "run: Input/output error"),
        (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"), "run: the disk is full"),
        (Exception("No space left on device (os error 28)"), "run: the disk is full"),
    ],
)
def test_where_and_what_to_do(error: Exception, words: str) -> None:
    with pytest.raises(UserError, match=f"^{words}"), writing(Path("run")):
        raise error


@pytest.mark.parametrize(
    "error", [ValueError(), FileNotFoundError(errno.ENOENT, "x"), UserError("No space left on device")]
)
def test_anything_else_is_not_meant(error: Exception) -> None:
    assert disk_trouble(error, "run") is None
    with pytest.raises(type(error)), writing(Path("run")):
        raise error

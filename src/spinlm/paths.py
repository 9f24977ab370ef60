"""Names that people give, which needn't be ones that anything can have: Path's own questions fail on some of them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def found(name: str | Path) -> Path | None:
    """The file or directory of that name; None where there is none, nor could be.

    Raises:
        OSError: It can't be told: a directory above it is closed to us.
    """
    try:
        os.stat(name)  # noqa: PTH116 (any text may be asked about)
    except ValueError:  # a NUL, a lone surrogate
        return None
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise
    return Path(name)


def expanded(name: str | Path) -> Path:
    """With `~` and `~somebody` written out, as far as there is such a person."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 (Path's own fails on ~nobody)

"""Files as a run keeps them: written whole or not at all, flushed to the disk, known by their hashes.

What isn't an artifact (a header, a record, a mark) is sealed: it holds the hash of what it says.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_OWN_HASH = "own_hash"


def canonical(value: Any) -> Any:
    """The value as JSON gives it back."""
    return json.loads(json.dumps(value, sort_keys=True))


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def copy(source: Path, place: Path) -> None:
    """What is in a file or a directory, without its permissions: it may be one that nobody may write."""
    if not source.is_dir():
        shutil.copyfile(source, place)
        return
    place.mkdir()
    for path in source.iterdir():
        copy(path, place / path.name)


def remove(place: Path) -> None:
    """A file, a link or a directory with all that is in it, where there is one."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def file_hashes(place: Path) -> dict[str, str]:
    """SHA-256 of each file of a directory by relative name, or of a single file under the name ``""``."""
    if place.is_file():
        return {"": file_hash(place)}
    files = sorted(path for path in place.rglob("*") if path.is_file())
    return {path.relative_to(place).as_posix(): file_hash(path) for path in files}


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Raises ValueError where it isn't JSON."""
    return parsed(path.read_bytes())


def parsed(content: bytes) -> Any:
    """JSON; raises ValueError where it isn't."""
    try:
        return json.loads(content.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file beside its place and rename it in. It is ASCII, which can hold any file's name."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it in."""
    make_directory(path.parent)
    beside = path.with_name(f".{path.name}")
    try:
        beside.write_text(text, encoding="utf-8")
        flush_to_disk(beside)
        flush_directory(path.parent)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the hash of what it says in it, so that it can be told whether it was changed."""
    return {**content, _OWN_HASH: digest(content)}


def unsealed(content: Any) -> dict[str, Any]:
    """What a sealed object says.

    Raises:
        ValueError: It isn't what was sealed.
    """
    said = {name: value for name, value in content.items() if name != _OWN_HASH} if isinstance(content, dict) else {}
    if not said or digest(said) != content.get(_OWN_HASH):
        raise ValueError("its own hash differs")
    return said


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows to a file that is still in staging."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def add_to_log(path: Path, row: Mapping[str, Any]) -> None:
    """Add a sealed row to a JSONL file, on a line of its own even where the one before was cut short."""
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(sealed(row)).encode() + b"\n")


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Those rows of a log that are what was written."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            yield unsealed(json.loads(line))


def make_directory(path: Path) -> None:
    """Make a directory and those above it, and see to it that they stay after a power cut."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        flush_directory(directory.parent)


def flush_to_disk(place: Path) -> None:
    """fsync a file, or every file of a directory and the directories themselves."""
    paths = [place, *place.rglob("*")] if place.is_dir() else [place]
    for path in paths:
        if path.is_dir():
            flush_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """fsync a directory: the names in it, not what they stand for."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)

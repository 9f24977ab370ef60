"""Where rows come from: local files, the hub, reasoning-gym. What a row means is for `formats` to say."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from spinlm.config import DataSection, ReasoningGymSection
from spinlm.errors import UserError, first_line, nearest
from spinlm.paths import expanded, found

REASONING_GYM = "reasoning_gym:"

UNUSABLE_TASKS = {
    "codeio": "it makes other entries each time",
    "coin_flip": "its verifier accepts the answer 0 to any question",
    "game_of_life_halting": "its verifier accepts any text",
    "puzzle24": "its verifier doesn't check that the numbers are the given ones",
}
"""reasoning-gym tasks on which a measured accuracy would mean nothing (as of 0.1.25)."""

TASKS_BY_HASH_SEED = frozenset(
    {
        "intermediate_integration",
        "isomorphic_strings",
        "knight_swap",
        "polynomial_multiplication",
        "ransom_note",
        "word_ladder",
    }
)
"""reasoning-gym tasks that draw from sets, so that their entries depend on PYTHONHASHSEED too (as of 0.1.25)."""


@dataclass(frozen=True)
class Row:
    """One row of a dataset.

    Attributes:
        place: Where it stands: `file.jsonl:12` by line, `file.json[3]` by index from 0.
        columns: Its values, by column.
        verifier: What makes its reasoning-gym entry again: `task`, `size`, `seed`, `args`, `index`,
            and the `sha256` by which the entry is known to be the same.
    """

    place: str
    columns: dict[str, Any]
    verifier: dict[str, Any] | None = None


def read_rows(section: DataSection) -> list[Row]:
    """Every row of `section.source`, always in the same order.

    Raises:
        UserError: There is no such file, directory, task or hub dataset, it can't be read, or it is empty.
    """
    try:
        rows = _rows_of(section)
    except OSError as error:
        place = error.filename or section.source
        raise UserError(f"data.source: {place}: can't be read: {error.strerror or error}") from None
    if not rows:
        raise UserError(f"data.source: {section.source}: there are no rows in it")
    return rows


def local(section: DataSection) -> Path | None:
    """The file or directory that `section.source` names; None where that isn't here."""
    return found(expanded(section.source))


def _rows_of(section: DataSection) -> list[Row]:
    source, path = section.source, local(section)
    if source.startswith(REASONING_GYM):
        return _rows_of_task(source.removeprefix(REASONING_GYM), section.reasoning_gym)
    if path is not None:
        if path.is_dir():
            return _rows_of_directory(path)
        if path.is_file():
            return _rows_of_file(path)
        raise UserError(f"data.source: {source}: neither a file nor a directory")
    if _looks_like_a_path(source):
        path = expanded(source)
        near = nearest(path.name, [p.name for p in path.parent.glob("*")])
        raise UserError(f"data.source: {source}: no such file or directory{near}")
    return _rows_of_hub(section)


def reasoning_gym_task(task: str, size: int, seed: int, args: dict[str, Any]) -> Any:
    """The reasoning-gym dataset of these arguments, made once.

    Raises:
        UserError: reasoning-gym isn't installed, or doesn't know the task or its arguments.
    """
    try:
        canonical_args = json.dumps(args, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"data.reasoning_gym.args: only what JSON can hold: {error}") from None
    return _cached_task(task, size, seed, canonical_args)


def fingerprint(entry: dict[str, Any]) -> str:
    """Tells a reasoning-gym entry from another one at the same index."""
    return hashlib.sha256(f"{entry['question']}\0{entry['answer']}".encode()).hexdigest()


# Files


def files_in(directory: Path) -> list[Path]:
    """Those that the rows of a directory are read from, in order."""
    return sorted(p for p in directory.iterdir() if p.suffix.lower() in _READERS and not p.name.startswith("."))


def _rows_of_directory(directory: Path) -> list[Row]:
    files = files_in(directory)
    if not files:
        raise UserError(f"data.source: {directory}: no file in it ends in {_suffixes()}")
    return [row for file in files for row in _rows_of_file(file)]


def _rows_of_file(path: Path) -> list[Row]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"data.source: {path}: can't tell what it holds; name it with one of {_suffixes()}")
    return reader(path)


def _rows_of_json(path: Path) -> list[Row]:
    text = _text(path)
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON Lines under the other name
            return _rows_of_lines(path)
        raise UserError(f"{path}: line {error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    rows = _list_in(document, path)
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}: [{index}] is {_kind(row)}: every row has to be an object of columns")
    return [Row(f"{_name(path)}[{index}]", row) for index, row in enumerate(rows)]


def _list_in(document: Any, path: Path) -> list[Any]:
    """The rows: the document itself, or the one list in it."""
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds {_kind(document)}: give a list of objects")
    lists = {key: value for key, value in document.items() if isinstance(value, list)}
    if len(lists) != 1:
        found = f"{len(lists)} lists in it ({', '.join(lists)})" if lists else "no list in it"
        raise UserError(f"{path}: an object with {found}: give a list of objects, or an object with one list inside")
    return next(iter(lists.values()))


def _rows_of_lines(path: Path) -> list[Row]:
    return list(_parsed_lines(path))


def _parsed_lines(path: Path) -> Iterator[Row]:
    # Not splitlines(), which would also cut at characters like U+2028 that may stand inside a JSON string.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number}: not valid JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is {_kind(row)}: every line has to be an object of columns")
        yield Row(f"{_name(path)}:{number}", row)


def _rows_of_csv(path: Path) -> list[Row]:
    text = _text(path)
    limit = csv.field_size_limit(2**31 - 1)  # a response may well be longer than csv's own 128 KiB
    try:
        return list(_parsed_csv(csv.reader(io.StringIO(text, newline=""), strict=True), path))
    finally:
        csv.field_size_limit(limit)


def _parsed_csv(reader: Any, path: Path) -> Iterator[Row]:
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1  # where the record begins; it may go over several lines
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}: line {line}: not valid CSV: {error}") from None
        if not record:
            continue
        if header is None:
            header = record
            if len(set(header)) < len(header):
                raise UserError(f"{path}: line {line}: two columns have the same name: {', '.join(header)}")
        elif len(record) != len(header):
            raise UserError(f"{path}: line {line}: {len(record)} fields, but the header names {len(header)} columns")
        else:
            yield Row(f"{_name(path)}:{line}", dict(zip(header, record, strict=True)))


def _rows_of_parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: Parquet files need pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = file.read().to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {first_line(error)}") from None
    return [Row(f"{_name(path)}[{index}]", row) for index, row in enumerate(rows)]


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".json": _rows_of_json,
    ".jsonl": _rows_of_lines,
    ".ndjson": _rows_of_lines,
    ".csv": _rows_of_csv,
    ".parquet": _rows_of_parquet,
}


def _name(path: Path) -> str:
    """The file's, as text, which on a disk it needn't be."""
    return os.fsencode(path.name).decode(errors="backslashreplace")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason}): save it as UTF-8") from None


def _looks_like_a_path(source: str) -> bool:
    path = Path(source)
    return path.suffix.lower() in _READERS or path.is_absolute() or source.startswith((".", "~")) or "\\" in source


# The hub


def commit_of(section: DataSection) -> str | None:
    """The commit that a dataset on the hub is read at; None for one that isn't there, or where it isn't known.

    Raises:
        UserError: It can't be had.
    """
    if section.source.startswith(REASONING_GYM) or _looks_like_a_path(section.source) or local(section):
        return None
    files = _hub_dataset(section.source, section.config, section.split, section.revision).cache_files
    names = {Path(file["filename"]).parent.name for file in files}  # the library's own, by commit
    return next((name for name in names if re.fullmatch("[0-9a-f]{40}", name)), None)


def _rows_of_hub(section: DataSection) -> list[Row]:
    try:
        dataset = _hub_dataset(section.source, section.config, section.split, section.revision)
        commit, wanted = commit_of(section), section.revision or ""
        if commit is not None and re.fullmatch("[0-9a-f]{40}", wanted) and commit != wanted:
            raise ValueError(f"not at hand: without the hub the datasets library takes what it has, {commit}")
        return [Row(f"{section.source}[{index}]", dict(row)) for index, row in enumerate(dataset)]
    except ImportError:
        raise UserError(
            f"data.source: {section.source}: not a file or directory here, and datasets from the hub need "
            "the datasets library: pip install datasets"
        ) from None
    except Exception as error:  # a name, a configuration, a split, a network, a login, a broken file
        tried = f"split {section.split}" + (f" of configuration {section.config}" if section.config else "")
        tried += f" at {section.revision}" if section.revision else ""
        raise UserError(
            f"data.source: {section.source}: not a file or directory here, and the hub said: "
            f"{first_line(error)} (asked for {tried})"
        ) from None


@lru_cache(maxsize=1)
def _hub_dataset(source: str, config: str | None, split: str, revision: str | None) -> Any:
    from datasets import load_dataset

    return load_dataset(source, config, split=split, revision=revision)


# reasoning-gym


def _rows_of_task(task: str, section: ReasoningGymSection) -> list[Row]:
    _refuse_unusable(task)
    dataset = reasoning_gym_task(task, section.size, section.seed, section.args)
    recipe = {"task": task, "size": section.size, "seed": section.seed, "args": section.args}
    return [
        Row(
            f"{task}[{index}]",
            {"question": entry["question"], "answer": entry["answer"]},
            {**recipe, "index": index, "sha256": fingerprint(entry)},
        )
        for index, entry in enumerate(_entries(dataset, task, section.size))
    ]


def _refuse_unusable(task: str) -> None:
    if task in UNUSABLE_TASKS:
        raise UserError(f"data.source: {REASONING_GYM}{task}: not usable: {UNUSABLE_TASKS[task]}; take another task")
    if task in TASKS_BY_HASH_SEED and not os.environ.get("PYTHONHASHSEED", "random").isdigit():
        raise UserError(
            f"data.source: {REASONING_GYM}{task}: its entries are other ones in each process, so a run couldn't be "
            "continued: set PYTHONHASHSEED=0 in the environment, and keep it"
        )


def _entries(dataset: Any, task: str, size: int) -> Iterator[dict[str, Any]]:
    for index in range(size):
        try:
            yield dataset[index]
        except Exception as error:  # whatever the task's own code comes to with these arguments
            raise _bad_args(task, error, f" at entry {index}") from None


@lru_cache(maxsize=8)
def _cached_task(task: str, size: int, seed: int, canonical_args: str) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError(f"{REASONING_GYM}{task}: needs reasoning-gym: pip install reasoning-gym") from None
    if task not in DATASETS:
        raise UserError(f"data.source: {REASONING_GYM}{task}: no such task{nearest(task, DATASETS, count=3)}")
    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed, **json.loads(canonical_args))
    except Exception as error:  # each task checks its arguments in its own way
        raise _bad_args(task, error) from None


def _bad_args(task: str, error: Exception, where: str = "") -> UserError:
    return UserError(
        f"data.reasoning_gym.args: {task} doesn't take them{where}: {first_line(error)}; "
        f"the fields of its configuration in reasoning-gym are what it takes"
    )


# Words


def _suffixes() -> str:
    return ", ".join(_READERS)


def _kind(value: Any) -> str:
    """What a value read from JSON is, in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)

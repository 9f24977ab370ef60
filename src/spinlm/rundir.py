"""The run directory: what is committed, from which inputs and under which hash, and who holds the lock.

Every artifact (a file or a directory) is written in `.staging/`, renamed to its place, and then recorded in
`commits/` with the SHA-256 of each of its files. Only what is recorded counts: an artifact without a
record was interrupted and is made anew; a record whose files are missing or differ is an error that
names them. An artifact's record also keeps its inputs (the recipe's values and the hashes of the
artifacts it was made from): where they no longer hold, it is made anew too.

A run directory may come from somebody else. Nothing in it is followed out of it: a link that leads elsewhere, a
name with `..` in it and whatever isn't a file are refused before anything is read or written.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import socket
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from spinlm.config import Recipe, recipe_from
from spinlm.errors import UserError, disk_trouble, first_line
from spinlm.files import (
    canonical,
    copy,
    digest,
    file_hashes,
    flush_directory,
    flush_to_disk,
    make_directory,
    parsed,
    read_json,
    remove,
    sealed,
    unsealed,
    write_json,
)

Inputs = Mapping[str, Any]
"""What an artifact is made from: JSON values and the hashes of other artifacts."""


STOPPED = "stopped.json"
"""The artifact that says after how many iterations the loop ended, where that wasn't the last, and why."""

TIMINGS = "timings.jsonl"
"""Seconds and tokens of each stage, a sealed row for each time that something was done."""

_HEADER = "run.json"
ORIGIN = "origin.json"
"""The file in `data` that says at which commits a model and a dataset were read from the hub."""

TRACKERS = "trackers"
"""Where trackers write their files, by training."""

_PART = ".part"


class CorruptArtifact(UserError):
    """A committed artifact whose files are missing or are not what was committed."""


@dataclass(frozen=True)
class Artifact:
    """One thing a run makes, at its place in the run directory.

    Attributes:
        run: The run directory.
        key: Its path within the run directory.
        stage: The stage that makes it, for messages.
        inputs: What it is made from.
    """

    run: RunDir
    key: str
    stage: str
    inputs: Inputs

    @property
    def path(self) -> Path:
        return self.run.path / self.key

    @property
    def hash(self) -> str:
        """SHA-256 over its files' hashes; it must be committed."""
        return self.run.hash(self.key)

    def is_committed(self) -> bool:
        """Whether it is there, whole, and made from these inputs; else it has to be made.

        Raises:
            CorruptArtifact: It was committed, but its files aren't what was committed.
        """
        if not self.run.has_record(self.key):
            return self.run.forked_from is not None and self._adopt(self.run.forked_from)
        if self.run.record(self.key, self.stage)["inputs"] != canonical(self.inputs):
            return False
        self.run.verify(self.key)
        return True

    def changed_inputs(self) -> list[str]:
        """The names of those inputs that aren't what a committed artifact was made from; none where it isn't there."""
        if not self.run.has_record(self.key):
            return []
        recorded, wanted = self.run.record(self.key, self.stage)["inputs"], canonical(self.inputs)
        return sorted(key for key in recorded.keys() | wanted.keys() if recorded.get(key) != wanted.get(key))

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A place to write it; on leaving, it is committed."""
        staging_root = self.run.path / ".staging"
        make_directory(staging_root)
        place = Path(tempfile.mkdtemp(dir=staging_root)) / self.path.name
        try:
            yield place
            self._commit(place)
        except FileNotFoundError:
            self.run.check_lock()  # or has another process swept it away?
            raise
        finally:
            shutil.rmtree(place.parent, ignore_errors=True)

    def _commit(self, written: Path) -> None:
        files = file_hashes(written)
        flush_to_disk(written)
        self.run.check_lock()
        self.run.forget(self.key)
        make_directory(self.path.parent)
        written.rename(self.path)
        flush_directory(self.path.parent)
        record = {
            "key": self.key,
            "stage": self.stage,
            "hash": digest(files),
            "inputs": canonical(self.inputs),
            "files": files,
        }
        write_json(self.run.record_path(self.key), sealed(record))

    def _adopt(self, other: RunDir) -> bool:
        """Take the same artifact from the run this one was forked from, where it still holds."""
        try:
            if not other.has_record(self.key) or other.record(self.key)["inputs"] != canonical(self.inputs):
                return False
            other.verify(self.key)
        except CorruptArtifact:
            self.run.say(f"{other.path / self.key}: not what was committed there, so it isn't taken over")
            return False
        with self.staging() as place:
            copy(other.path / self.key, place)
        return True


class RunDir:
    """A directory that holds one run.

    Attributes:
        say: Who hears what isn't an error.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError where there is a run with something in it that leads out of the directory."""
        self.path = path
        self.say: Callable[[str], None] = lambda _: None
        self._lock: FileIO | None = None
        if self.exists():
            _refuse_ways_out(path)

    # --- the run itself ---

    def exists(self) -> bool:
        return os.path.isfile(self.path / _HEADER)  # noqa: PTH113 (Path's own fails on a name that is too long)

    @cached_property
    def forked_from(self) -> RunDir | None:
        """The run that this one takes over from what still holds; None where none is there (any more)."""
        source = self.header()["forked_from"] if self.exists() else None
        run = None if source is None else RunDir(Path(source))
        return run if run is not None and run.exists() else None  # without a header nothing has looked for ways out

    def header(self) -> dict[str, Any]:
        """`run.json`: the recipe, the versions, what it was forked from.

        Raises:
            UserError: There is no run here.
            CorruptArtifact: Its header isn't what was written.
        """
        path = self.path / _HEADER
        remedy = "Restore it, or let spinlm run RECIPE --repair make it anew from the recipe that you give"
        try:
            header = unsealed(read_json(path))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.path}: not a run directory (it has no run.json)") from None
        except OSError as error:
            raise UserError(f"{path}: can't be read: {error.strerror}") from None
        except ValueError as error:
            raise CorruptArtifact(f"{path}: not what was written: {first_line(error)}. {remedy}") from None
        if missing := {"recipe", "versions", "forked_from"} - header.keys():
            raise CorruptArtifact(f"{path}: has no {', '.join(sorted(missing))}. {remedy}")
        for name, kind in (("recipe", dict), ("versions", dict), ("forked_from", (str, type(None)))):
            if not isinstance(header[name], kind):
                raise CorruptArtifact(f"{path}: its {name} isn't one. {remedy}")
        return header

    def recipe(self) -> Recipe:
        """The recipe that the run was started with."""
        return recipe_from(self.header()["recipe"], where=str(self.path / _HEADER))

    def begin(
        self, recipe: Recipe, versions: Mapping[str, str], forked_from: Path | None = None, repair: bool = False
    ) -> list[str]:
        """Start a run here, or go on with the one that is.

        Args:
            recipe: What to do.
            versions: Of what decides the run's numbers.
            forked_from: The run that a new one takes over from.
            repair: Write a header anew that isn't what was written, and forget what isn't what was committed.

        Returns:
            What was broken: the keys of artifacts, and `run.json`.

        Raises:
            UserError: It is a run of another recipe.
        """
        broken = [_HEADER] if repair and self.exists() and not self._has_whole_header() else []
        if not self.exists() or not self._record_paths() or broken:
            header = {
                "recipe": recipe.model_dump(mode="json"),
                "versions": dict(versions),
                "forked_from": str(forked_from.resolve()) if forked_from else None,
            }
            write_json(self.path / _HEADER, sealed(header))
        self._check_recipe(recipe)
        return broken + (self.repair() if repair else [])

    def _has_whole_header(self) -> bool:
        try:
            self.header()
        except CorruptArtifact:
            return False
        return True

    def _check_recipe(self, recipe: Recipe) -> None:
        differing = self.recipe().differences(recipe)
        if differing:
            raise UserError(
                f"{self.path}: was started with another recipe. These keys differ (there -> here):\n  "
                + "\n  ".join(differing)
                + "\nUse the same recipe to go on, or --fork NEW_RUN to start a new run from the artifacts "
                "that still hold."
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run; a process that dies lets it go.

        Raises:
            UserError: Another process holds it, or the directory can't be written or holds something else.
        """
        others = [entry for entry in self.path.glob("*") if entry.name not in ("lock", f".{_HEADER}")]
        if others and not self.exists():  # asked last: another process may be starting the run
            raise UserError(f"{self.path}: holds files but no run; give an empty or new directory as run_dir")
        _refuse_ways_out(self.path)
        self._lock = self._take_lock()
        try:
            self._sweep()
            yield
        finally:
            if self._holds_lock():
                shutil.rmtree(self.path / ".staging", ignore_errors=True)
            with suppress(OSError), self._lock:  # a disk that fails here has said so already
                self._lock.truncate(0)
            self._lock = None

    def _take_lock(self) -> FileIO:
        try:
            make_directory(self.path)
            lock = (self.path / "lock").open("a+b", buffering=0)
        except OSError as error:
            raise disk_trouble(error, self.path) or UserError(f"{self.path}: can't write there: {error}") from None
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            with lock:
                lock.seek(0)
                holder = lock.read().decode(errors="replace").strip()
            raise UserError(
                f"{self.path}: another process is running this ({holder}). Wait for it, or stop it first."
            ) from None
        except OSError as error:
            lock.close()
            raise UserError(
                f"{self.path}: its file system has no locks ({error.strerror}), without which two processes could run "
                "this at once: put run_dir on another one"
            ) from None
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        return lock

    def check_lock(self) -> None:
        """See to it that the run is still held, where this process took it: somebody may have removed the lock's file.

        Raises:
            UserError: Another process has started the run since.
        """
        if self._lock is None or self._holds_lock():
            return
        if (self.path / "lock").exists():
            raise UserError(
                f"{self.path}/lock: was removed, and another process has started this run since. This one ends here; "
                "nothing committed is lost."
            )
        taken = self._take_lock()
        self._lock.close()
        self._lock = taken

    def _holds_lock(self) -> bool:
        """Whether the file that this process has locked is the one that others would lock."""
        assert self._lock is not None
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._lock.fileno()), (self.path / "lock").stat())
        return False

    def _sweep(self) -> None:
        """Remove what a killed process has left half-written."""
        shutil.rmtree(self.path / ".staging", ignore_errors=True)
        for part in self.path.glob(f".*{_PART}"):
            part.unlink(missing_ok=True)

    def is_running(self) -> bool:
        """Whether another process holds the run. Asked without touching the lock, which a run may be about to take.

        Never ask this in the process that holds the run: closing the file here would let go of its lock.
        """
        try:
            with (self.path / "lock").open("rb") as lock:
                return _is_held(lock)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def put(self, name: str, text: str) -> Path:
        """Write a file that can be made from the artifacts at any time: whole or not at all, and without a record."""
        beside = self.path / f".{name}.{os.getpid()}{_PART}"  # others may be writing it too
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(self.path / name)
        finally:
            beside.unlink(missing_ok=True)
        return self.path / name

    # --- artifacts ---

    def artifact(self, key: str, stage: str, inputs: Inputs) -> Artifact:
        return Artifact(self, key, stage, inputs)

    def checkpoints(self, key: str) -> Path:
        """Where the training that makes this artifact keeps its checkpoints until it is committed."""
        return self.path / "checkpoints" / key

    def remove_checkpoints(self, key: str) -> None:
        """They have served once their training is committed."""
        shutil.rmtree(self.checkpoints(key), ignore_errors=True)
        for directory in (self.checkpoints(key).parent, self.path / "checkpoints"):
            with suppress(OSError):
                directory.rmdir()

    def record_path(self, key: str) -> Path:
        return self.path / "commits" / (key.replace("/", "--") + ".json")

    def has_record(self, key: str) -> bool:
        return self.record_path(key).is_file()

    def record(self, key: str, stage: str | None = None) -> dict[str, Any]:
        """An artifact's record.

        Args:
            key: The artifact's.
            stage: What makes it, where that is known, for messages.

        Raises:
            CorruptArtifact: The record isn't what was written.
        """
        path = self.record_path(key)
        try:
            record = unsealed(read_json(path))
            whole = _is_record(record, key)
        except (ValueError, OSError):
            whole = False
        if not whole:
            raise CorruptArtifact(f"{path}: not what was committed. {self._remedy(stage)}")
        return record

    def hash(self, key: str) -> str:
        """A committed artifact's hash."""
        return str(self.record(key)["hash"])

    def keys(self, beginning: str = "") -> list[str]:
        """The keys of all commits, in order, or of those that begin so.

        Raises:
            CorruptArtifact: A record's name leads out of the run directory.
        """
        keys = []
        for path in self._record_paths():
            key = path.stem.replace("--", "/")
            if not {"", ".", ".."}.isdisjoint(key.split("/")):
                raise CorruptArtifact(f"{path}: the record of nothing that a run makes: delete it")
            keys.append(key)
        return [key for key in keys if key.startswith(beginning)]

    def records(self) -> list[dict[str, Any]]:
        """All commits, by key."""
        return [self.record(key) for key in self.keys()]

    def _record_paths(self) -> list[Path]:
        """Those that are written to their end: one that is being written begins with a dot."""
        return sorted((self.path / "commits").glob("[!.]*.json"))

    def committed(self, key: str, name: str = "") -> bytes:
        """A committed artifact's file, as it was committed.

        Args:
            key: The artifact's.
            name: Of the file within it, where it is a directory.

        Raises:
            CorruptArtifact: It is missing or isn't what was committed.
        """
        record, path = self.record(key), self.path / key / name
        try:
            content = path.read_bytes()
        except OSError:
            raise self._corrupt(path, None, record) from None
        found = hashlib.sha256(content).hexdigest()
        if found != record["files"].get(name):
            raise self._corrupt(path, found, record)
        return content

    def committed_json(self, key: str, name: str = "") -> Any:
        """A committed JSON file; raises as `committed`, and where it isn't JSON."""
        return self._parsed(key, name, [self.committed(key, name)])[0]

    def committed_rows(self, key: str, name: str = "") -> list[dict[str, Any]]:
        """The rows of a committed JSONL file; raises as `committed`, and where it isn't JSONL."""
        return self._parsed(key, name, self.committed(key, name).splitlines())

    def _parsed(self, key: str, name: str, parts: list[bytes]) -> list[Any]:
        try:
            return [parsed(part) for part in parts]
        except ValueError as error:
            stage = self.record(key)["stage"]
            raise CorruptArtifact(f"{self.path / key / name}: not JSON: {error}. {self._remedy(stage)}") from None

    def origin(self) -> dict[str, str]:
        """The commits on the hub that the model and the dataset were read at, as far as they are from there."""
        if not self.has_record("data") or ORIGIN not in self.record("data")["files"]:
            return {}
        found = self.committed_json("data", ORIGIN)
        commits = found.items() if isinstance(found, dict) else ()
        return {what: one for what, one in commits if isinstance(one, str) and re.fullmatch("[0-9a-f]{40}", one)}

    def recorded_input(self, name: str) -> Any:
        """What some artifact was made from, by the first record that names it; None where none does."""
        for key in self.keys():
            with suppress(CorruptArtifact):
                inputs = self.record(key)["inputs"]
                if name in inputs:
                    return inputs[name]
        return None

    def verify(self, key: str) -> None:
        """Check a committed artifact's files against its record.

        Raises:
            CorruptArtifact: A file is missing, differs, or is one too many.
        """
        record = self.record(key)
        place = self.path / key
        if not place.exists():
            raise CorruptArtifact(f"{place}: missing, though it was committed. {self._remedy(record['stage'])}")
        found = file_hashes(place)
        for name in sorted(found.keys() | record["files"].keys()):
            if found.get(name) != record["files"].get(name):
                raise self._corrupt(place / name, found.get(name), record)

    def forget(self, key: str) -> None:
        """Remove an artifact and its record, the record first."""
        if self.has_record(key):
            self.record_path(key).unlink()
            flush_directory(self.record_path(key).parent)
        remove(self.path / key)

    def repair(self, *beginnings: str) -> list[str]:
        """Forget every artifact (or those whose keys begin so) that isn't what was committed: it is made anew."""
        broken = []
        for key in self.keys():
            if not key.startswith(beginnings or ""):
                continue
            try:
                self.verify(key)
            except CorruptArtifact:
                self.forget(key)
                broken.append(key)
        return broken

    def _corrupt(self, path: Path, found: str | None, record: Mapping[str, Any]) -> CorruptArtifact:
        what = "missing" if found is None else "not what was committed (its SHA-256 differs)"
        return CorruptArtifact(f"{path}: {what}. {self._remedy(record['stage'])}")

    def _remedy(self, stage: str | None) -> str:
        which = f"The stage {stage!r}" if stage else "Its stage"
        command = "spinlm evaluate" if stage == "benchmark" else "spinlm run"
        return f"{which} makes it anew: {command} with --repair."

    def point(self, name: str, key: str) -> None:
        """Let `latest` or `best` point to an artifact."""
        staging = self.path / f".{name}"
        staging.unlink(missing_ok=True)
        staging.symlink_to(key)
        staging.replace(self.path / name)
        flush_directory(self.path)


_MALFORMED = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    IsADirectoryError,
    NotADirectoryError,
)
"""What comes of values that have another shape than is expected."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What files come to that aren't a run's, though their records fit, as one message.

    Raises:
        UserError: With what is wrong and where that came up, for it may be a bug of ours.
    """
    try:
        yield
    except _MALFORMED as error:
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        what = f"{type(error).__name__}: {first_line(error)}, at {Path(frame.f_code.co_filename).name}:{line}"
        raise UserError(
            f"{path}: holds something that no run writes ({what}). Where nobody has changed it, that is a bug of ours: "
            "SPINLM_TRACEBACK=1 in the environment shows where it comes from"
        ) from error


def _refuse_ways_out(directory: Path) -> None:
    """Refuse a run directory from which a link leads elsewhere, or in which opening something could take for ever.

    What is in `trackers/` is theirs, W&B's links to its own logs among it: nothing of it is opened here.

    Raises:
        UserError: With its name.
    """
    root, left = os.path.realpath(directory), [os.fspath(directory)]
    trackers = os.fspath(directory / TRACKERS)
    while left:
        for entry in _entries(left.pop()):
            if entry.is_symlink():
                refuse_way_out(entry.path, root)
            elif entry.is_dir(follow_symlinks=False):
                left += [] if entry.path == trackers else [entry.path]
            elif not entry.is_file(follow_symlinks=False):
                raise UserError(f"{entry.path}: neither a file nor a directory: delete it")


def _entries(directory: str) -> list[os.DirEntry[str]]:
    """What is in it; nothing where it isn't there: a run that is going on moves its files."""
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{directory}: can't be searched for links out of the run: {error.strerror}") from None


def refuse_way_out(link: Path | str, root: Path | str) -> None:
    """Refuse a place in a run directory that a link has led out of it.

    Raises:
        UserError: With where it leads.
    """
    target = os.path.realpath(link)
    if not Path(target).is_relative_to(os.path.realpath(root)):
        raise UserError(
            f"{link}: a link out of the run directory, to {target}: delete it, or put there what it points to"
        )


def _is_record(record: Mapping[str, Any], key: str) -> bool:
    """Whether an artifact's record has all that one has."""
    kinds = {"key": str, "stage": str, "hash": str, "inputs": dict, "files": dict}
    return record.get("key") == key and all(isinstance(record.get(name), kind) for name, kind in kinds.items())


def _is_held(lock: BinaryIO) -> bool:
    """Whether another process has locked a file, by the system's `struct flock`; on a Mac its type comes fourth."""
    layout, place = ("@qqihh", 3) if sys.platform == "darwin" else ("@hhqqi", 0)
    asked = [0] * 5
    asked[place] = fcntl.F_WRLCK
    answer = fcntl.fcntl(lock, fcntl.F_GETLK, struct.pack(layout, *asked))
    return bool(struct.unpack(layout, answer)[place] != fcntl.F_UNLCK)

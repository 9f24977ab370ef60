"""What counts is on the disk before it counts; neither hard links nor clocks nor the times of files are relied on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath

import pytest

from faults.starts import Call, Starts
from integration.command import differing, rows, succeeded
from spinlm.rundir import RunDir

RUN = ("run", "recipe.yaml", "evaluation.control=true")
HOUR = 3600

NOT_COUNTED = ("report.html", "metrics.jsonl", "report.md")
"""What can be made anew at any time."""


@pytest.fixture(scope="module")
def recorded(disk: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Call]]:
    """A run where there are no hard links and the clock goes back an hour whenever it is read; and all it has done."""
    place = tmp_path_factory.mktemp("recorded")
    for name in ("model", "data.jsonl", "recipe.yaml"):
        (place / name).symlink_to(finished / name)
    with Starts(disk, place) as starts:
        succeeded(starts(*RUN, links=False, seconds_back=HOUR))
        return place / "runs/recipe", starts.calls()


def test_without_hard_links_and_with_a_clock_that_goes_back(recorded: tuple[Path, list[Call]], finished: Path) -> None:
    run, _ = recorded
    assert differing(finished / "runs/recipe", run) == []
    assert all(row["seconds"] >= 0 for row in rows(run / "timings.jsonl"))


def test_everything_is_on_the_disk_before_it_is_committed(recorded: tuple[Path, list[Call]]) -> None:
    """Each file after its last write, and each directory that it, or its name, is in."""
    run, calls = recorded
    for at, call in enumerate(calls):
        if call.kind == "rename" and call.other not in NOT_COUNTED:
            for path in [call.place, *_files_of(run, call.other, call.place)]:
                assert _is_flushed(calls[:at], path), f"{path} before it became {call.other}"


def test_a_new_name_is_on_the_disk_before_what_relies_on_it(recorded: tuple[Path, list[Call]]) -> None:
    """An artifact's own and those of all directories above it before its record; all of them in the end."""
    run, calls = recorded
    named = {call.other: at for at, call in enumerate(calls) if call.kind == "rename"}
    committed = RunDir(run).keys()
    for key in committed:
        recorded_at = named[f"commits/{key.replace('/', '--')}.json"]
        assert named[key] < recorded_at
        assert _are_names_flushed(calls[:recorded_at], key), key
    for key in ("run.json", "best", "latest", *(f"commits/{path.name}" for path in (run / "commits").iterdir())):
        assert _are_names_flushed(calls, key), key


def test_a_checkpoint_before_its_mark_and_that_before_the_last_one_goes(recorded: tuple[Path, list[Call]]) -> None:
    _, calls = recorded
    marks = [at for at, call in enumerate(calls) if call.kind == "rename" and "/checkpoint-" in call.other]
    assert len(marks) == 3 + 3 + 6 + 9
    for at in marks:
        checkpoint, done = calls[at].other.removesuffix(".json"), calls[:at]
        written = {c.place for c in done if c.kind == "write" and c.place.startswith(f"{checkpoint}/")}
        names = {path for path in written if "/.tmp" not in path} | {f"{checkpoint}/adapter_model.safetensors"}
        assert len(names) > 5
        assert all(_is_flushed(done, path) for path in (*names, checkpoint))
        assert _are_names_flushed(done, checkpoint)
        after = calls[at + 1 :]
        removed = next(i for i, call in enumerate(after) if call.kind == "unlink" and "checkpoint-" in call.place)
        assert Call("fsync", _parent(checkpoint)) in after[:removed]


def test_an_export_before_it_has_its_name(disk: Path, copied: Path) -> None:
    with Starts(disk, copied, run="exported") as starts:
        succeeded(starts("export", "runs/recipe", "exported/out"))
        calls = starts.calls()
    named = calls.index(Call("rename", ".out.part", "out"))
    written = {f".out.part/{path.name}" for path in (copied / "exported/out").iterdir()}
    assert {f".out.part/{name}" for name in ("adapter_model.safetensors", "tokenizer.json", "README.md")} <= written
    for path in (*written, ".out.part"):
        assert _is_flushed(calls[:named], path), path
    assert _are_names_flushed(calls, "out")


@pytest.mark.slow
def test_a_record_is_gone_from_the_disk_before_what_it_is_of(disk: Path, copied: Path, finished: Path) -> None:
    (copied / "runs/recipe/layout.json").write_text("{}")
    with Starts(disk, copied) as starts:
        succeeded(starts(*RUN, "--repair"))
        calls = starts.calls()
    record, artifact = (calls.index(Call("unlink", name)) for name in ("commits/layout.json.json", "layout.json"))
    assert Call("fsync", "commits") in calls[record:artifact]
    assert differing(finished / "runs/recipe", copied / "runs/recipe") == []


@pytest.mark.parametrize("times", [pytest.param((0,), id="equal"), pytest.param((1, 4_000_000_000), id="far-off")])
@pytest.mark.slow
def test_nothing_depends_on_the_times_of_files(
    disk: Path, half_finished: Path, finished: Path, times: Sequence[int]
) -> None:
    """In the past and in the future; and the clock is an hour earlier at each reading."""
    paths = [half_finished / "recipe.yaml", half_finished / "data.jsonl", *sorted(half_finished.rglob("*/*"))]
    for number, path in enumerate(paths):
        os.utime(path, (times[number % len(times)],) * 2, follow_symlinks=False)
    with Starts(disk, half_finished) as starts:
        succeeded(starts(*RUN, seconds_back=HOUR))
    assert differing(finished / "runs/recipe", half_finished / "runs/recipe") == []


def _files_of(run: Path, key: str, staged: str) -> list[str]:
    """The files of what was renamed, by where they were before."""
    directory = RunDir(run)
    names = directory.record(key)["files"] if directory.has_record(key) else {}
    return [f"{staged}/{name}" for name in names if name]


def _is_flushed(calls: Sequence[Call], path: str) -> bool:
    """fsync came after the last write to a file, or after the last change of the names in a directory."""
    last = [call.kind for call in calls if call.place == path or _changes(call) == path]
    return last[-1:] in (["fsync"], ["symlink"])  # a link has nothing but its name


def _changes(call: Call) -> str | None:
    """The directory that it changes."""
    return None if call.kind in ("write", "truncate", "fsync") else _parent(call.other or call.place)


def _are_names_flushed(calls: Sequence[Call], path: str) -> bool:
    """Of a path and of all above it: the directory that a name is in was flushed after it came there."""
    for name in accumulate(path.split("/"), "{}/{}".format):
        came = [at for at, call in enumerate(calls) if name == (call.other or call.place) and _changes(call)]
        if not came or Call("fsync", _parent(name)) not in calls[came[-1] :]:
            return False
    return True


def _parent(name: str) -> str:
    return PurePosixPath(name).parent.as_posix()

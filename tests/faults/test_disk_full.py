"""A disk that is full at any write: one message, nothing corrupted, and the same command goes on when there is room."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from faults.starts import Call, Starts
from integration.command import Outcome, contents, differing, refused, succeeded
from spinlm.rundir import RunDir

RUN = ("run", "recipe.yaml", "evaluation.control=true")

Site = tuple[str, str]
"""A kind of call, and a pattern of its place."""

SOME = (
    ("write", ".staging/*/data/train.jsonl"),
    ("write", "timings.jsonl"),
    ("write", "checkpoints/sft/*/checkpoint-1/.tmp*"),  # adapter_model.safetensors, while safetensors writes it
    ("write", "checkpoints/sft/*/checkpoint-2/optimizer.pt"),
    ("fsync", ".staging/*/00001.jsonl"),
    ("write", "commits/.iterations--0--opponent_logprobs--00001.jsonl.json"),
    ("symlink", ".best"),
    ("write", ".report.md.*"),
    ("write", ".report.html.*"),
)
"""By Python, by safetensors, by torch; of an artifact, of a record, of what only tells of the run."""

WITHOUT_A_HURRY = (".metrics.jsonl.*", ".report.html.*", "timings.jsonl")
"""What only tells of the run doesn't stop it."""


@pytest.fixture
def starts(disk: Path, place: Path) -> Iterator[Starts]:
    with Starts(disk, place) as starts:
        yield starts


@pytest.mark.parametrize(
    "sites", [pytest.param(SOME[:3], id="some"), pytest.param(SOME[3:], id="others", marks=pytest.mark.slow)]
)
def test_at_a_write_of_each_kind(starts: Starts, place: Path, finished: Path, sites: Sequence[Site]) -> None:
    fill_at_each(starts, sites, place)
    assert differing(finished / "runs/recipe", place / "runs/recipe") == []


@pytest.mark.slow
def test_at_every_write(starts: Starts, place: Path, finished: Path) -> None:
    """Of every kind of call at every kind of place: about 250 of them, each found in the log of a whole run."""
    succeeded(starts(*RUN))
    sites = dict.fromkeys((call.kind, pattern_of(call.place)) for call in starts.calls() if call.kind != "unlink")
    assert len(sites) > 100
    shutil.rmtree(place / "runs")
    fill_at_each(starts, [site for site in sites if site[0] != "truncate"], place)
    assert differing(finished / "runs/recipe", place / "runs/recipe") == []


@pytest.mark.parametrize(
    ("arguments", "sites"),
    [
        pytest.param(
            ("export", "runs/recipe", "out"),
            [
                ("mkdir", ".out.part"),
                ("*", ".out.part/adapter_model.safetensors"),
                ("write", ".out.part/.adapter_config.json"),
                ("write", ".out.part/tokenizer.json"),
                ("write", ".out.part/README.md"),
                ("rename", ".out.part"),
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("export", "runs/recipe", "out", "--merge"),
            [("write", ".out.part/.tmp*"), ("create", ".out.part/config.json")],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("report", "runs/recipe", "--out", "page.html"), [("write", ".page.html")], marks=pytest.mark.slow
        ),
        pytest.param(
            ("report", "runs/recipe"),
            [("write", "runs/recipe/.metrics*"), ("write", "runs/recipe/.report.html*")],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("report", "runs/recipe", "runs/recipe2", "--out", "both.html"),
            [("write", ".both.html")],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_written_elsewhere_is_there_whole_or_not_at_all(
    disk: Path, copied: Path, arguments: tuple[str, ...], sites: Sequence[Site]
) -> None:
    if "runs/recipe2" in arguments:
        shutil.copytree(copied / "runs/recipe", copied / "runs/recipe2", symlinks=True)
    with Starts(disk, copied, run=".") as starts:
        for kind, place in sites:
            kinds = ("create", "write") if kind == "*" else (kind,)
            before = contents(copied, without=("calls.log",))
            outcome = starts(*arguments, full_from=[(one, place) for one in kinds])
            assert starts.was_full_from() is not None, (kind, place)
            full = "the disk is full" if arguments[0] == "export" else "can't be written: No space left on device"
            refused(outcome, f": {full}")
            assert contents(copied, without=("calls.log",)) == before
        succeeded(starts(*arguments))


def fill_at_each(starts: Starts, sites: Sequence[Site], place: Path) -> None:
    """A start for each site, where the disk is full from then on; and one to the end."""
    left = list(sites)
    while True:
        outcome = starts(*RUN, full_from=left)
        where = starts.was_full_from()
        if where is None:
            succeeded(outcome)
            break
        left = [site for site in left if not is_at(site, where)]
        check(outcome, where, place / "runs/recipe")
    assert left == []


def is_at(site: Site, call: Call) -> bool:
    return site[0] == call.kind and fnmatchcase(call.place, site[1])


def check(outcome: Outcome, where: Call, run: Path) -> None:
    """It says where and what to do, and whatever counts as committed is what was committed."""
    if outcome.code == 0:
        assert any(fnmatchcase(where.place, pattern) for pattern in WITHOUT_A_HURRY), where
        assert re.search(r"runs/recipe/\S+: not written: .*No space left on device", outcome.out), outcome.out
    else:
        message = refused(outcome, ": the disk is full. Nothing committed is lost: make space, and run ")
        assert message.startswith(("spinlm: runs/recipe", f"spinlm: {run}")), message
    directory = RunDir(run)
    keys = directory.keys()
    for key in keys:
        directory.verify(key)
    assert not list(run.glob("commits/.*"))


def pattern_of(place: str) -> str:
    """The same in another shard, iteration or start."""
    for random in (r"(?<=\.staging/)[^/]+", r"(?<=\.tmp)\w+", r"\b[0-9a-f]{12}\b", r"\d+", "base|sft|control"):
        place = re.sub(random, "*", place)
    return place

"""Trackers hold what training logged, at its step, in the run directory; after an interruption too."""

from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.command import (
    CHECKPOINTED,
    SHOWN,
    after,
    killed_at,
    rows,
    spinlm,
    succeeded,
    waiting_at,
)

NAMES = (
    "loss",
    "margin",
    "reward_accuracy",
    "logprob_real",
    "logprob_per_token_synthetic",
    "grad_norm",
    "learning_rate",
)
RUN = ("run", "recipe.yaml", "iterations=1", "sft=null")


def logged(run: Path) -> dict[tuple[int, str], float]:
    """What `training.jsonl` holds, by step and name."""
    return {
        (row["step"], name): row[name]
        for row in rows(run / "iterations/0/training.jsonl")
        for name in NAMES
        if name in row
    }


def in_event_files(folder: Path) -> list[tuple[int, str, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        events = accumulator.EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            found += [(event.step, tag.removeprefix("train/"), event.value) for event in events.Scalars(tag)]
    return found


def in_wandb_files(folder: Path) -> list[tuple[int, str, float]]:
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in _wandb_records(path):
            record = protocol.Record.FromString(content)
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            step = items.get("train/global_step")
            found += [(step, name.removeprefix("train/"), value) for name, value in items.items() if step is not None]
    return found


def _wandb_records(path: Path) -> Iterator[bytes]:
    """The log format of LevelDB: blocks of 32 KiB, records in parts, behind a header of 7 bytes."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def assert_holds(found: list[tuple[int, str, float]], run: Path) -> None:
    """Every number that was logged is there at its step, and no other number at that step."""
    expected = logged(run)
    assert expected
    for (step, name), value in expected.items():
        there = [v for s, n, v in found if (s, n) == (step, name)]
        assert there, (step, name)
        assert there == pytest.approx([value] * len(there), rel=1e-5, abs=1e-7), (step, name)
    assert {(step, name) for step, name, _ in found if name in NAMES} == set(expected)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "WANDB_DIR",
        "WANDB_NAME",
        "WANDB_PROJECT",
        "WANDB_RUN_ID",
        "WANDB_RUN_GROUP",
        "TENSORBOARD_LOGGING_DIR",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


BOTH = "training.report_to=[tensorboard,wandb]"


def test_each_training_has_its_own(place: Path, offline: None) -> None:
    succeeded(spinlm("run", "recipe.yaml", BOTH, "sft.report_to=wandb", cwd=place))
    trackers = place / "runs/recipe/trackers"
    assert_holds(in_event_files(trackers / "iterations/0"), place / "runs/recipe")
    assert_holds(in_wandb_files(trackers / "iterations/0"), place / "runs/recipe")
    assert {step for step, name, _ in in_wandb_files(trackers / "sft") if name == "loss"} == {1, 2, 3}
    assert len([step for step, name, _ in in_wandb_files(trackers / "iterations/1") if name == "margin"]) == 6
    assert not in_event_files(trackers / "sft")
    runs = {path.name.rpartition("-")[2] for path in trackers.glob("**/offline-run-*")}
    assert len(runs) == 3
    assert not (place / "wandb").exists()


def test_after_an_interruption(place: Path, offline: None) -> None:
    """Stopped by Ctrl-C in step 2 of 3: it goes on from there, as the tracker's same run."""
    waiting = waiting_at("iteration 0: train 1 3", (*RUN, BOTH), place, call=SHOWN)
    os.kill(waiting.pid, signal.SIGINT)
    assert waiting.go_on().code == 130
    succeeded(spinlm(*RUN, BOTH, cwd=place))

    trackers = place / "runs/recipe/trackers/iterations/0"
    assert len(list(trackers.glob("events.out.tfevents.*"))) == 2
    assert_holds(in_event_files(trackers), place / "runs/recipe")
    assert_holds(in_wandb_files(trackers), place / "runs/recipe")
    folders = sorted(trackers.glob("wandb/offline-run-*"))
    assert len(folders) == 2
    assert len({path.name.rpartition("-")[2] for path in folders}) == 1


@pytest.mark.slow
def test_killed_outright_event_files_hold_all_of_it(place: Path) -> None:
    """W&B keeps its last lines in memory for a while; TensorBoard doesn't."""
    arguments = (*RUN, "training.report_to=tensorboard")
    killed_at(after(CHECKPOINTED, "iterations/0/.*/checkpoint-2.json"), None, arguments=arguments, cwd=place)
    assert_holds(in_event_files(place / "runs/recipe/trackers/iterations/0"), place / "runs/recipe")


def test_no_tracker_leaves_nothing(finished: Path) -> None:
    assert not (finished / "runs/recipe/trackers").exists()

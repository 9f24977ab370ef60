"""A model and a dataset of the hub, by a branch or a commit: which one it was stays on record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tiny
from integration import command
from integration.command import refused, spinlm_process, succeeded
from spinlm.rundir import RunDir

FIRST, SECOND, DATA = "1a" * 20, "2b" * 20, "d" * 40


@pytest.fixture
def hub(tmp_path: Path, tiny_llama: Path) -> dict[str, str]:
    """A cache of the hub with a model at two commits and a dataset at one: what to set in the environment."""
    home = tmp_path / "hub-cache"
    model = home / "hub/models--org--model"
    for seed, commit in enumerate((FIRST, SECOND)):
        tiny.save_model(model / "snapshots" / commit, seed=seed)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(SECOND)
    (model / "refs/v1").write_text(FIRST)
    _dataset(home, tmp_path)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_DATASETS_CACHE": str(home / "datasets"),
        **offline,
    }


def _dataset(home: Path, tmp_path: Path) -> None:
    """As the datasets library leaves one that it has read at a commit."""
    from datasets import load_dataset

    tiny.write_dataset(tmp_path / "rows.jsonl", rows=command.ROWS)
    made = load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "made"), split="train"
    )
    (file,) = made.cache_files
    place = home / "datasets/org___rows/default/0.0.0" / DATA
    shutil.copytree(Path(file["filename"]).parent, place)
    (place / "json-train.arrow").rename(place / "rows-train.arrow")
    info = json.loads((place / "dataset_info.json").read_text())
    info |= {"dataset_name": "rows", "builder_name": "json", "config_name": "default"}
    (place / "dataset_info.json").write_text(json.dumps(info))


GENERATE = ("generate", "recipe.yaml", "sft=null", "model.name=org/model")


def test_a_models_commit_is_recorded(place: Path, hub: dict[str, str]) -> None:
    for name, arguments, commit in (
        ("newest", (), SECOND),
        ("tag", ("model.revision=v1",), FIRST),
        ("commit", (f"model.revision={FIRST}",), FIRST),
    ):
        succeeded(spinlm_process(*GENERATE, *arguments, f"run_dir=runs/{name}", cwd=place, **hub))
        run = RunDir(place / "runs" / name)
        assert run.origin() == {"model": commit}
    answers = [
        (place / "runs" / name / "iterations/0/synthetic/00000.jsonl").read_bytes() for name in ("tag", "commit")
    ]
    assert answers[0] == answers[1] != (place / "runs/newest/iterations/0/synthetic/00000.jsonl").read_bytes()
    succeeded(spinlm_process("report", "runs/tag", cwd=place))
    assert FIRST in (place / "runs/tag/report.html").read_text()


def test_a_branch_that_has_moved_is_another_model(place: Path, hub: dict[str, str]) -> None:
    succeeded(spinlm_process(*GENERATE, cwd=place, **hub))
    (Path(hub["HF_HUB_CACHE"]) / "models--org--model/refs/main").write_text(FIRST)
    refused(spinlm_process(*GENERATE, "--iteration", "0", cwd=place, **hub), "was made from something else")


def test_a_datasets_commit_is_recorded(place: Path, hub: dict[str, str]) -> None:
    arguments = (*GENERATE, "data.source=org/rows")
    succeeded(spinlm_process(*arguments, cwd=place, **hub))
    assert RunDir(place / "runs/recipe").origin() == {"model": SECOND, "dataset": DATA}
    elsewhere = (*arguments, "run_dir=runs/another")
    outcome = spinlm_process(*elsewhere, f"data.revision={SECOND}", cwd=place, **hub)
    message = outcome.err.splitlines()[-1]  # before it the library says what it does
    assert (outcome.code, message.startswith("spinlm: data.source: org/rows: ")) == (2, True)
    assert f"at {SECOND}" in message
    assert DATA in message
    succeeded(spinlm_process(*elsewhere, f"data.revision={DATA}", cwd=place, **hub))

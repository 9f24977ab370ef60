"""A model and a dataset of the hub, by a branch or a commit: which one it was stays on record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import constants

import tiny
from integration import command
from integration.command import contents, forget, refused, spinlm, succeeded
from judge_server import JudgeServer
from spinlm.config import AdapterSection, ModelSection
from spinlm.data import sources
from spinlm.players.models import Players
from spinlm.rundir import RunDir

FIRST, SECOND, DATA = "1a" * 20, "2b" * 20, "d" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with a model at two commits: where its branches and tags are said."""
    model = tmp_path / "hub/models--org--model"
    for seed, commit in enumerate((FIRST, SECOND)):
        tiny.save_model(model / "snapshots" / commit, seed=seed)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(SECOND)
    (model / "refs/v1").write_text(FIRST)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return model / "refs"


@pytest.fixture
def dataset_on_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As the datasets library leaves one that it has read at a commit."""
    from datasets import load_dataset

    tiny.write_dataset(tmp_path / "rows.jsonl", rows=command.ROWS)
    made = load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "made"), split="train"
    )
    (file,) = made.cache_files
    place = tmp_path / "datasets/org___rows/default/0.0.0" / DATA
    shutil.copytree(Path(file["filename"]).parent, place)
    (place / "json-train.arrow").rename(place / "rows-train.arrow")
    info = json.loads((place / "dataset_info.json").read_text())
    info |= {"dataset_name": "rows", "builder_name": "json", "config_name": "default"}
    (place / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    sources._hub_dataset.cache_clear()
    return place


CHANGES = ("sft=null", "model.name=org/model", "iterations=1", "data.held_out=0", "training.max_steps=1")
GENERATE = ("generate", "recipe.yaml", *CHANGES)
FORK = ("run", "recipe.yaml", *CHANGES, "seed=1", "--fork")


def test_a_model_stays_what_it_was_when_its_branch_moves(hub: Path) -> None:
    players = Players(ModelSection(name="org/model", dtype="float32", device="cpu"), AdapterSection())
    base, weights = players.base_player(), []
    for commit in (SECOND, FIRST):
        (hub / "main").write_text(commit)
        players.forget()
        weights.append(players.opponent(base).get_input_embeddings().weight)
    assert torch.equal(*weights)


@pytest.mark.usefixtures("hub")
def test_a_models_commit_is_recorded(place: Path) -> None:
    for name, arguments, commit in (
        ("newest", (), SECOND),
        ("tag", ("model.revision=v1",), FIRST),
        ("commit", (f"model.revision={FIRST}",), FIRST),
    ):
        succeeded(spinlm(*GENERATE, *arguments, f"run_dir=runs/{name}", cwd=place))
        run = RunDir(place / "runs" / name)
        assert run.origin() == {"model": commit}
    answers = [
        (place / "runs" / name / "iterations/0/synthetic/00000.jsonl").read_bytes() for name in ("tag", "commit")
    ]
    assert answers[0] == answers[1] != (place / "runs/newest/iterations/0/synthetic/00000.jsonl").read_bytes()
    succeeded(spinlm("report", "runs/tag", cwd=place))
    assert FIRST in (place / "runs/tag/report.html").read_text()


@pytest.mark.parametrize("named", [(), ("model.revision=main",)])
def test_a_run_goes_on_with_its_commit_when_the_branch_has_moved(
    place: Path, hub: Path, named: tuple[str, ...]
) -> None:
    succeeded(spinlm(*GENERATE, *named, cwd=place))
    run = place / "runs/recipe"
    before = contents(run)
    forget(run, "iterations/0/synthetic/00001")
    (hub / "main").write_text(FIRST)
    succeeded(spinlm(*GENERATE, *named, cwd=place))
    assert contents(run) == before
    shutil.rmtree(hub.parent / "snapshots" / SECOND)
    refused(spinlm(*GENERATE, *named, cwd=place), f"org/model at {SECOND} can't be loaded")


def test_a_fork_goes_on_with_the_commit_too_unless_it_names_another(place: Path, hub: Path) -> None:
    succeeded(spinlm(*GENERATE, cwd=place))
    (hub / "main").write_text(FIRST)
    succeeded(spinlm(*FORK, "runs/fork", cwd=place))
    assert RunDir(place / "runs/fork").origin() == {"model": SECOND}
    succeeded(spinlm(*FORK, "runs/another", "model.revision=main", cwd=place))
    assert RunDir(place / "runs/another").origin() == {"model": FIRST}
    succeeded(spinlm("export", "runs/fork", "out", cwd=place))
    assert json.loads((place / "out/adapter_config.json").read_text())["revision"] == SECOND


@pytest.mark.usefixtures("hub", "dataset_on_hub")
def test_a_datasets_commit_is_recorded(place: Path) -> None:
    arguments = (*GENERATE, "data.source=org/rows")
    succeeded(spinlm(*arguments, cwd=place))
    assert RunDir(place / "runs/recipe").origin() == {"model": SECOND, "dataset": DATA}
    elsewhere = (*arguments, "run_dir=runs/another")
    outcome = spinlm(*elsewhere, f"data.revision={SECOND}", cwd=place)
    message = outcome.err.splitlines()[-1]  # before it the library says what it does
    assert (outcome.code, message.startswith("spinlm: data.source: org/rows: ")) == (2, True)
    assert f"at {SECOND}" in message
    assert DATA in message
    succeeded(spinlm(*elsewhere, f"data.revision={DATA}", cwd=place))


@pytest.mark.usefixtures("hub", "dataset_on_hub")
def test_a_judged_models_and_the_questions_commits_are_recorded(place: Path) -> None:
    succeeded(spinlm(*GENERATE, cwd=place))
    with JudgeServer(lambda _: "Verdict: A") as server:
        judge = ("--suite", "arena", "--judge-url", server.url, "--judge-model", "m")
        base = ("--iterations", "base", "--limit", "2", "--questions", f"org/rows@{DATA}")
        judged = ("evaluate", "runs/recipe", *judge, *base, "--against")
        refused(spinlm(*judged, "org/model@v2", cwd=place), "org/model at v2 can't be loaded")
        succeeded(spinlm(*judged, "org/model@v1", cwd=place))
        outcome = spinlm(*judged, "org/model@v1", "--questions", f"org/rows@{FIRST}", cwd=place)
        assert (outcome.code, f"asked for split train at {FIRST}" in outcome.err) == (2, True)
    run = RunDir(place / "runs/recipe")
    (key,) = run.keys("benchmarks/arena/")
    assert run.record(key)["inputs"]["commits"] == {"questions": DATA, "org/model@v1": FIRST}


@pytest.mark.usefixtures("hub")
def test_a_fork_reads_the_dataset_at_the_same_commit(place: Path, dataset_on_hub: Path) -> None:
    succeeded(spinlm(*GENERATE, "data.source=org/rows", cwd=place))
    dataset_on_hub.rename(dataset_on_hub.with_name("e" * 40))
    sources._hub_dataset.cache_clear()
    outcome = spinlm(*FORK, "runs/fork", "data.source=org/rows", cwd=place)
    assert outcome.code == 2
    assert f"takes what it has, {'e' * 40} (asked for split train at {DATA})" in outcome.err

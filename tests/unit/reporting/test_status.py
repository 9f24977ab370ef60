"""What is done and what is left, from run directories put together by hand."""

from pathlib import Path
from typing import Any

import pytest

from spinlm.config import recipe_from
from spinlm.errors import UserError
from spinlm.files import add_to_log, sealed, write_json, write_jsonl
from spinlm.reporting.status import besides, status
from spinlm.rundir import TIMINGS, RunDir


def started(path: Path, **sections: Any) -> RunDir:
    """A run of two iterations with two prompts in a shard."""
    tree = {"run_dir": "r", "iterations": 2, "model": {"name": "m"}, "data": {"source": "d"}}
    run = RunDir(path)
    run.begin(recipe_from({**tree, "generation": {"shard_size": 2}, **sections}, where="here"), {})
    return run


def commit(run: RunDir, *keys: str) -> None:
    for key in keys:
        with run.artifact(key, "s", {}).staging() as place:
            place.write_text(key)


def commit_data(run: RunDir, train: int, held_out: int) -> None:
    with run.artifact("data", "data", {}).staging() as place:
        place.mkdir()
        write_jsonl(place / "train.jsonl", [{"id": i} for i in range(train)])
        write_jsonl(place / "held_out.jsonl", [{"id": i} for i in range(held_out)])


def commit_training(run: RunDir, folder: str, *rows: dict[str, float]) -> None:
    with run.artifact(f"{folder}/training.jsonl", "train", {}).staging() as place:
        write_jsonl(place, list(rows))


def took(run: RunDir, *times: tuple[str, float] | tuple[str, float, int]) -> None:
    rows = [dict(zip(("what", "seconds", "tokens"), time, strict=False)) for time in times]
    for row in rows:
        add_to_log(run.path / TIMINGS, row)


def shown(run: RunDir) -> list[tuple[str, str]]:
    return [(stage.name, stage.state) for stage in status(run)]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    assert shown(started(tmp_path)) == [
        (name, "to do")
        for name in (
            "data",
            "evaluate base",
            "iteration 0: generate",
            "iteration 0: score",
            "iteration 0: train",
            "evaluate iteration-0",
            "iteration 1: generate",
            "iteration 1: score",
            "iteration 1: train",
            "evaluate iteration-1",
        )
    ]


def test_a_run_on_its_way(tmp_path: Path) -> None:
    run = started(tmp_path, sft={}, evaluation={"control": True})
    commit_data(run, train=5, held_out=1)
    commit(run, "sft/adapter", "evaluation/base/measures.json", "evaluation/sft/sampled/00000.jsonl")
    commit_training(run, "sft", {"step": 1}, {"step": 2})
    for name in ("00000", "00001", "00002"):
        commit(run, f"iterations/0/synthetic/{name}.jsonl")
    commit(run, "iterations/0/opponent_logprobs/00000.jsonl")
    commit_training(run, "iterations/0", {"step": 0}, {"step": 1, "tokens": 30.0}, {"step": 2, "tokens": 12.0})
    took(
        run,
        ("data", 1.5),
        ("sft", 10.0),
        ("iterations/0/synthetic", 2.0, 100),
        ("iterations/0/synthetic", 3.0, 150),
        ("iterations/0", 7.0),
        ("evaluation/base/sampled", 0.5, 20),
        ("evaluation/base/logprobs", 0.25, 40),
    )
    stages = [(stage.name, stage.state, stage.seconds, stage.tokens) for stage in status(run)]
    assert stages == [
        ("data", "done", 1.5, 0),
        ("sft", "done", 10.0, 0),
        ("evaluate base", "done", 0.75, 60),
        ("evaluate sft", "to do", 0.0, 0),
        ("iteration 0: generate", "done", 5.0, 250),
        ("iteration 0: score", "1 of 3", 0.0, 0),
        ("iteration 0: train", "to do", 7.0, 42),
        ("evaluate iteration-0", "to do", 0.0, 0),
        ("iteration 1: generate", "to do", 0.0, 0),
        ("iteration 1: score", "to do", 0.0, 0),
        ("iteration 1: train", "to do", 0.0, 0),
        ("evaluate iteration-1", "to do", 0.0, 0),
        ("control", "to do", 0.0, 0),
        ("evaluate control", "to do", 0.0, 0),
    ]


def test_what_was_measured_besides(tmp_path: Path) -> None:
    """Benchmarks, judging and the answers for it take time too, in none of the recipe's stages."""
    run = started(tmp_path)
    took(
        run,
        ("data", 1.5),
        ("benchmarks/answers/base/held-out-1", 2.0, 100),
        ("benchmarks/answers/iteration-0/held-out-1", 3.0, 150),
        ("benchmarks/arena/iteration-0-vs-base/judge-1", 7.0),
        ("benchmarks/arena-hard/iteration-0/gsm8k", 11.0),
    )
    assert [(stage.name, stage.state, stage.seconds, stage.tokens) for stage in besides(run)] == [
        ("answers for judges", "done", 5.0, 250),
        ("benchmark arena", "done", 7.0, 0),
        ("benchmark arena-hard", "done", 11.0, 0),
    ]
    assert sum(stage.seconds for stage in status(run)) == 1.5


def test_a_full_fine_tuning_with_nothing_held_out(tmp_path: Path) -> None:
    run = started(tmp_path, adapter=None, iterations=1)
    commit_data(run, train=2, held_out=0)
    commit(
        run, "iterations/0/synthetic/00000.jsonl", "iterations/0/opponent_logprobs/00000.jsonl", "iterations/0/model"
    )
    assert shown(run) == [
        ("data", "done"),
        ("iteration 0: generate", "done"),
        ("iteration 0: score", "done"),
        ("iteration 0: train", "done"),
    ]


def test_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        status(RunDir(tmp_path))
    write_json(tmp_path / "run.json", sealed({"recipe": {"iterations": 0}, "versions": {}, "forked_from": None}))
    with pytest.raises(UserError, match=r"run.json: .*(\n.*)*model: missing"):
        status(RunDir(tmp_path))

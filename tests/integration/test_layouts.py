"""The real command in every layout: another way to the same run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny
from integration.command import ROWS, refused, rows, spinlm, succeeded, write_recipe
from spinlm.players.layouts import LAYOUTS

SHORT = ("sft=null", "iterations=1", "evaluation.greedy=false", "generation.responses_per_prompt=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[str, tuple[Path, str]]:
    """What a run in each layout left behind, and what it said; the padded one in small passes."""
    place = tmp_path_factory.mktemp("layouts")
    shutil.copytree(tiny_llama, place / "model")
    tiny.write_dataset(place / "data.jsonl", rows=ROWS)
    write_recipe(place / "recipe.yaml")
    made = {}
    for layout in ("auto", *LAYOUTS):
        settings = (f"layout={layout}", f"tokens_per_pass={150 if layout == 'plain' else 2048}")
        outcome = succeeded(spinlm("run", "recipe.yaml", *SHORT, *settings, f"run_dir=runs/{layout}", cwd=place))
        made[layout] = (place / "runs" / layout, outcome.out + outcome.err)
    return made


def _responses(run: Path) -> list[Any]:
    shards = sorted((run / "iterations/0/synthetic").iterdir())
    return [[answer["token_ids"] for answer in row["responses"]] for shard in shards for row in rows(shard)]


@pytest.mark.parametrize("layout", ["auto", "shared", "packed"])
def test_a_run_is_the_same_in_every_layout(layout: str, runs: dict[str, tuple[Path, str]]) -> None:
    (run, _), (plain, _) = runs[layout], runs["plain"]
    assert _responses(run) == _responses(plain)
    mine, theirs = (rows(one / "iterations/0/training.jsonl") for one in (run, plain))
    assert [row.keys() for row in mine] == [row.keys() for row in theirs]
    assert max(row.get("margin", 0) for row in theirs) > 0.01
    for a, b in zip(mine, theirs, strict=True):
        still_the_opponent = abs(a.get("margin", 0)) < 1e-5  # so that rounding decides what is above 0
        for name in a.keys() - {"tokens"} - ({"reward_accuracy"} if still_the_opponent else set()):
            assert a[name] == pytest.approx(b[name], abs=2e-5, rel=1e-4), f"{name} at step {a['step']}"
        assert a.get("tokens", 0) <= b.get("tokens", 0)
    scores = [
        [value for shard in sorted((one / "iterations/0/opponent_logprobs").iterdir()) for value in _scores(shard)]
        for one in (run, plain)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def _scores(shard: Path) -> list[float]:
    return [value for row in rows(shard) for value in [row["real"], *row["others"]["0"]]]


def test_a_shared_prompt_is_computed_once(runs: dict[str, tuple[Path, str]]) -> None:
    tokens = {
        layout: sum(row.get("tokens", 0) for row in rows(run / "iterations/0/training.jsonl"))
        for layout, (run, _) in runs.items()
    }
    examples = {row["id"]: row for row in rows(runs["auto"][0] / "data/train.jsonl")}
    once = 0
    for shard in sorted((runs["auto"][0] / "iterations/0/synthetic").iterdir()):
        for row in rows(shard):
            example = examples[row["id"]]
            different = {tuple(example["real_ids"]), *(tuple(answer["token_ids"]) for answer in row["responses"])}
            once += len(example["prompt_ids"]) + sum(len(ids) - 1 for ids in different)  # the last is only predicted
    assert tokens["shared"] == tokens["auto"] == once  # two pairs of each prompt, always in one step
    assert tokens["packed"] == tokens["plain"] > 1.3 * once


def test_the_run_says_once_which_layout_it_takes(runs: dict[str, tuple[Path, str]]) -> None:
    for layout, (_, said) in runs.items():
        taken = "shared" if layout == "auto" else layout
        assert [line for line in said.splitlines() if "layout:" in line] == [f"layout: {taken}"]


def test_the_run_says_why_it_takes_no_faster_one(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "mamba")
    tiny.write_dataset(tmp_path / "data.jsonl", rows=ROWS)
    write_recipe(tmp_path / "recipe.yaml")
    outcome = succeeded(spinlm("run", "recipe.yaml", *SHORT, cwd=tmp_path))
    said = " ".join((outcome.out + outcome.err).split())
    assert said.count("layout:") == 1
    assert "layout: plain (shared with a fused head: the model has no attention" in said


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_a_layout_that_the_model_cannot_take_is_refused(layout: str, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "mamba")
    tiny.write_dataset(tmp_path / "data.jsonl", rows=ROWS)
    write_recipe(tmp_path / "recipe.yaml")
    outcome = spinlm("run", "recipe.yaml", *SHORT, f"layout={layout}", cwd=tmp_path)
    refused(outcome, "layout: ", layout, "the model has no attention")
    assert not (tmp_path / "runs/recipe/iterations").exists(), "before anything was generated"

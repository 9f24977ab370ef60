"""The opponent is the player that the iteration before committed, and the main player starts as it.

What the run cached is computed again here from the committed files, by transformers and peft alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from integration.command import rows

RUNS = ("finished", "resumed", "finished_full", "without_sft")


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> Path:
    """The run directory beside its model."""
    place: Path = request.getfixturevalue(request.param)
    return place / "runs/recipe"


def _iterations(run: Path) -> range:
    return range(len(list((run / "iterations").iterdir())))


def _player(run: Path, weights: str | None) -> Any:
    """A committed player, loaded by itself."""
    model = run.parents[1] / "model"
    if weights is not None and (run / weights / "model").is_dir():
        return AutoModelForCausalLM.from_pretrained(run / weights / "model").eval()
    base = AutoModelForCausalLM.from_pretrained(model)
    return (base if weights is None else PeftModel.from_pretrained(base, run / weights / "adapter")).eval()


def _opponent(run: Path, iteration: int) -> str | None:
    if iteration > 0:
        return f"iterations/{iteration - 1}"
    return "sft" if (run / "sft").is_dir() else None


@torch.no_grad()
def _logprob(model: Any, prompt_ids: list[int], response_ids: list[int]) -> float:
    """By the definition: the sum of log p(token | everything before it) over the response's tokens."""
    logits = model(torch.tensor([prompt_ids + response_ids])).logits[0].double()
    logprobs = logits.log_softmax(-1)
    return sum(float(logprobs[len(prompt_ids) - 1 + i, token]) for i, token in enumerate(response_ids))


def _shards(folder: Path) -> list[dict[str, Any]]:
    return [row for shard in sorted(folder.iterdir()) for row in rows(shard)]


def _scored(run: Path, iteration: int, model: Any) -> list[tuple[float, float]]:
    """Every log-prob that an iteration cached, beside the one that a model gives."""
    examples = {row["id"]: row for row in rows(run / "data/train.jsonl")}
    couples = []
    for scores in _shards(run / f"iterations/{iteration}/opponent_logprobs"):
        example = examples[scores["id"]]
        couples.append((scores["real"], _logprob(model, example["prompt_ids"], example["real_ids"])))
        for source, cached in scores["others"].items():
            (row,) = [r for r in _shards(run / f"iterations/{source}/synthetic") if r["id"] == scores["id"]]
            for logprob, response in zip(cached, row["responses"], strict=True):
                couples.append((logprob, _logprob(model, example["prompt_ids"], response["token_ids"])))
    return couples


def test_each_iteration_starts_at_ln_2(run: Path) -> None:
    for iteration in _iterations(run):
        start = rows(run / f"iterations/{iteration}/training.jsonl")[0]
        assert start["step"] == 0
        assert start["start_loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert start["start_margin"] < 1e-5


def test_cached_logprobs_are_the_committed_opponents(run: Path) -> None:
    for iteration in _iterations(run):
        couples = _scored(run, iteration, _player(run, _opponent(run, iteration)))
        assert couples
        assert all(cached == pytest.approx(own, abs=1e-4) for cached, own in couples)
        someone_else = _scored(run, iteration, _player(run, f"iterations/{iteration}"))
        assert max(abs(cached - theirs) for cached, theirs in someone_else) > 0.1


def test_replayed_pairs_are_scored_by_the_current_opponent(run: Path) -> None:
    for iteration in _iterations(run):
        sources = {tuple(row["others"]) for row in _shards(run / f"iterations/{iteration}/opponent_logprobs")}
        assert sources == {("0",) if iteration == 0 else ("1", "0")}
    if len(_iterations(run)) == 2:
        then, now = (_shards(run / f"iterations/{t}/opponent_logprobs") for t in (0, 1))
        assert [row["id"] for row in then] == [row["id"] for row in now]
        moved = [abs(a["others"]["0"][0] - b["others"]["0"][0]) for a, b in zip(then, now, strict=True)]
        assert max(moved) > 0.1


def test_synthetic_responses_are_sampled_from_the_opponent(run: Path) -> None:
    """The log-prob under the engine that drew a response is the one under the training forward pass."""
    for iteration in _iterations(run):
        drawn = _shards(run / f"iterations/{iteration}/synthetic")
        scored = _shards(run / f"iterations/{iteration}/opponent_logprobs")
        for of_engine, of_forward in zip(drawn, scored, strict=True):
            own = [response["logprob"] for response in of_engine["responses"]]
            assert own == pytest.approx(of_forward["others"][str(iteration)], abs=1e-3)


def test_every_commit_names_the_opponent_it_was_made_by(run: Path) -> None:
    from spinlm.rundir import RunDir

    directory = RunDir(run)
    records = {record["key"]: record for record in directory.records()}
    kind = "model" if "iterations/0/model" in records else "adapter"
    for iteration in _iterations(run):
        opponent = _opponent(run, iteration)
        if opponent is not None:
            expected = records[f"{opponent}/{kind}"]["hash"]
            folder = f"iterations/{iteration}"
            players = {
                record["inputs"]["player"]
                for key, record in records.items()
                if key.startswith((f"{folder}/synthetic/", f"{folder}/opponent_logprobs/"))
            }
            assert players == {expected}
            assert records[f"{folder}/{kind}"]["inputs"]["start"] == expected

"""`spinlm plan` on recipes as people have them."""

from __future__ import annotations

import json
from pathlib import Path

from integration.command import refused, spinlm, succeeded


def _names(place: Path) -> set[str]:
    return {path.relative_to(place).as_posix() for path in place.rglob("*")}


def test_it_prints_memory_and_time_and_writes_nothing(place: Path) -> None:
    before = _names(place)
    outcome = succeeded(spinlm("plan", "recipe.yaml", cwd=place))
    for words in ("weights", "optimiser state", "iteration 1: train", "assumed", "this machine"):
        assert words in outcome.out
    assert "warning" not in outcome.out
    assert _names(place) == before


def test_json_and_overrides(place: Path) -> None:
    arguments = ("plan", "recipe.yaml", "iterations=1", "sft=null", "--gpu", "h100", "--json", "--processes", "2")
    planned = json.loads(succeeded(spinlm(*arguments, cwd=place)).out)
    assert planned["machine"]["name"] == "H100"
    assert planned["processes"] == 2
    assert [stage["name"] for stage in planned["stages"]] == [
        "data",
        "base: evaluate",
        "iteration 0: generate",
        "iteration 0: score",
        "iteration 0: train",
        "iteration 0: evaluate",
    ]
    assert [phase["name"] for phase in planned["phases"]] == ["train", "score", "generate"]
    assert planned["work"] == sum(stage["work"] for stage in planned["stages"])


def test_weights_are_not_read(place: Path) -> None:
    for weights in (place / "model").glob("*.safetensors"):
        weights.write_bytes(b"")
    succeeded(spinlm("plan", "recipe.yaml", "--gpu", "T4", cwd=place))


def test_a_gpu_is_planned_for_where_there_is_none(place: Path) -> None:
    arguments = ("model.device=cuda", "model.load_in_4bit=true", "training.bf16=true")
    succeeded(spinlm("plan", "recipe.yaml", *arguments, "--gpu", "A100-40", cwd=place))


def test_what_a_run_refuses_is_refused(place: Path) -> None:
    refused(spinlm("plan", "recipe.yaml", "--gpu", "H1000", cwd=place), "H1000", "H100", "RTX 4090")
    refused(spinlm("plan", "recipe.yaml", "data.source=nowhere.jsonl", "--gpu", "T4", cwd=place), "nowhere.jsonl")
    refused(spinlm("plan", "recipe.yaml", "model.name=./nowhere", cwd=place), "nowhere")
    refused(spinlm("plan", "recipe.yaml", "data.max_length=4000", cwd=place), "data.max_length")

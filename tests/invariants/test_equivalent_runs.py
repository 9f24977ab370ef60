"""Runs that differ only in how the work is divided come to the same numbers, through the real command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from integration.command import TORCHRUN, differing, rows, spinlm, spinlm_process, succeeded

SGD = ("training.optim=sgd", "training.learning_rate=1.0", "sft.optim=sgd", "sft.learning_rate=1.0")
"""Where a weight's change is proportional to its gradient: Adam's first steps would hide an error in its scale."""


def _same_log(one: Path, other: Path) -> None:
    mine, theirs = rows(one), rows(other)
    assert [row.keys() for row in mine] == [row.keys() for row in theirs]
    for a, b in zip(mine, theirs, strict=True):
        # The division changes how many batches an epoch has, and how often a prompt that pairs share is computed.
        ignored = {"epoch", "tokens"}
        if abs(a.get("margin", 0)) < 1e-5:  # still the opponent: rounding decides
            ignored.add("reward_accuracy")
        for name in a.keys() - ignored:
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), f"{name} at step {a['step']}"


def _same_weights(one: Path, other: Path) -> None:
    mine, theirs = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.allclose(tensor, theirs[name], atol=1e-5, rtol=0), name


def _moved(weights: Path) -> float:
    tensors = load_file(weights / "adapter_model.safetensors")
    return max(float(tensor.abs().max()) for name, tensor in tensors.items() if "lora_B" in name)


def _same_training(one: Path, other: Path, folders: tuple[str, ...]) -> None:
    for folder in folders:
        assert _moved(one / folder / "adapter") > 1e-3
        _same_log(one / folder / "training.jsonl", other / folder / "training.jsonl")
        _same_weights(one / folder / "adapter", other / folder / "adapter")


def test_accumulation_is_a_larger_batch(place: Path) -> None:
    """Three divisions of the optimiser's batch of 8 pairs; the second and last batch of the epoch has 4."""
    runs = []
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        division = [
            f"{section}.{key}={value}"
            for section in ("sft", "training")
            for key, value in (("per_device_train_batch_size", size), ("gradient_accumulation_steps", steps))
        ]
        run_dir = f"runs/{size}x{steps}"
        changes = ("iterations=1", "training.max_grad_norm=0.1", *SGD, *division)
        succeeded(spinlm("run", "recipe.yaml", f"run_dir={run_dir}", *changes, cwd=place))
        runs.append(place / run_dir)
    for other in runs[1:]:
        assert [row["step"] for row in rows(other / "iterations/0/training.jsonl")] == [0, 1, 2]
        _same_training(runs[0], other, ("sft", "iterations/0"))


def _responses(run: Path, iteration: int) -> list[Any]:
    shards = sorted((run / f"iterations/{iteration}/synthetic").iterdir())
    return [[r["token_ids"] for r in row["responses"]] for shard in shards for row in rows(shard)]


def _logprobs(run: Path, iteration: int) -> list[float]:
    shards = sorted((run / f"iterations/{iteration}/opponent_logprobs").iterdir())
    scores = [row for shard in shards for row in rows(shard)]
    return [value for row in scores for value in [row["real"], *(v for vs in row["others"].values() for v in vs)]]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, without_sft: Path) -> Path:
    place = tmp_path_factory.mktemp("processes")
    for name in ("model", "data.jsonl", "recipe.yaml"):
        (place / name).symlink_to(without_sft / name)
    changes = ("sft={}", "iterations=2", *SGD, "training.gradient_accumulation_steps=2")
    sft = ("sft.per_device_train_batch_size=2", "sft.gradient_accumulation_steps=2")
    succeeded(spinlm("run", "recipe.yaml", *changes, *sft, "run_dir=runs/one", cwd=place))
    return place


def test_two_processes_are_one(one_process: Path) -> None:
    """In passes so small that each process takes several for its part, and another number than its neighbour."""
    changes = ("sft={}", "iterations=2", *SGD, "training.gradient_accumulation_steps=1", "tokens_per_pass=60")
    sft = ("sft.per_device_train_batch_size=2", "sft.gradient_accumulation_steps=1")
    arguments = ("run", "recipe.yaml", *changes, *sft, "run_dir=runs/two")
    succeeded(spinlm_process(*arguments, cwd=one_process, launcher=TORCHRUN))
    one, two = one_process / "runs/one", one_process / "runs/two"
    for iteration in (0, 1):
        assert _responses(two, iteration) == _responses(one, iteration)
        assert _logprobs(two, iteration) == pytest.approx(_logprobs(one, iteration), abs=1e-4)
    _same_training(one, two, ("sft", "iterations/0", "iterations/1"))
    assert {name for name in differing(one, two) if name.startswith((".", "checkpoints"))} == set()
    assert (two / "best").readlink() == (one / "best").readlink()


@pytest.mark.slow
def test_two_processes_take_over_what_one_made(one_process: Path) -> None:
    arguments = ("sft={}", "iterations=2", *SGD, "training.gradient_accumulation_steps=2", "training.beta=[0.1,0.2]")
    sft = ("sft.per_device_train_batch_size=2", "sft.gradient_accumulation_steps=2")
    one, two = one_process / "runs/fork-of-one", one_process / "runs/fork-of-two"
    for fork, launcher in ((one, ("-m", "spinlm")), (two, TORCHRUN)):
        command = ("run", "recipe.yaml", "run_dir=runs/one", *arguments, *sft, "--fork", str(fork))
        succeeded(spinlm_process(*command, cwd=one_process, launcher=launcher))
    made = {name.partition("/adapter")[0] for name in differing(one, two) if name.endswith("safetensors")}
    assert made == {"iterations/1"}
    assert _responses(two, 1) == _responses(one, 1)

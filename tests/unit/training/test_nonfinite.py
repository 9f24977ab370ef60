"""NaN and infinity in training: found at the very step, with the rows they come from, and stopped at or skipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from spinlm.data.pairs import Pair
from spinlm.data.prepare import TokenizedExample
from spinlm.errors import UserError
from spinlm.players.logprobs import Method
from spinlm.training.checkpoints import Arguments, last_checkpoint, train_resumably
from spinlm.training.nonfinite import NonFiniteLoss
from spinlm.training.sft import SFTTrainer
from spinlm.training.spin_trainer import SPINConfig, SPINTrainer
from unit.players.families import build_model

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 1,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
"""Twelve pairs, two a step: six steps. Were a skipped step taken, Adam's moments and the decay would show it."""


def _rows(count: int = 12) -> list[dict[str, Any]]:
    return [
        {"prompt_ids": [i, 7], "real_ids": [i, 30 + i], "synthetic_ids": [60 + i, i, 5], "id": f"example {i}"}
        for i in range(count)
    ]


def _trainer(directory: Path, rows: Any = None, **settings: Any) -> SPINTrainer:
    args = SPINConfig(str(directory), **SETTINGS | settings)
    return SPINTrainer(build_model("llama"), args, rows or _rows(), pad_id=0, method=Method("plain"))


def _pairs_of(trainer: SPINTrainer, step: int) -> list[Pair]:
    """What training reaches at a step, counted from 1."""
    batches = list(trainer.get_train_dataloader())
    return [batch["rows"][0] for batch in batches[2 * step - 2 : 2 * step]]


def _poisoned(directory: Path, *steps: int, first_of_step: float = math.inf, **settings: Any) -> SPINTrainer:
    """The opponent's log-prob of the first pair of each of these steps is no number that training could use."""
    trainer = _trainer(directory, **settings)
    names = {_pairs_of(trainer, step)[0].id for step in steps}
    trainer.train_dataset = [
        replace(pair, opponent_real_logprob=first_of_step) if pair.id in names else pair
        for pair in trainer.train_dataset
    ]
    return trainer


def _weights(trainer: SPINTrainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class _AtStep(TrainerCallback):
    """Does something before the optimiser takes a step."""

    def __init__(self, step: int, act: Callable[[Any], None]) -> None:
        self._step, self._act = step, act

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self._step:
            self._act(kwargs["model"])


class _Interrupt(TrainerCallback):
    """As if the process had been killed once a step's checkpoint is written."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


def _rows_logged(trainer: SPINTrainer) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if "train_runtime" not in row]


# --- stopped ---


@pytest.mark.parametrize(("value", "words"), [(math.inf, "the loss is inf"), (-math.inf, "the margin is inf")])
def test_stops_before_the_optimiser_takes_it_and_names_the_pair(value: float, words: str, tmp_path: Path) -> None:
    trainer, before = _poisoned(tmp_path / "poisoned", 4, first_of_step=value), _trainer(tmp_path / "before")
    bad, good = _pairs_of(trainer, 4)
    with pytest.raises(NonFiniteLoss) as stopped:
        trainer.train()
    assert str(stopped.value).startswith(f"training stopped at step 4: {words}; the pairs in question: {bad.id}. Lower")
    assert good.id not in str(stopped.value).replace(bad.id, "")
    before.add_callback(_Interrupt(3))
    with pytest.raises(KeyboardInterrupt):
        before.train()
    assert _same(_weights(trainer), _weights(before)), "the weights are those of three steps"


def test_a_row_without_an_id_is_named_by_its_number(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "id"} for row in _rows()]
    trainer = _trainer(tmp_path, rows)
    assert [pair.id for pair in trainer.train_dataset] == [f"row {number}" for number in range(12)]
    assert [pair.id for pair in _trainer(tmp_path, [Pair([1], [2], [3], math.nan, math.nan)]).train_dataset] == [
        "row 0"
    ]


@pytest.mark.parametrize("clipped", [1.0, 0.0])
def test_a_gradient_alone_names_the_pairs_of_its_step(clipped: float, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, max_grad_norm=clipped)
    steps = iter(range(100))
    weight = trainer.model.get_output_embeddings().weight
    weight.register_hook(lambda gradient: gradient * (math.inf if next(steps) == 5 else 1.0))  # the sixth backward pass
    with pytest.raises(NonFiniteLoss, match="stopped at step 3: the gradient is not finite") as stopped:
        trainer.train()
    assert f"the pairs of that step: {'; '.join(pair.id for pair in _pairs_of(trainer, 3))}." in str(stopped.value)


def test_weights_that_a_finite_gradient_makes_infinite_are_not_kept(tmp_path: Path) -> None:
    settings = {"optim": "sgd", "learning_rate": 3e38, "max_grad_norm": 0.0, "warmup_steps": 0, "weight_decay": 0.0}
    rows = [row | {"real_ids": row["real_ids"] * 20} for row in _rows()]  # gradients above 1
    trainer = _trainer(tmp_path / "saved", rows, save_strategy="steps", save_steps=1, beta=10.0, **settings)
    with pytest.raises(NonFiniteLoss, match="stopped at step 1: its weights are not finite numbers; no checkpoint"):
        train_resumably(trainer)
    assert last_checkpoint(tmp_path / "saved") is None
    with pytest.raises(NonFiniteLoss, match="stopped at step 1: its weights are not finite numbers"):
        train_resumably(_trainer(tmp_path / "ended", rows, max_steps=1, beta=10.0, **settings))


def test_the_supervised_stage_names_its_examples(tmp_path: Path) -> None:
    model = build_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[99] = math.nan
    examples = [TokenizedExample(f"row-{i}", [99 if i == 2 else i, 8], [i, 3], "", "") for i in range(3)]
    args = Arguments(str(tmp_path), **SETTINGS | {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1})
    trainer = SFTTrainer(model, args, examples, 0, Method("plain", fused_head=False), 512)
    with pytest.raises(NonFiniteLoss, match=r"stopped at step 1: the loss is nan; .*in question: row-2\. Low"):
        train_resumably(trainer)


# --- skipped ---


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "rmsprop", "adafactor"])
def test_a_skipped_step_does_nothing_but_count(optim: str, tmp_path: Path) -> None:
    skipping = _poisoned(tmp_path / "skipping", 3, skip_nonfinite=1, optim=optim)
    idle = _trainer(tmp_path / "idle", optim=optim)
    idle.add_callback(_AtStep(3, lambda model: model.zero_grad()))
    whole = _trainer(tmp_path / "whole", optim=optim)
    said: list[str] = []
    skipping.watch.say = said.append
    for trainer in (skipping, idle, whole):
        trainer.train()
    assert _same(_weights(skipping), _weights(idle))
    assert not _same(_weights(skipping), _weights(whole))
    bad = _pairs_of(skipping, 3)[0]
    assert said == [
        "step 3 skipped (1 of 1 that training.skip_nonfinite allows): the loss is inf; the pairs in question: " + bad.id
    ]
    start, *rows = _rows_logged(skipping)
    assert "start_loss" in start and [row["skipped_nonfinite"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert rows[2].keys() == {"epoch", "step", "learning_rate", "skipped_nonfinite", "dropped_identical"}
    expected = _rows_logged(idle)[1:]
    for ours, theirs in zip(rows[:2] + rows[3:], expected[:2] + expected[3:], strict=True):
        times = {"tokens_per_second"}
        assert {k: v for k, v in ours.items() if k not in {"skipped_nonfinite", *times}} == {
            k: v for k, v in theirs.items() if k not in times
        }


def test_means_are_over_the_steps_that_were_taken(tmp_path: Path) -> None:
    """Three steps to a row, the second of them skipped: its row is the mean of the two others."""
    each, three = _poisoned(tmp_path / "each", 2, skip_nonfinite=1), None
    three = _poisoned(tmp_path / "three", 2, skip_nonfinite=1, logging_steps=3)
    each.train()
    three.train()
    _, first, _, third, *_ = _rows_logged(each)
    row = _rows_logged(three)[1]
    assert row["step"] == 3 and row["skipped_nonfinite"] == 1
    for name in ("loss", "margin", "reward_accuracy", "logprob_real", "length_synthetic"):
        assert row[name] == pytest.approx((first[name] + third[name]) / 2, rel=1e-6), name
    assert row["grad_norm"] == third["grad_norm"]


def test_the_first_step_may_be_skipped_and_its_other_pairs_are_checked(tmp_path: Path) -> None:
    trainer = _poisoned(tmp_path, 1, skip_nonfinite=1, per_device_train_batch_size=2, gradient_accumulation_steps=1)
    trainer.train()
    start, *rows = _rows_logged(trainer)
    assert start["start_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert [row["skipped_nonfinite"] for row in rows] == [1] * 6


def test_one_more_than_may_be_skipped_stops(tmp_path: Path) -> None:
    trainer = _poisoned(tmp_path, 2, 3, 5, skip_nonfinite=2)
    with pytest.raises(NonFiniteLoss, match="stopped at step 5: the loss is inf after 2 such steps were skipped"):
        trainer.train()


@pytest.mark.parametrize(
    "interrupted_after", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_an_interrupted_training_goes_on_counting(interrupted_after: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "skip_nonfinite": 2}
    whole = _poisoned(tmp_path / "whole", 3, 5, **settings)
    rows = train_resumably(whole)
    first = _poisoned(tmp_path / "twice", 3, 5, **settings)
    first.add_callback(_Interrupt(interrupted_after))
    with pytest.raises(KeyboardInterrupt):
        train_resumably(first)
    second = _poisoned(tmp_path / "twice", 3, 5, **settings)
    assert train_resumably(second) == rows
    assert _same(_weights(second), _weights(whole))
    assert rows[-1]["skipped_nonfinite"] == 2
    third = _poisoned(tmp_path / "thrice", 3, 5, **settings | {"skip_nonfinite": 1})
    third.add_callback(_Interrupt(4))
    with pytest.raises(KeyboardInterrupt):
        train_resumably(third)
    with pytest.raises(NonFiniteLoss, match=r"stopped at step 5: .* after 1 such steps were skipped; .*checkpoint-4;"):
        train_resumably(_poisoned(tmp_path / "thrice", 3, 5, **settings | {"skip_nonfinite": 1}))


@pytest.mark.parametrize("settings", [{"optim": "lomo"}, {"optim": "galore_adamw_layerwise"}, {"skip_nonfinite": -1}])
def test_what_can_not_be_skipped_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="skip_nonfinite"):
        SPINConfig(str(tmp_path), report_to="none", use_cpu=True, **{"skip_nonfinite": 1} | settings)

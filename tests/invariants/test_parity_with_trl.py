"""With the logistic loss and the opponent as reference, SPIN's objective is DPO's: TRL computes the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor

import tiny
from spinlm.data.pairs import Pair
from spinlm.players.layouts import LAYOUTS, Layout, lay_out_pairs
from spinlm.players.logprobs import Method, response_logprobs, scoring
from spinlm.training.losses import logistic
from spinlm.training.spin_trainer import SPINConfig, SPINTrainer
from unit.players.families import build_model

trl = pytest.importorskip("trl")

BETA = 0.1
TEMPLATE = tiny.CHATML.replace("<|im_end|>\n", "<|im_end|>")
"""Nothing after the end of a turn: TRL would train on it, we don't."""

TEXTS = [
    ("a", "b", "a much longer and quite useless answer, on and on"),
    ("name a colour of the sky, and then a second one", "blue; grey", "no"),
    ("1+1=", "2", "3"),
    ("say nothing", "a real response of some forty letters, no?", ""),
    ("count", "1 2 3 4 5 6", "1 2 3 5 8 13 21"),
    ("äöü", "ß is not one byte", "é"),
]


def _dataset() -> Dataset:
    def turn(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return Dataset.from_list(
        [
            {
                "prompt": turn("user", prompt),
                "chosen": turn("assistant", real),
                "rejected": turn("assistant", synthetic),
            }
            for prompt, real, synthetic in TEXTS
        ]
    )


def _perturb(model: Any, seed: int, scale: float) -> None:
    """Move the adapter away from where it is, the same way for equal adapters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(_adapter(model).items()):
            assert parameter.requires_grad, name
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def _adapter(model: Any) -> dict[str, Tensor]:
    """The adapter in training: TRL keeps a second one, `ref`."""
    return {name: parameter for name, parameter in model.named_parameters() if ".default." in name}


def _opponent(family: str) -> Any:
    """A model whose adapter is not a fresh one: the second iteration's opponent."""
    modules = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt_neo": ["q_proj", "v_proj", "c_fc"]}[family]
    model = get_peft_model(
        build_model(family), LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM")
    )
    _perturb(model, seed=1, scale=0.3)
    return model


def _trainers(family: str, directory: Path, method: Method | None = None, **settings: Any) -> tuple[SPINTrainer, Any]:
    """Ours and TRL's, both made while the model is the opponent."""
    settings = {
        "per_device_train_batch_size": len(TEXTS),
        "beta": BETA,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        **settings,
    }
    opponent = _opponent(family)
    ours = SPINTrainer(
        copy.deepcopy(opponent),
        SPINConfig(output_dir=str(directory / "ours"), **settings),
        _dataset(),
        processing_class=tiny.build_tokenizer(TEMPLATE),
        method=method,
    )
    theirs = trl.DPOTrainer(
        copy.deepcopy(opponent),
        args=trl.DPOConfig(output_dir=str(directory / "trl"), loss_type="sigmoid", max_length=None, **settings),
        train_dataset=_dataset(),
        processing_class=tiny.build_tokenizer(TEMPLATE),
    )
    return ours, theirs


def _rows(theirs: Any) -> list[dict[str, Any]]:
    return list(theirs.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]))


def _fused_logprobs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """By the head that TRL puts into the model, as its loss calls it."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    return model(**inputs, use_cache=False, fused_lm_head=True).log_probs.sum(1)


def _backward(loss: Tensor, model: Any) -> dict[str, Tensor]:
    adapter = _adapter(model)
    return dict(zip(adapter, torch.autograd.grad(loss, list(adapter.values())), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
def test_logprobs_margins_loss_and_gradients_are_those_of_dpo(family: str, layout: Layout, tmp_path: Path) -> None:
    ours, theirs = _trainers(family, tmp_path, Method(layout))
    pairs: list[Pair] = list(ours.train_dataset)
    assert [(p.prompt_ids, p.real_ids, p.synthetic_ids) for p in pairs] == [
        (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in _rows(theirs)
    ]
    for trainer in (ours, theirs):
        _perturb(trainer.model, seed=2, scale=0.2)  # now the main player
        trainer.model.train()
    batch = lay_out_pairs(pairs, layout, pad_id=tiny.END_OF_TEXT)
    their_batch = theirs.data_collator(_rows(theirs))

    with scoring(ours.model, ours.method):
        loss, outputs = ours.compute_loss(ours.model, batch, return_outputs=True)
        logprobs = response_logprobs(ours.model, batch)
        gradients = _backward(loss, ours.model)
    our_logprobs = torch.cat([logprobs[batch["real"]], logprobs[batch["synthetic"]]])
    our_reference = torch.cat([batch["opponent_real"], batch["opponent_synthetic"]])
    their_loss = theirs.compute_loss(theirs.model, their_batch)
    their_logprobs = _fused_logprobs(theirs.model, their_batch)
    their_reference = torch.cat(theirs.compute_ref_log_probs(theirs.model, their_batch))
    their_chosen, their_rejected = (BETA * (their_logprobs - their_reference)).chunk(2)

    torch.testing.assert_close(our_reference, their_reference, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(our_logprobs, their_logprobs, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(outputs["margin"], their_chosen - their_rejected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(loss, their_loss, atol=1e-5, rtol=1e-6)
    assert outputs["margin"].abs().min() > 1e-3, "the players differ on every pair"
    assert abs(loss.item() - logistic(torch.zeros(())).item()) > 1e-3

    their_gradients = _backward(their_loss, theirs.model)
    assert gradients.keys() == their_gradients.keys()
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-2
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], atol=1e-5, rtol=1e-5, msg=name)


def test_each_pair_alone_has_the_rewards_of_dpo(tmp_path: Path) -> None:
    ours, theirs = _trainers("llama", tmp_path)
    for trainer in (ours, theirs):
        _perturb(trainer.model, seed=2, scale=0.2)
    for pair, row in zip(ours.train_dataset, _rows(theirs), strict=True):
        with torch.no_grad(), scoring(ours.model, ours.method):
            ours.compute_loss(ours.model, ours.lay_out([pair]))
            theirs.compute_loss(theirs.model, theirs.data_collator([row]))
        ours.end_step(taken=True)
        metrics, their_metrics = ours._take_metrics("train"), theirs._metrics["train"]
        for name, theirs_name in {
            "logprob_real": "logps/chosen",
            "logprob_synthetic": "logps/rejected",
            "reward_real": "rewards/chosen",
            "reward_synthetic": "rewards/rejected",
            "margin": "rewards/margins",
            "reward_accuracy": "rewards/accuracies",
        }.items():
            assert metrics[name] == pytest.approx(their_metrics[theirs_name][-1], rel=1e-6, abs=1e-5), name


def test_training_takes_the_same_steps(tmp_path: Path) -> None:
    """Three optimiser steps, each of uneven accumulation-free batches in the Trainer's own order."""
    ours, theirs = _trainers(
        "llama", tmp_path, max_steps=3, learning_rate=0.02, lr_scheduler_type="constant", optim="sgd"
    )
    ours.train()
    theirs.train()
    losses, their_losses = (
        [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e] for trainer in (ours, theirs)
    )
    assert len(losses) == 3
    assert losses[2][0] < losses[0][0]
    for ours_logged, theirs_logged in zip(losses, their_losses, strict=True):
        assert ours_logged == pytest.approx(theirs_logged, abs=1e-4)  # TRL's Trainer rounds what it logs
    trained = _adapter(theirs.model)
    for name, parameter in _adapter(ours.model).items():
        torch.testing.assert_close(parameter, trained[name], atol=1e-5, rtol=1e-5, msg=name)

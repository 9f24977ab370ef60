"""The optimiser's batch in passes: however it is divided and laid out, the training is the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spinlm.data.pairs import Pair
from spinlm.data.prepare import TokenizedExample
from spinlm.players.layouts import LAYOUTS, Layout
from spinlm.players.logprobs import Method
from spinlm.training.checkpoints import Arguments
from spinlm.training.passes import PassTrainer
from spinlm.training.sft import SFTTrainer
from spinlm.training.spin_trainer import SPINConfig, SPINTrainer
from unit.players.families import adapted, build_model

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 1,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def _tokens(generator: torch.Generator, most: int) -> list[int]:
    length = int(torch.randint(1, most, (), generator=generator))
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def _pairs(count: int = 17) -> list[dict[str, Any]]:
    """Of five prompts, some with the same real response."""
    generator = torch.Generator().manual_seed(0)
    prompts, reals = ([_tokens(generator, most) for _ in range(5)] for most in (25, 30))
    return [
        {"prompt_ids": prompts[i % 5], "real_ids": reals[i % 5], "synthetic_ids": _tokens(generator, 40)}
        for i in range(count)
    ]


def _examples(count: int = 17) -> list[TokenizedExample]:
    generator = torch.Generator().manual_seed(1)
    return [
        TokenizedExample(
            id=str(i),
            prompt=[],
            prompt_ids=_tokens(generator, 25),
            real="",
            real_ids=_tokens(generator, 40),
        )
        for i in range(count)
    ]


def _spin(directory: Path, model: Any, method: Method, tokens_per_pass: int, **settings: Any) -> PassTrainer[Any]:
    args = SPINConfig(str(directory), tokens_per_pass=tokens_per_pass, **{**SETTINGS, **settings})
    return SPINTrainer(model, args, _pairs(), pad_id=0, method=method)


def _sft(directory: Path, model: Any, method: Method, tokens_per_pass: int, **settings: Any) -> PassTrainer[Any]:
    args = Arguments(str(directory), **{**SETTINGS, **settings})
    return SFTTrainer(model, args, _examples(), 0, method, tokens_per_pass)


def _trained(trainer: PassTrainer[Any]) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    trainer.train()
    log = [{k: v for k, v in entry.items() if not k.startswith("train_")} for entry in trainer.state.log_history]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return log, weights


_REFERENCES: dict[Any, Any] = {}


@pytest.mark.parametrize("kind", [_spin, _sft])
@pytest.mark.parametrize(
    ("layout", "tokens_per_pass", "training"),
    [
        ("shared", 1, "lora"),
        ("shared", 50, "full"),
        ("shared", 2048, "full"),
        ("packed", 50, "full"),
        ("plain", 50, "full"),
    ],
)
def test_neither_passes_nor_layouts_change_training(
    layout: Layout, tokens_per_pass: int, kind: Callable[..., PassTrainer[Any]], training: str, tmp_path: Path
) -> None:
    """Against the padded layout, all of a batch in one pass. 17 rows: the last of three steps isn't full."""

    def run(method: Method, tokens_per_pass: int) -> Any:
        model = build_model("llama")
        return _trained(kind(tmp_path, adapted(model) if training == "lora" else model, method, tokens_per_pass))

    if (kind, training) not in _REFERENCES:
        _REFERENCES[kind, training] = run(Method("plain", fused_head=False), 10**6)
    (log, weights), (their_log, their_weights) = run(Method(layout), tokens_per_pass), _REFERENCES[kind, training]
    assert [entry.keys() for entry in log] == [entry.keys() for entry in their_log]
    losses = [entry["loss"] for entry in their_log if "loss" in entry]
    assert len(losses) == 3 and abs(losses[-1] - losses[0]) > 0.01
    for mine, theirs in zip(log, their_log, strict=True):
        for name in mine.keys() - {"tokens", "tokens_per_second", "reward_accuracy"}:
            assert mine[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-5), f"{name} at step {theirs['step']}"
        if mine["step"] > 1:  # rounding decides the first
            assert mine.get("reward_accuracy") == theirs.get("reward_accuracy")
    for name, weight in their_weights.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=1e-5, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize(("layout", "tokens_per_pass"), [("shared", 50), ("packed", 10**6), ("plain", 50)])
def test_the_supervised_loss_is_that_of_transformers(layout: Layout, tokens_per_pass: int, tmp_path: Path) -> None:
    """Of one padded batch with labels, -100 where nothing is to be predicted."""
    examples = _examples(8)
    rows = [torch.tensor([*one.prompt_ids, *one.real_ids]) for one in examples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)
    for row, one in zip(labels, examples, strict=True):
        row[: len(one.prompt_ids)] = -100
    theirs = build_model("llama")
    loss = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()

    settings = {"num_train_epochs": 1, "max_grad_norm": 1e9, "learning_rate": 1.0}
    args = Arguments(str(tmp_path), **{**SETTINGS, **settings})
    start = build_model("llama")
    trainer = SFTTrainer(copy.deepcopy(start), args, examples, 0, Method(layout), tokens_per_pass)
    (entry, *_), weights = _trained(trainer)
    assert entry["loss"] == pytest.approx(loss.item(), abs=1e-5)
    total = torch.stack([p.grad.norm() for p in theirs.parameters() if p.grad is not None]).norm()
    assert entry["grad_norm"] == pytest.approx(total.item(), rel=1e-5)
    before = dict(start.named_parameters())
    for name, parameter in theirs.named_parameters():
        step = before[name] - weights[name]  # plain gradient descent at a rate of 1
        torch.testing.assert_close(step, parameter.grad, atol=1e-5 * float(total), rtol=1e-4, msg=name)


def test_an_evaluation_batch_has_the_loss_of_its_items(tmp_path: Path) -> None:
    pairs = [Pair(**row, opponent_real_logprob=-50.0, opponent_synthetic_logprob=-60.0) for row in _pairs()]
    losses = {}
    for layout, tokens_per_pass in (("plain", 10**6), ("shared", 50), ("packed", 1)):
        trainer = _spin(tmp_path, build_model("llama"), Method(layout), tokens_per_pass)
        losses[layout] = trainer.evaluate(pairs)
    for layout in ("shared", "packed"):
        for name in ("eval_loss", "eval_margin", "eval_logprob_real", "eval_reward_accuracy"):
            assert losses[layout][name] == pytest.approx(losses["plain"][name], rel=1e-5, abs=1e-5)
    assert losses["plain"]["eval_loss"] == pytest.approx(F.softplus(_margins(pairs).neg()).mean().item(), rel=1e-4)


@torch.no_grad()
def _margins(pairs: list[Pair]) -> Tensor:
    model = build_model("llama")

    def logprob(prompt: list[int], response: list[int]) -> Tensor:
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[range(len(response)), response].sum()

    return torch.stack(
        [0.1 * (logprob(p.prompt_ids, p.real_ids) + 50 - logprob(p.prompt_ids, p.synthetic_ids) - 60) for p in pairs]
    )


# --- which rows go together ---


@pytest.mark.parametrize("tokens_per_pass", [1, 30, 80, 200, 10**6])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [_spin, _sft])
def test_every_row_is_in_one_pass_and_the_passes_fit(
    kind: Callable[..., PassTrainer[Any]], layout: Layout, tokens_per_pass: int, tmp_path: Path
) -> None:
    trainer = kind(tmp_path, build_model("llama"), Method(layout), tokens_per_pass)
    rows = list(trainer.train_dataset)
    passes = trainer.passes(rows)
    assert sorted(map(rows.index, (row for part in passes for row in part))) == list(range(17))
    for part in passes:
        assert trainer.count_tokens(part) <= tokens_per_pass or len(part) == 1
    if tokens_per_pass == 10**6:
        assert len(passes) == 1


def test_pairs_with_the_same_prompt_go_through_the_model_together(tmp_path: Path) -> None:
    trainer = _spin(tmp_path, build_model("llama"), Method("shared"), 150)
    passes = trainer.passes(list(trainer.train_dataset))
    assert len(passes) > 3
    places: dict[tuple[int, ...], set[int]] = {}
    for number, part in enumerate(passes):
        for pair in part:
            places.setdefault(tuple(pair.prompt_ids), set()).add(number)
    assert max(map(len, places.values())) == 1


# --- as accelerate wraps the model ---


@pytest.mark.parametrize(("layout", "training"), [("shared", "full"), ("shared", "lora"), ("plain", "full")])
def test_under_autocast_in_bfloat16_it_learns_the_same_within_rounding(
    layout: Layout, training: str, tmp_path: Path
) -> None:
    def run(method: Method, **settings: Any) -> Any:
        model = build_model("llama")
        model = adapted(model) if training == "lora" else model
        trainer = _spin(tmp_path, model, method, 100, max_grad_norm=1e9, learning_rate=1e-3, **settings)
        own = vars(trainer.model).get("forward")
        result = _trained(trainer)
        assert vars(trainer.model).get("forward") is own or settings, "what was there before is there again"
        return result

    (log, weights), (exact_log, exact) = run(Method(layout), bf16=True), run(Method("plain"))
    for mine, theirs in zip(log, exact_log, strict=True):
        if "loss" in mine:
            assert mine["logprob_real"] == pytest.approx(theirs["logprob_real"], rel=0.02)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.2)
    start = build_model("llama") if training == "full" else adapted(build_model("llama"))
    before = dict(start.named_parameters())
    ours = torch.cat([(weights[name] - before[name]).flatten() for name in exact])
    right = torch.cat([(exact[name] - before[name]).flatten() for name in exact])
    assert F.cosine_similarity(ours, right, dim=0) > 0.95


def test_checkpointed_layers_train_the_same(tmp_path: Path) -> None:
    runs = [
        _trained(_spin(tmp_path, adapted(build_model("gpt_neo")), Method("shared"), 80, gradient_checkpointing=again))
        for again in (True, False)
    ]
    for name, weight in runs[1][1].items():
        torch.testing.assert_close(runs[0][1][name], weight, atol=1e-5, rtol=1e-5, msg=name)
    assert [e["loss"] for e in runs[0][0] if "loss" in e] == pytest.approx(
        [e["loss"] for e in runs[1][0] if "loss" in e], abs=1e-5
    )

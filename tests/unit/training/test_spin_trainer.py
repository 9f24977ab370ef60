"""SPINTrainer as somebody uses it from Python: a model, a dataset of pairs, and no run directory."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import TrainerCallback

import tiny
from spinlm.data.pairs import Group, Pair
from spinlm.errors import UserError
from spinlm.players.layouts import Layout
from spinlm.players.logprobs import Method, scoring
from spinlm.training import spin_trainer
from spinlm.training.checkpoints import last_checkpoint, train_resumably
from spinlm.training.losses import Objective, PairLogprobs
from spinlm.training.nonfinite import NonFiniteLoss
from spinlm.training.spin_trainer import PromptSampler, SPINConfig, SPINTrainer, WrongOpponent
from unit.players.families import build_model

PROMPTS = ["one", "two, and a longer one", "3", "four"]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def _config(directory: Path, **settings: Any) -> SPINConfig:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return SPINConfig(output_dir=str(directory), **defaults | settings)


def _separable() -> Dataset:
    """Real responses are in letters, synthetic ones in digits."""
    rows = [{"prompt": p, "real": f"{p[:3]} abc", "synthetic": "123456789" * (i + 1)} for i, p in enumerate(PROMPTS)]
    return Dataset.from_list(rows)


def _token_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(most: int) -> list[int]:
        length = int(torch.randint(1, most, (), generator=generator))
        return torch.randint(0, 256, (length,), generator=generator).tolist()

    return [{"prompt_ids": tokens(20), "real_ids": tokens(30), "synthetic_ids": tokens(40)} for _ in range(count)]


def _trainer(directory: Path, rows: Any, model: Any = None, peft_config: Any = None, **settings: Any) -> SPINTrainer:
    return SPINTrainer(
        build_model("llama") if model is None else model,
        _config(directory, **settings),
        rows,
        processing_class=tiny.build_tokenizer(),
        peft_config=peft_config,
    )


def _logged(trainer: SPINTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@torch.no_grad()
def _logprob(model: Any, prompt: list[int], response: list[int]) -> float:
    logits = model.eval()(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return float(torch.log_softmax(logits, -1)[range(len(response)), response].sum())


def _weights(trainer: SPINTrainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


# --- what it reads ---


def _as_trl(row: dict[str, str]) -> dict[str, Any]:
    return {"prompt": row["prompt"], "chosen": row["real"], "rejected": row["synthetic"]}


def _as_conversation(row: dict[str, str]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "real": [{"role": "assistant", "content": row["real"]}],
        "synthetic": [{"role": "assistant", "content": row["synthetic"]}],
    }


@pytest.mark.parametrize("form", [_as_trl, _as_conversation])
def test_every_form_of_a_dataset_gives_the_same_pairs(form: Any, tmp_path: Path) -> None:
    plain = _trainer(tmp_path, _separable())
    other = _trainer(tmp_path, Dataset.from_list([form(row) for row in _separable()]))
    assert list(plain.train_dataset) == list(other.train_dataset)


def test_text_becomes_the_tokens_of_the_chat_template(tmp_path: Path) -> None:
    pair = _trainer(tmp_path, _separable()).train_dataset[2]
    start, end = tiny.IM_START, tiny.IM_END
    assert pair.prompt_ids == [start, *b"user\n3", end, *b"\n", start, *b"assistant\n"]
    assert pair.real_ids == [*b"3 abc", end]
    assert pair.synthetic_ids == [*(b"123456789" * 3), end]


def test_a_synthetic_text_cut_at_the_cap_gets_no_end_of_turn(tmp_path: Path) -> None:
    cut, ended = _trainer(
        tmp_path, [_separable()[2] | {"synthetic_truncated": flag} for flag in (True, False)]
    ).train_dataset
    assert ended.synthetic_ids == [*cut.synthetic_ids, tiny.IM_END]
    assert ended.real_ids == cut.real_ids
    assert (cut.synthetic_truncated, ended.synthetic_truncated) == (True, False)


def test_the_starting_players_response_and_another_reference_are_read(tmp_path: Path) -> None:
    row = _separable()[2] | {
        "initial": "3 xyz",
        "opponent_real_logprob": -1.0,
        "opponent_synthetic_logprob": -2.0,
        "reference_real_logprob": -3.0,
        "reference_synthetic_logprob": -4.0,
    }
    pair = _trainer(tmp_path, [row]).train_dataset[0]
    assert pair.initial_ids == [*b"3 xyz", tiny.IM_END]
    assert pair.reference_logprobs == (-3.0, -4.0)
    as_ids = {name: getattr(pair, name) for name in ("prompt_ids", "real_ids", "synthetic_ids", "initial_ids")}
    assert _trainer(tmp_path, [as_ids]).train_dataset[0].initial_ids == pair.initial_ids


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "hinge", "beta": 0.5, "nll_weight": 0.3},
        {"loss": "logistic", "beta": 2.0, "length_normalised": True},
        {"loss": "noise_contrastive", "beta": 0.2, "noise_ratio": 3.0},
        {"loss": "triplet", "beta": 0.05, "history_weight": 0.4},
        {"loss": "triplet", "beta": 2.0, "length_normalised": True, "nll_weight": 0.1},
    ],
)
def test_what_is_minimised_is_the_objective_of_naive_log_probs(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = [row | {"initial_ids": row["real_ids"][::-1] + [7] * i} for i, row in enumerate(_token_rows(3))]
    trainer = _trainer(tmp_path, rows, **settings)
    with torch.no_grad():  # now the main player
        for parameter in trainer.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    pairs: list[Pair] = list(trainer.train_dataset)

    def logprobs(name: str) -> Tensor:
        return torch.tensor([_logprob(trainer.model, p.prompt_ids, getattr(p, name)) for p in pairs])

    def lengths(name: str) -> Tensor:
        return torch.tensor([float(len(getattr(p, name))) for p in pairs])

    reference_real, reference_synthetic = zip(*(pair.reference_logprobs for pair in pairs), strict=True)
    expected = Objective(**settings)(
        PairLogprobs(
            *(logprobs(name) for name in ("real_ids", "synthetic_ids", "initial_ids")),
            torch.tensor(reference_real),
            torch.tensor(reference_synthetic),
            *(lengths(name) for name in ("real_ids", "synthetic_ids", "initial_ids")),
        )
    ).mean()
    with scoring(trainer.model, trainer.method):
        loss = trainer.compute_loss(trainer.model, trainer.lay_out(pairs))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_opponent_is_the_model_at_construction(tmp_path: Path) -> None:
    """With an adapter too: the starting player, not the base without it."""
    model = build_model("llama")
    bare = copy.deepcopy(model)
    trainer = _trainer(tmp_path, _token_rows(5), model, peft_config=LORA)
    assert isinstance(trainer.model, PeftModel)
    for pair in trainer.train_dataset:
        assert pair.opponent_real_logprob == pytest.approx(_logprob(bare, pair.prompt_ids, pair.real_ids), abs=1e-4)
        synthetic = _logprob(bare, pair.prompt_ids, pair.synthetic_ids)
        assert pair.opponent_synthetic_logprob == pytest.approx(synthetic, abs=1e-4)
    trainer.train()
    again = SPINTrainer(trainer.model, _config(tmp_path), _token_rows(5), pad_id=0)
    assert [p.opponent_real_logprob for p in again.train_dataset] == pytest.approx(
        [_logprob(trainer.model, p.prompt_ids, p.real_ids) for p in again.train_dataset], abs=1e-4
    )
    assert again.train_dataset[0].opponent_real_logprob != pytest.approx(trainer.train_dataset[0].opponent_real_logprob)


def test_logprobs_that_rows_bring_are_kept_and_missing_ones_computed(tmp_path: Path) -> None:
    scored = [vars(pair) for pair in _trainer(tmp_path, _token_rows(3)).train_dataset]
    brought = scored[0] | {"opponent_real_logprob": -1.5, "opponent_synthetic_logprob": -2.5}
    without_one = scored[1] | {"opponent_synthetic_logprob": None}
    found = _trainer(tmp_path, [brought, without_one, _token_rows(3)[2]]).train_dataset
    assert (found[0].opponent_real_logprob, found[0].opponent_synthetic_logprob) == (-1.5, -2.5)
    for pair, row in zip(found[1:], scored[1:], strict=True):
        assert pair.opponent_real_logprob == pytest.approx(row["opponent_real_logprob"], abs=1e-4)
        assert pair.opponent_synthetic_logprob == pytest.approx(row["opponent_synthetic_logprob"], abs=1e-4)


def test_identical_pairs_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = _token_rows(5)
    rows[1]["synthetic_ids"] = rows[1]["real_ids"]
    rows[4]["synthetic_ids"] = rows[4]["real_ids"]
    trainer = _trainer(tmp_path, rows)
    assert [pair.real_ids for pair in trainer.train_dataset] == [rows[i]["real_ids"] for i in (0, 2, 3)]
    trainer.train()
    assert set(_logged(trainer, "dropped_identical")) == {2}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "real": "r"}, "row 1: has prompt, real; a pair needs"),
        ({"prompt": "p", "real": "r<|im_end|>", "synthetic": "s"}, "row 1: response contains the end-of-turn token"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(row: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        _trainer(tmp_path, [_separable()[0], row])


def test_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    alike = {"prompt_ids": [1], "real_ids": [2, 3], "synthetic_ids": [2, 3]}
    with pytest.raises(UserError, match="no pair whose responses differ"):
        _trainer(tmp_path, [alike, alike])
    with pytest.raises(UserError, match="row 1: a pair needs at least one token"):
        _trainer(tmp_path, [alike | {"synthetic_ids": [4]}, alike | {"prompt_ids": []}])


def test_an_infinite_log_prob_that_hides_in_a_loss_of_0_is_found(tmp_path: Path) -> None:
    rows = _token_rows(8)
    for row in rows:
        row |= {"opponent_real_logprob": None, "opponent_synthetic_logprob": None}
    trainer = _trainer(tmp_path, rows, per_device_train_batch_size=2)
    place = _late(rows, trainer, step=3)
    trainer.train_dataset[place] = replace(trainer.train_dataset[place], opponent_real_logprob=-math.inf)
    with pytest.raises(NonFiniteLoss, match="stopped at step 3: the margin is inf"):
        train_resumably(trainer)


def test_evaluation_rows_are_scored_by_the_opponent_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not several by name"):
        SPINTrainer(build_model("llama"), _config(tmp_path), _token_rows(2), {"a": _token_rows(2)})
    trainer = _trainer(tmp_path, _token_rows(2))
    with pytest.raises(UserError, match="while the model is the opponent"):
        trainer.evaluate(_token_rows(2))
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (19, 2), (40, 4)])
def test_warm_up_leaves_a_step_to_learn_in(steps: int, warmup: int, tmp_path: Path) -> None:
    assert _config(tmp_path, warmup_steps=0.1).get_warmup_steps(steps) == warmup


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 0: is text, so SPINTrainer needs processing_class"):
        SPINTrainer(build_model("llama"), _config(tmp_path), _separable())


def test_an_unknown_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'squared' is none of logistic, hinge, exponential, correlation"):
        _config(tmp_path, loss="squared")


def test_training_again_leaves_one_sampler_to_tell_the_epoch(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _separable(), max_steps=1)
    before = len(trainer.callback_handler.callbacks)
    for _ in range(3):
        trainer.train()
    assert len(trainer.callback_handler.callbacks) == before + 1


def test_the_method_is_chosen_on_prompts_with_two_responses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest pair's are equal, so it has no second branch that could go wrong."""
    rows = [*_token_rows(4), {"prompt_ids": [1] * 30, "real_ids": [2] * 50, "synthetic_ids": [2] * 50}]
    seen: list[Group] = []
    right = spin_trainer.choose_method

    def choose(model: Any, groups: Sequence[Group], *others: Any) -> Method:
        seen.extend(groups)
        return right(model, groups, *others)

    monkeypatch.setattr(spin_trainer, "choose_method", choose)
    _trainer(tmp_path, rows)
    assert len(seen) == 4 and all(len(one.responses) == 2 for one in seen)


# --- the start ---


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_starts_at_ln_2_and_learns_to_tell_them_apart(peft_config: Any, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _separable(), peft_config=peft_config, num_train_epochs=20)
    trainer.train()
    assert _logged(trainer, "start_loss") == [pytest.approx(math.log(2), abs=1e-6)]
    assert _logged(trainer, "start_margin") == [pytest.approx(0, abs=1e-5)]
    assert _logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert _logged(trainer, "reward_accuracy")[-1] == 1.0
    assert _logged(trainer, "margin")[-1] > 1.0
    assert _logged(trainer, "logprob_real")[-1] > _logged(trainer, "logprob_real")[0] + 1
    assert _logged(trainer, "loss")[-1] < 0.5 * math.log(2)


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name != "llama"])
def test_every_family_starts_at_ln_2_and_takes_a_step(family: str, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _token_rows(4), build_model(family), max_steps=2, learning_rate=1e-3)
    trainer.train()
    assert _logged(trainer, "start_loss") == [pytest.approx(math.log(2), abs=1e-6)]
    first, second = _logged(trainer, "loss")
    assert second < first


def test_starts_at_ln_2_with_dropout_on(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM")
    model = build_model("gpt2").train()
    assert model.config.resid_pdrop > 0
    trainer = _trainer(tmp_path, _token_rows(4), model, peft_config=lora, max_steps=1)
    trainer.train()
    assert _logged(trainer, "start_loss") == [pytest.approx(math.log(2), abs=1e-6)]


def test_in_bfloat16_the_opponent_is_scored_as_training_computes(tmp_path: Path) -> None:
    """One pair a batch: with no padding, autocast gives the same bits both times."""
    trainer = _trainer(tmp_path, _token_rows(4), bf16=True, per_device_train_batch_size=1, max_steps=1)
    in_float32 = _trainer(tmp_path, _token_rows(4))
    trainer.train()
    assert _logged(trainer, "start_margin")[0] < 0.01
    rounding = [
        abs(rough.opponent_real_logprob - exact.opponent_real_logprob)
        for rough, exact in zip(trainer.train_dataset, in_float32.train_dataset, strict=True)
    ]
    assert max(rounding) > 0.01, "the test has something to show"


@pytest.mark.parametrize("response", ["real", "synthetic"])
@pytest.mark.parametrize("error", [1.0, -1.0, 0.05, math.inf])
def test_another_opponents_logprobs_are_refused(response: str, error: float, tmp_path: Path) -> None:
    rows = [vars(pair) for pair in _trainer(tmp_path, _token_rows(4)).train_dataset]
    rows[2][f"opponent_{response}_logprob"] += error
    before = build_model("llama").state_dict()
    trainer = _trainer(tmp_path, rows)
    with pytest.raises(WrongOpponent, match="doesn't start as the opponent"):
        trainer.train()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), "nothing was trained"


def test_a_model_whose_logprobs_are_not_numbers_is_refused(tmp_path: Path) -> None:
    model = build_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = math.nan
    with pytest.raises(UserError, match="this model's log-probs are not finite numbers"):
        _trainer(tmp_path, _token_rows(4), model)
    unchecked = SPINTrainer(model, _config(tmp_path), _token_rows(4), method=Method("shared"))
    with pytest.raises(WrongOpponent, match="a log-ratio of nan where 0 is due"):
        unchecked.train()


def test_every_pass_of_the_first_batch_is_checked(tmp_path: Path) -> None:
    rows = [vars(pair) for pair in _trainer(tmp_path, _token_rows(4)).train_dataset]
    shortest = min(rows, key=lambda row: len(row["prompt_ids"]) + len(row["real_ids"]) + len(row["synthetic_ids"]))
    shortest["opponent_real_logprob"] += 1.0
    with pytest.raises(WrongOpponent):
        _trainer(tmp_path, rows, per_device_train_batch_size=4, tokens_per_pass=1).train()


def test_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train_dataset: give pairs"):
        _trainer(tmp_path, [])


def test_half_precision_of_the_model_does_not_round_the_opponents_logprobs(tmp_path: Path) -> None:
    """With DeepSpeed, Trainer's own way would: at -600, bfloat16 numbers are 4 apart."""
    trainer = _trainer(tmp_path, _token_rows(2))
    batch = trainer.lay_out([replace(pair, opponent_real_logprob=-601.25) for pair in trainer.train_dataset])
    trainer.is_deepspeed_enabled = True
    prepared = trainer._prepare_inputs(batch)
    assert set(prepared) == set(batch)
    assert prepared["opponent_real"].tolist() == [-601.25, -601.25]


def test_the_other_iterations_opponent_is_refused(tmp_path: Path) -> None:
    """The classical mistake: log-probs of the base, training from the adapter."""
    rows = list(_trainer(tmp_path, _token_rows(4)).train_dataset)
    trained = _trainer(tmp_path, _token_rows(4), peft_config=LORA, num_train_epochs=3)
    trained.train()
    with pytest.raises(WrongOpponent):
        SPINTrainer(trained.model, _config(tmp_path), rows, pad_id=0).train()


# --- what is logged ---


def test_logged_metrics_by_hand(tmp_path: Path) -> None:
    """Of the second step: the model after the first, from a run of one step, scored pair by pair."""
    rows = _token_rows(4)
    rows[0]["synthetic_truncated"] = rows[3]["synthetic_truncated"] = True
    rows.append(rows[1] | {"synthetic_ids": rows[1]["real_ids"]})
    beta, prompt, real, synthetic = 0.3, "prompt_ids", "real_ids", "synthetic_ids"
    trainer = _trainer(tmp_path, rows, max_steps=2, beta=beta)
    trainer.train()
    one_step = _trainer(tmp_path, rows, max_steps=1, beta=beta)
    one_step.train()
    start = build_model("llama")

    log_real = [_logprob(one_step.model, row[prompt], row[real]) for row in rows[:4]]
    log_synthetic = [_logprob(one_step.model, row[prompt], row[synthetic]) for row in rows[:4]]
    reward_real = [beta * (new - _logprob(start, r[prompt], r[real])) for new, r in zip(log_real, rows, strict=False)]
    reward_synthetic = [
        beta * (new - _logprob(start, r[prompt], r[synthetic])) for new, r in zip(log_synthetic, rows, strict=False)
    ]
    margins = [a - b for a, b in zip(reward_real, reward_synthetic, strict=True)]
    lengths_real, lengths_synthetic = ([len(row[kind]) for row in rows[:4]] for kind in (real, synthetic))
    expected = {
        "loss": sum(math.log1p(math.exp(-z)) for z in margins) / 4,
        "margin": sum(margins) / 4,
        "reward_accuracy": sum(z > 0 for z in margins) / 4,
        "reward_real": sum(reward_real) / 4,
        "reward_synthetic": sum(reward_synthetic) / 4,
        "logprob_real": sum(log_real) / 4,
        "logprob_synthetic": sum(log_synthetic) / 4,
        "length_real": sum(lengths_real) / 4,
        "length_synthetic": sum(lengths_synthetic) / 4,
        "logprob_per_token_real": sum(log_real) / sum(lengths_real),
        "logprob_per_token_synthetic": sum(log_synthetic) / sum(lengths_synthetic),
        "truncation_rate": 0.5,
        "dropped_identical": 1,
        "tokens": sum(len(row[prompt]) for row in rows[:4]) + sum(lengths_real) + sum(lengths_synthetic) - 8,
    }
    entry = [entry for entry in trainer.state.log_history if "loss" in entry][1]
    assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert abs(expected["margin"]) > 0.1 and expected["truncation_rate"] == 0.5


@pytest.mark.parametrize(("layout", "tokens"), [("shared", 14), ("packed", 32), ("plain", 32)])
def test_tokens_are_those_that_are_computed(layout: Layout, tokens: int, tmp_path: Path) -> None:
    """Three pairs with one prompt of 4 tokens, two of them with one real response: a prompt is there once, its five
    different responses once, and another pair. Padding isn't counted, nor a response's last token, which isn't read."""
    prompt = {"prompt_ids": [1, 2, 3, 4]}
    rows = [
        prompt | {"real_ids": [5, 6], "synthetic_ids": [7]},
        {"prompt_ids": [9, 8], "real_ids": [5], "synthetic_ids": [6, 6]},
        prompt | {"real_ids": [5, 6], "synthetic_ids": [8, 8, 8]},
        prompt | {"real_ids": [5], "synthetic_ids": [9] * 5},
    ]
    trainer = SPINTrainer(build_model("llama"), _config(tmp_path, max_steps=1), rows, method=Method(layout))
    trainer.train()
    # shared: 4 + (1 + 0 + 2 + 0 + 4) + 2 + (0 + 1); else the prompt of 4 five times and that of 2 twice
    assert _logged(trainer, "tokens") == [tokens]
    assert _logged(trainer, "length_real") == [pytest.approx((2 + 1 + 2 + 1) / 4)]


def test_a_pair_with_a_margin_of_0_is_not_told_apart(tmp_path: Path) -> None:
    """One pair a batch: with no padding, the main player's first log-probs are the opponent's to the last bit."""
    trainer = _trainer(tmp_path, _token_rows(1), per_device_train_batch_size=1, max_steps=1)
    trainer.train()
    assert (_logged(trainer, "margin"), _logged(trainer, "reward_accuracy")) == ([0.0], [0.0])


def test_a_log_covers_the_steps_since_the_last_one(tmp_path: Path) -> None:
    every, third = (
        _trainer(tmp_path, _token_rows(12), max_steps=3, logging_steps=steps, learning_rate=1e-3) for steps in (1, 3)
    )
    every.train()
    third.train()
    for name in ("loss", "margin", "reward_accuracy", "logprob_real", "length_synthetic"):
        assert _logged(third, name) == [pytest.approx(sum(_logged(every, name)) / 3, rel=1e-5)], name
    assert _logged(third, "tokens") == [sum(_logged(every, "tokens"))]


@pytest.mark.parametrize("count", [7, 8])
def test_evaluation_has_the_metrics_of_training_over_every_pair(count: int, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _token_rows(4), max_steps=2)
    opponent = copy.deepcopy(trainer.model)
    rows = _token_rows(count, seed=9)
    evaluated = SPINTrainer(trainer.model, _config(tmp_path), eval_dataset=rows, pad_id=0)
    assert evaluated.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()
    metrics = evaluated.evaluate()
    margins = []
    for row in rows:
        ratios = [
            _logprob(trainer.model, row["prompt_ids"], row[kind]) - _logprob(opponent, row["prompt_ids"], row[kind])
            for kind in ("real_ids", "synthetic_ids")
        ]
        margins.append(0.1 * (ratios[0] - ratios[1]))
    assert metrics["eval_margin"] == pytest.approx(sum(margins) / count, abs=1e-5)
    assert metrics["eval_reward_accuracy"] == pytest.approx(sum(z > 0 for z in margins) / count)
    assert metrics["eval_loss"] == pytest.approx(sum(math.log1p(math.exp(-z)) for z in margins) / count, abs=1e-5)
    assert not {"margin", "loss"} & metrics.keys()


def test_evaluating_on_the_way_changes_neither_training_nor_its_log(tmp_path: Path) -> None:
    def run(**settings: Any) -> SPINTrainer:
        rows, held_out = _token_rows(8), _token_rows(3, seed=4)
        trainer = SPINTrainer(
            build_model("llama"), _config(tmp_path, max_steps=4, **settings), rows, held_out, pad_id=0
        )
        trainer.train()
        return trainer

    alone, evaluated = run(), run(eval_strategy="steps", eval_steps=1)
    assert len(_logged(evaluated, "eval_margin")) == 4
    for name in ("loss", "margin", "logprob_real", "grad_norm"):
        assert _logged(alone, name) == _logged(evaluated, name), name


# --- the order of the pairs ---


def _in_order(sampler: PromptSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


def _pairs_of_prompts(prompts: str) -> list[Pair]:
    return [Pair([ord(prompt)], [1, place], [2], 0.0, 0.0) for place, prompt in enumerate(prompts)]


def test_the_order_is_a_function_of_the_seed_and_the_epoch() -> None:
    pairs = _pairs_of_prompts("abacbdeafgb")
    orders = [_in_order(PromptSampler(pairs, seed), epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    assert all(sorted(order) == list(range(11)) for order in orders), "every pair once"
    torch.rand(3)  # whatever was drawn before, and whatever the epoch before
    again = PromptSampler(pairs, 1)
    assert [_in_order(again, epoch) for epoch in (2, 0, 1)] == [orders[5], orders[3], orders[4]]
    assert len(again) == 11


def test_the_seed_of_the_data_goes_before_the_seed(tmp_path: Path) -> None:
    def order(**seeds: int) -> list[int]:
        return list(_trainer(tmp_path, _token_rows(9), **seeds)._get_train_sampler())

    assert order(seed=1, data_seed=0) == order(seed=0) != order(seed=1)


def test_pairs_with_the_same_prompt_come_together() -> None:
    prompts = "abacbdeafgb"
    for epoch in range(5):
        order = "".join(prompts[place] for place in _in_order(PromptSampler(_pairs_of_prompts(prompts), 0), epoch))
        assert all(prompt * prompts.count(prompt) in order for prompt in prompts), order


def _resumable(directory: Path, **settings: Any) -> SPINTrainer:
    """Seven prompts with one to three pairs each: 14 pairs, 4 steps in an epoch, the last of which isn't full."""
    rows = [row | {"prompt_ids": [i % 7 + 1] * (i % 7 + 3)} for i, row in enumerate(_token_rows(14))]
    return SPINTrainer(
        build_model("llama"),
        _config(directory, num_train_epochs=2, save_strategy="steps", save_steps=1, tokens_per_pass=60, **settings),
        rows,
        pad_id=0,
    )


class _Interruption(Exception):
    pass


class _Interrupt(TrainerCallback):
    """After a step's checkpoint has been written."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise _Interruption


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    trainer = _resumable(tmp_path_factory.mktemp("uninterrupted"))
    return train_resumably(trainer), _weights(trainer)


@pytest.mark.parametrize("step", [4, 6])
def test_resumed_between_and_within_epochs_it_is_the_same_training(
    step: int, uninterrupted: Any, tmp_path: Path
) -> None:
    """4 is between the two epochs, 6 within the second."""
    log, weights = uninterrupted
    assert [entry["step"] for entry in log] == [0, *range(1, 9)]
    trainer = _resumable(tmp_path)
    trainer.add_callback(_Interrupt(step))
    with pytest.raises(_Interruption):
        train_resumably(trainer)
    resumed = _resumable(tmp_path)
    assert train_resumably(resumed) == log
    for name, weight in _weights(resumed).items():
        assert torch.equal(weight, weights[name]), name


# --- the optimiser's batch ---


@pytest.mark.parametrize("count", [16, 13])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (2, 4), (1, 8), (3, 3)])
def test_accumulation_does_not_change_training(count: int, batch_size: int, accumulation: int, tmp_path: Path) -> None:
    """Nor does a last batch that isn't full: the loss is the mean over the pairs of an optimiser step."""

    def run(batch_size: int, accumulation: int) -> SPINTrainer:
        trainer = _trainer(
            tmp_path,
            _token_rows(count),
            num_train_epochs=2,
            learning_rate=0.05,
            optim="sgd",
            max_grad_norm=0.5,
            beta=1.0,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        return trainer

    whole, parts = run(batch_size * accumulation, 1), run(batch_size, accumulation)
    assert len(_logged(whole, "loss")) == 4
    for name in ("loss", "grad_norm", "margin", "logprob_synthetic", "tokens"):
        assert _logged(parts, name) == pytest.approx(_logged(whole, name), rel=1e-4, abs=5e-5), name
    assert _logged(parts, "reward_accuracy")[1:] == _logged(whole, "reward_accuracy")[1:]  # rounding decides the first
    assert max(_logged(whole, "margin")) > 0.1
    trained = _weights(whole)
    for name, weight in _weights(parts).items():
        torch.testing.assert_close(weight, trained[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("loss", ["hinge", "exponential", "correlation"])
def test_the_loss_is_the_one_asked_for(loss: str, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _token_rows(4), loss=loss, max_steps=2, learning_rate=1e-3)
    trainer.train()
    assert _logged(trainer, "start_loss") == [pytest.approx(1.0, abs=1e-5)]  # each is 1 at 0
    first, second = _logged(trainer, "loss")
    assert first == pytest.approx(1.0, abs=1e-5)
    margin = _logged(trainer, "margin")[1]
    if loss == "correlation":
        assert second == pytest.approx(1 - margin, abs=1e-5)
    else:
        assert 1 - margin - 1e-5 <= second < first  # convex: never below its tangent


def test_the_seed_decides_the_adapter_whatever_ran_before(tmp_path: Path) -> None:
    def start(seed: int, drawn_before: int) -> dict[str, Tensor]:
        model = build_model("llama")
        torch.rand(drawn_before)
        return _weights(_trainer(tmp_path, _token_rows(2), model, peft_config=LORA, seed=seed))

    first, again, other = start(1, 0), start(1, 7), start(2, 0)
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    assert any(not torch.equal(weight, other[name]) for name, weight in first.items())


# --- when it goes wrong ---


def _late(rows: list[dict[str, Any]], trainer: SPINTrainer, step: int) -> int:
    """The place of a pair that training reaches at this step, counted from 1."""
    batches = list(trainer.get_train_dataloader())
    real_ids = batches[step - 1]["rows"][0].real_ids
    return next(place for place, row in enumerate(rows) if row["real_ids"] == real_ids)


@pytest.mark.parametrize("poison", [math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_good_checkpoint(
    poison: float, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-4,
    }
    rows = [vars(pair) for pair in _trainer(tmp_path / "scored", _token_rows(8)).train_dataset]
    place = _late(rows, _trainer(tmp_path / "order", rows, **settings), step=6)
    rows[place]["opponent_real_logprob"] = poison
    rows[place]["opponent_synthetic_logprob"] = poison  # the difference is NaN
    trainer = _trainer(tmp_path / "poisoned", rows, **settings)
    with pytest.raises(NonFiniteLoss, match=r"stopped at step 6: the loss is nan; the last good checkpoint is .*-4"):
        train_resumably(trainer)
    kept = last_checkpoint(tmp_path / "poisoned")
    assert kept == tmp_path / "poisoned" / "checkpoint-4"
    assert not (tmp_path / "poisoned" / "checkpoint-6").exists()
    saved = type(trainer.model).from_pretrained(kept)
    assert all(torch.isfinite(parameter).all() for parameter in saved.parameters())


def test_what_is_no_checkpoint_beside_them_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-abc").mkdir()
    (tmp_path / "checkpoint-abc.json").touch()
    (tmp_path / "checkpoint-99.json").mkdir()
    train_resumably(_trainer(tmp_path, _token_rows(4), max_steps=2, save_strategy="steps", save_steps=1))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    left = ["checkpoint-2", "checkpoint-2.json", "checkpoint-99.json", "checkpoint-abc", "checkpoint-abc.json"]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == left


def test_a_learning_rate_that_explodes_is_told_with_its_step(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _token_rows(8), learning_rate=1e30, max_grad_norm=0.0, max_steps=4)
    with pytest.raises(NonFiniteLoss, match=r"stopped at step 2: the loss is nan; no checkpoint was written before"):
        train_resumably(trainer)


def test_a_poisoned_pair_in_between_two_logs_is_found(tmp_path: Path) -> None:
    """Logging every third step, with the last steps not filling an interval."""
    rows = [vars(pair) for pair in _trainer(tmp_path / "scored", _token_rows(5)).train_dataset]
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1,
        "logging_steps": 3,
        "learning_rate": 1e-4,
    }
    place = _late(rows, _trainer(tmp_path / "order", rows, **settings), step=4)
    rows[place]["opponent_real_logprob"] = math.inf
    with pytest.raises(NonFiniteLoss, match="stopped at step 4: the loss is inf"):
        train_resumably(_trainer(tmp_path / "poisoned", rows, **settings))


def test_pairs_may_be_given_as_pairs(tmp_path: Path) -> None:
    pairs = [Pair(**vars(pair)) for pair in _trainer(tmp_path, _token_rows(4)).train_dataset]
    assert list(_trainer(tmp_path, pairs).train_dataset) == pairs

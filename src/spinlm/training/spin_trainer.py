"""SPINTrainer: transformers' Trainer on pairs, with the opponent's log-probs computed once."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerControl, TrainerState, set_seed
from transformers.training_args import OptimizerNames

from spinlm.config import PromptSection, unskippable
from spinlm.data.examples import Message
from spinlm.data.pairs import Pair, by_prompt, drop_identical, group_pairs
from spinlm.data.render import Renderer, RenderError
from spinlm.errors import UserError
from spinlm.players.layouts import PairBatch, count_tokens, lay_out_pairs, tokens_per_pass
from spinlm.players.logprobs import (
    Method,
    all_scores,
    choose_method,
    response_logprobs,
    scoring,
    tolerance,
    widest_float,
)
from spinlm.players.models import switch_off_dropout, without_dropout
from spinlm.training.checkpoints import Arguments
from spinlm.training.losses import LOSSES, Objective, PairLogprobs
from spinlm.training.nonfinite import skipped_steps
from spinlm.training.passes import PassTrainer

_PAIR_METRICS = (
    "margin",
    "reward_accuracy",
    "reward_real",
    "reward_synthetic",
    "logprob_real",
    "logprob_synthetic",
    "length_real",
    "length_synthetic",
    "truncation_rate",
)


class WrongOpponent(UserError):
    """The main player doesn't start where the opponent's log-probs were computed."""


@dataclass
class SPINConfig(Arguments):
    """TrainingArguments, and what SPIN adds to them."""

    beta: float = field(default=0.1, metadata={"help": "The paper's lambda."})
    loss: str = field(default="logistic", metadata={"help": ", ".join(LOSSES)})
    length_normalised: bool = field(default=False, metadata={"help": "Take log-probs per token."})
    nll_weight: float = field(default=0.0, metadata={"help": "Of the real response's negative log-likelihood a token."})
    noise_ratio: float = field(default=1.0, metadata={"help": "mu of the noise_contrastive loss."})
    history_weight: float = field(default=1.0, metadata={"help": "Of the triplet loss's historical advantage."})
    tokens_per_pass: int | None = field(
        default=None,
        metadata={"help": "Tokens that go through the model together; default: 2048; on a CPU 384, to score 1024."},
    )

    skip_nonfinite: int = field(
        default=0, metadata={"help": "Steps that may be skipped for a NaN or an infinity; one more is an error."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise UserError(f"loss: {self.loss!r} is none of {', '.join(LOSSES)}")
        if self.tokens_per_pass is not None and self.tokens_per_pass < 1:
            raise UserError(f"tokens_per_pass: {self.tokens_per_pass} is no number of tokens")
        for name, least in (("beta", 0.0), ("noise_ratio", 0.0)):
            if not getattr(self, name) > least:
                raise UserError(f"{name}: {getattr(self, name)} isn't above {least:g}")
        for name in ("nll_weight", "history_weight", "skip_nonfinite"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}: {getattr(self, name)} is below 0")
        is_scaled = self.fp16 and not self.max_grad_norm
        optim = OptimizerNames(self.optim).value
        if self.skip_nonfinite and (reason := unskippable(optim, self.deepspeed, is_scaled)):
            raise UserError(f"skip_nonfinite: {reason}")

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return Objective(**{name.name: getattr(self, name.name) for name in fields(Objective)})


class SPINTrainer(PassTrainer[Pair]):
    """Trains the main player to prefer real responses over the opponent's (paper, equation 4.7).

    The dataset's rows are `Pair`s, or mappings with `prompt`, `real` and `synthetic` (or TRL's `chosen`
    and `rejected`), each a string or a list of messages, or the same as token ids: `prompt_ids`,
    `real_ids`, `synthetic_ids`. A prompt that is a string is a user's message. Where a row brings no
    `opponent_real_logprob` and `opponent_synthetic_logprob`, the model as it is at construction is the
    opponent. `synthetic_truncated` says that the synthetic response was cut at the token cap: as text it
    then gets no end-of-turn token. Optional are `reference_real_logprob` and `reference_synthetic_logprob`,
    where the margin is measured against somebody else than the opponent, and, for the triplet loss, `initial`
    (or `initial_ids`; with `initial_truncated`), the starting player's response: without it, the synthetic
    response is the starting player's. `id` is what messages call the row, else by its number.
    Pairs of identical responses are dropped and counted, where the loss only reads margins. The model's own
    dropout is switched off; an adapter's stays.

    The optimiser's batch is `per_device_train_batch_size` times `gradient_accumulation_steps` pairs in each
    process; pairs with the same prompt come together, in an order that is a function of the seed and the epoch.

    Attributes:
        dropped_identical: How many pairs were.
        objective: The loss of a pair.
    """

    args: SPINConfig

    def __init__(
        self,
        model: Any,
        args: SPINConfig | None = None,
        train_dataset: Sequence[Any] | Any = None,
        eval_dataset: Sequence[Any] | Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        pad_id: int | None = None,
        method: Method | None = None,
        **kwargs: Any,
    ) -> None:
        """See Trainer for what isn't named here.

        Args:
            model: A causal language model, or the name of one.
            args: Settings.
            train_dataset: Pairs, as above.
            eval_dataset: Pairs, as above.
            processing_class: The tokenizer; only rows of text need it.
            peft_config: Adds an adapter to the model.
            pad_id: Fills batches; default: the tokenizer's padding token, else 0.
            method: How log-probs are computed; default: the fastest that agrees with the model's own logits on some
                of the pairs.
        """
        args = SPINConfig("tmp_trainer") if args is None else args
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if isinstance(eval_dataset, Mapping):
            raise UserError("eval_dataset: give one dataset, not several by name")
        switch_off_dropout(model)
        if peft_config is not None:
            from peft import get_peft_model

            set_seed(args.seed)
            model = get_peft_model(model, peft_config)
        tokenizer_pad = getattr(processing_class, "pad_token_id", None)
        self._pad_id = next((token for token in (pad_id, tokenizer_pad) if token is not None), 0)
        self._sums: dict[str, Tensor] = {}
        self._step_sums: list[Tensor] = []
        self._last_log = time.perf_counter()
        self._start_checked = False
        self.dropped_identical = 0
        self.objective = args.objective
        self.tokens_per_pass = self._tokens_asked_for(args, training=True)
        super().__init__(
            rows_are="pairs",
            skip_nonfinite=args.skip_nonfinite,
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        read = PairReader(processing_class)
        train, evaluation = (None if rows is None else read(rows) for rows in (train_dataset, eval_dataset))
        if not train and not evaluation:
            raise UserError("train_dataset: give pairs, there is none to train on")
        with without_dropout(self.model), self.accelerator.autocast():  # on its device now: as training will compute
            self.method = method or self._choose_method([*(train or []), *(evaluation or [])])
            if train is not None:
                self.train_dataset, self.dropped_identical = self.instructive(self.scored(train))
                if not self.train_dataset:
                    raise UserError("train_dataset: no pair whose responses differ, so there is nothing to learn")
            if evaluation is not None:
                self.eval_dataset = self.instructive(self.scored(evaluation))[0]

    def instructive(self, pairs: Sequence[Pair]) -> tuple[list[Pair], int]:
        """The pairs that have a gradient, and how many don't: for a loss of margins, those of identical responses."""
        return drop_identical(pairs) if self.objective.is_of_margins else (list(pairs), 0)

    def _choose_method(self, pairs: Sequence[Pair]) -> Method:
        groups = group_pairs(pairs).groups
        telling = [one for one in groups if len(one.responses) > 1] or groups
        return choose_method(self.model, telling, self._pad_id, self._compute_dtype())

    def scored(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The model as it stands is the opponent of those that bring no log-probs."""
        places = [
            place
            for place, pair in enumerate(pairs)
            if math.isnan(pair.opponent_real_logprob) or math.isnan(pair.opponent_synthetic_logprob)
        ]
        unscored = group_pairs([pairs[place] for place in places])
        tokens = self._tokens_asked_for(self.args, training=False)
        scores = all_scores(self.model, unscored.groups, self.method, tokens, self._pad_id)
        logprobs = list(chain.from_iterable(scores))
        pairs = list(pairs)
        for place, r, s in zip(places, unscored.real, unscored.synthetic, strict=True):
            pairs[place] = replace(
                pairs[place], opponent_real_logprob=logprobs[r], opponent_synthetic_logprob=logprobs[s]
            )
        return pairs

    @staticmethod
    def _tokens_asked_for(args: SPINConfig, training: bool) -> int:
        return tokens_per_pass(args.tokens_per_pass, args.device.type != "cpu", training)

    # --- batches ---

    def count_items(self, rows: Sequence[Pair]) -> int:
        return len(rows)

    def count_tokens(self, rows: Sequence[Pair]) -> int:
        return count_tokens(group_pairs(rows).groups, self.method.layout)

    def bundles(self, rows: Sequence[Pair]) -> list[list[Pair]]:
        return [[rows[place] for place in places] for places in by_prompt(rows)]

    def lay_out(self, rows: Sequence[Pair]) -> PairBatch:
        return lay_out_pairs(rows, self.method.layout, self._pad_id)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        sampler = PromptSampler(self.train_dataset, self.sampler_seed)
        self.remove_callback(_SetEpoch)  # an earlier training's
        self.add_callback(_SetEpoch(sampler))
        return sampler

    @property
    def sampler_seed(self) -> int:
        """Of the order of the pairs."""
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    # --- the step ---

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward, pass by pass; before the first, the start is checked."""
        if not self._start_checked and self.state.global_step == 0:
            self._check_start(model, self.passes(inputs["rows"]))
        self._start_checked = True
        return super().training_step(model, inputs, num_items_in_batch)

    def end_step(self, taken: bool) -> None:
        """What a skipped step's pairs have come to isn't counted."""
        passes, self._step_sums = self._step_sums, []
        if taken:
            sums = torch.stack(passes).sum(dim=0)
            self._add("train", torch.cat([sums, sums.new_ones(1)]))

    def compute_loss(
        self, model: Any, inputs: PairBatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss: the mean over the optimiser's whole batch, whatever its division into passes and processes."""
        pairs = self._pair_logprobs(model, inputs)
        processes = self.accelerator.num_processes if model.training else 1
        count = len(pairs.real) if num_items_in_batch is None else num_items_in_batch
        losses = self.objective(pairs)
        loss = losses.sum() * processes / count
        sums = self._sums_of(inputs, pairs)
        if model.training:
            self.numbers = {"loss": losses.detach(), "margin": self.objective.margin(pairs).detach()}
            self._step_sums.append(torch.cat([sums, loss.detach().to(sums.dtype)[None]]))
        else:
            self._add("eval", sums)
        return (loss, {"margin": self.objective.margin(pairs)}) if return_outputs else loss

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Metrics of the evaluation pairs, or of other `Pair`s.

        Raises:
            UserError: The rows would have to be scored by an opponent that training has changed.
        """
        if eval_dataset is not None and not all(isinstance(pair, Pair) for pair in eval_dataset):
            raise UserError("evaluate: give eval_dataset when the trainer is made, while the model is the opponent")
        metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return metrics

    def _pair_logprobs(self, model: Any, inputs: PairBatch) -> PairLogprobs:
        logprobs, lengths = response_logprobs(model, inputs), inputs["lengths"].to(inputs["opponent_real"].dtype)
        real, synthetic, initial = inputs["real"], inputs["synthetic"], inputs["initial"]
        return PairLogprobs(
            real=logprobs[real],
            synthetic=logprobs[synthetic],
            initial=logprobs[initial],
            reference_real=inputs["reference_real"],
            reference_synthetic=inputs["reference_synthetic"],
            real_tokens=lengths[real],
            synthetic_tokens=lengths[synthetic],
            initial_tokens=lengths[initial],
        )

    @torch.no_grad()
    def _check_start(self, model: Any, passes: Sequence[Sequence[Pair]]) -> None:
        """At the start main player and opponent are one: every log-ratio is 0.

        So is every margin then, and the logistic loss ln 2, where the reference is the opponent itself. Where steps may
        be skipped for a NaN or an infinity, the pairs that have one are the watch's concern.

        Raises:
            WrongOpponent: They aren't.
        """
        margins, losses, differences = [], [], []
        with scoring(self.model, self.method), without_dropout(model), self.compute_loss_context_manager():
            for rows in passes:
                inputs = self._prepare_inputs(self.lay_out(rows))
                pairs = self._pair_logprobs(model, inputs)
                margins.append(self.objective.margin(pairs))
                losses.append(self.objective(pairs))
                logprobs = torch.stack([pairs.real, pairs.synthetic])
                log_ratios = (logprobs - torch.stack([inputs["opponent_real"], inputs["opponent_synthetic"]])).abs()
                lengths = torch.stack([pairs.real_tokens, pairs.synthetic_tokens])
                differences.append(torch.stack([log_ratios, log_ratios / lengths.sqrt()]))
        difference, loss, margin = torch.cat(differences, dim=-1), torch.cat(losses), torch.cat(margins)
        if self.args.skip_nonfinite:
            finite = torch.isfinite(torch.stack([*difference.flatten(0, 1), loss, margin])).all(dim=0)
            if not finite.any():
                return
            difference, loss, margin = difference[..., finite], loss[finite], margin[finite]
        largest, worst = difference.flatten(1).amax(dim=1).tolist()
        allowed = tolerance(self._compute_dtype())
        if not worst <= allowed:
            raise WrongOpponent(
                f"the main player doesn't start as the opponent: a log-ratio of {largest:.4g} "
                f"where 0 is due (tolerance {allowed} times the square root of a response's tokens). The opponent's "
                "log-probs were computed by other weights, in another precision or with another prompt: compute "
                "them anew."
            )
        self.log({"start_loss": float(loss.mean()), "start_margin": float(margin.abs().max())})

    def _compute_dtype(self) -> torch.dtype:
        if self.args.bf16 or getattr(self.model, "is_loaded_in_4bit", False):
            return torch.bfloat16
        if self.args.fp16:
            return torch.float16
        dtype: torch.dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return dtype

    # --- what is logged ---

    @torch.no_grad()
    def _sums_of(self, inputs: PairBatch, pairs: PairLogprobs) -> Tensor:
        """A batch's metrics, number of pairs and tokens, kept on the device: no sync."""
        rewards = self.objective.rewards(pairs)
        margin = rewards[0] - rewards[1]
        per_pair = [
            margin,
            (margin > 0).float(),
            *rewards,
            pairs.real,
            pairs.synthetic,
            pairs.real_tokens,
            pairs.synthetic_tokens,
            inputs["truncated"],
        ]
        dtype = widest_float(margin.device)
        return torch.stack([values.to(dtype).sum() for values in [*per_pair, torch.ones_like(margin), inputs["read"]]])

    def _add(self, mode: str, sums: Tensor) -> None:
        self._sums[mode] = self._sums[mode] + sums if mode in self._sums else sums

    def _take_metrics(self, mode: str) -> dict[str, float]:
        """Means over the pairs since the last time, over all processes; in training the loss's over the steps."""
        if mode not in self._sums:
            return {}
        taken = self.accelerator.reduce(self._sums.pop(mode), "sum").tolist()
        *sums, count, tokens = taken[: len(_PAIR_METRICS) + 2]
        metrics = {name: total / count for name, total in zip(_PAIR_METRICS, sums, strict=True)}
        metrics["logprob_per_token_real"] = metrics["logprob_real"] / metrics["length_real"]
        metrics["logprob_per_token_synthetic"] = metrics["logprob_synthetic"] / metrics["length_synthetic"]
        metrics["tokens"] = tokens
        if mode == "train":
            loss, steps = taken[-2:]
            metrics["loss"] = loss / steps
        return metrics

    def unlogged(self) -> dict[str, Any]:
        """With the sums of the pairs' metrics, where not every step was skipped."""
        unlogged = super().unlogged()
        if unlogged and "train" in self._sums:
            unlogged["sums"] = self._sums["train"].tolist()
        return unlogged

    def take_up(self, unlogged: Mapping[str, Any]) -> None:
        """With the sums of the pairs' metrics."""
        super().take_up(unlogged)
        if "sums" in unlogged:
            device = self.args.device
            self._sums["train"] = torch.tensor(unlogged["sums"], dtype=widest_float(device), device=device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the pairs' metrics to what Trainer logs."""
        if "loss" in logs:
            metrics = self._take_metrics("train")
            now = time.perf_counter()
            if metrics:
                metrics["tokens_per_second"] = metrics["tokens"] / (now - self._last_log)
            self._last_log = now
            logs.update(metrics, dropped_identical=self.dropped_identical)
            if self.args.skip_nonfinite:
                logs["skipped_nonfinite"] = skipped_steps(self.state)
                for name in ("loss", "grad_norm"):  # of skipped steps alone, or of one at the interval's end
                    if not metrics or not math.isfinite(logs.get(name, 0.0)):
                        logs.pop(name, None)
        elif "eval_loss" in logs:  # in place: evaluate() returns them
            logs.update({f"eval_{name}": value for name, value in self._take_metrics("eval").items()})
        super().log(logs, start_time)


class PromptSampler(Sampler[int]):
    """All pairs in random order, those with the same prompt together: a function of the seed and the epoch."""

    def __init__(self, pairs: Sequence[Pair], seed: int) -> None:
        self._bundles = by_prompt(pairs)
        self._length = len(pairs)
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"{self._seed}/{self._epoch}")
        return chain.from_iterable(generator.sample(self._bundles, len(self._bundles)))


class _SetEpoch(TrainerCallback):
    """accelerate's wrappers don't pass the epoch on to a sampler in each of their arrangements."""

    def __init__(self, sampler: PromptSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._sampler.set_epoch(int(state.epoch or 0))


class PairReader:
    """Makes `Pair`s of a dataset's rows; NaN stands for log-probs that they don't bring."""

    def __init__(self, tokenizer: Any) -> None:
        self._renderer = Renderer(tokenizer, PromptSection()) if tokenizer is not None else None

    def __call__(self, dataset: Any) -> list[Pair]:
        """Raises UserError, with the row's number, where a row can't be read."""
        return [
            replace(row, id=row.id or f"row {number}") if isinstance(row, Pair) else self._pair(row, number)
            for number, row in enumerate(dataset)
        ]

    def _pair(self, row: Mapping[str, Any], number: int) -> Pair:
        given = (row.get("opponent_real_logprob"), row.get("opponent_synthetic_logprob"))
        real_logprob, synthetic_logprob = (math.nan if logprob is None else logprob for logprob in given)
        ids = row if "prompt_ids" in row else self._tokenized(row, number)
        if not (ids["prompt_ids"] and ids["real_ids"] and ids["synthetic_ids"]):
            raise UserError(f"row {number}: a pair needs at least one token in its prompt and in each response")
        return Pair(
            prompt_ids=list(ids["prompt_ids"]),
            real_ids=list(ids["real_ids"]),
            synthetic_ids=list(ids["synthetic_ids"]),
            opponent_real_logprob=real_logprob,
            opponent_synthetic_logprob=synthetic_logprob,
            synthetic_truncated=bool(row.get("synthetic_truncated", False)),
            reference_real_logprob=row.get("reference_real_logprob"),
            reference_synthetic_logprob=row.get("reference_synthetic_logprob"),
            initial_ids=list(ids["initial_ids"]) if ids.get("initial_ids") else None,
            id=f"row {number}" if row.get("id") is None else str(row["id"]),
        )

    def _tokenized(self, row: Mapping[str, Any], number: int) -> dict[str, list[int]]:
        real = row.get("real", row.get("chosen"))
        synthetic = row.get("synthetic", row.get("rejected"))
        if "prompt" not in row or real is None or synthetic is None:
            raise UserError(
                f"row {number}: has {', '.join(row)}; a pair needs prompt, real and synthetic (or chosen and rejected)"
            )
        if self._renderer is None:
            raise UserError(f"row {number}: is text, so SPINTrainer needs processing_class, the tokenizer")
        prompt = row["prompt"]
        messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        try:
            prompt_ids = self._renderer.prompt_ids(messages)
            real_ids = self._renderer.response_ids(messages, _words(real))
            synthetic_ids = self._renderer.response_ids(messages, _words(synthetic))
            initial = row.get("initial")
            initial_ids = [] if initial is None else self._renderer.response_ids(messages, _words(initial))
        except RenderError as error:
            raise UserError(f"row {number}: {error}") from None
        for is_cut, ids in (("synthetic_truncated", synthetic_ids), ("initial_truncated", initial_ids)):
            if row.get(is_cut) and ids:
                ids.pop()  # the end-of-turn token, which it never reached
        return {
            "prompt_ids": prompt_ids,
            "real_ids": real_ids,
            "synthetic_ids": synthetic_ids,
            "initial_ids": initial_ids,
        }


def _words(response: Any) -> str:
    """A response's text, from a string or from a conversation whose last turn it is."""
    return response if isinstance(response, str) else str(response[-1]["content"])

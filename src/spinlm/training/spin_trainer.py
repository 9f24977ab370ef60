"""SPINTrainer: transformers' Trainer on pairs, with the opponent's log-probs computed once."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, set_seed

from spinlm.config import PromptSection
from spinlm.data.examples import Message
from spinlm.data.pairs import Pair, PairBatch, collate_pairs, drop_identical
from spinlm.data.render import Renderer, RenderError
from spinlm.errors import UserError
from spinlm.players.logprobs import response_logprobs, score_responses, widest_float
from spinlm.players.models import switch_off_dropout, without_dropout
from spinlm.training.checkpoints import Arguments
from spinlm.training.losses import LOSSES, spin_margin

LOG_RATIO_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
"""How far a log-ratio may be from 0 at an iteration's start, times the square root of the response's tokens."""

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
    loss: str = field(default="logistic", metadata={"help": "logistic, hinge, exponential or correlation."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise UserError(f"loss: {self.loss!r} is none of {', '.join(LOSSES)}")


class SPINTrainer(Trainer):
    """Trains the main player to prefer real responses over the opponent's (paper, equation 4.7).

    The dataset's rows are `Pair`s, or mappings with `prompt`, `real` and `synthetic` (or TRL's `chosen`
    and `rejected`), each a string or a list of messages, or the same as token ids: `prompt_ids`,
    `real_ids`, `synthetic_ids`. A prompt that is a string is a user's message. Where a row brings no
    `opponent_real_logprob` and `opponent_synthetic_logprob`, the model as it is at construction is the
    opponent. `synthetic_truncated` says that the synthetic response was cut at the token cap: as text it
    then gets no end-of-turn token.
    Pairs of identical responses are dropped and counted. The model's own dropout is switched off; an
    adapter's stays.

    Attributes:
        dropped_identical: How many pairs were.
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
        self._last_log = time.perf_counter()
        self._start_checked = False
        self.dropped_identical = 0
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(collate_pairs, pad_id=self._pad_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        prepare = PairReader(model, processing_class, args.per_device_train_batch_size, self._pad_id)
        with self.accelerator.autocast():  # the model is on its device now: score as training will
            if train_dataset is not None:
                self.train_dataset, self.dropped_identical = drop_identical(prepare(train_dataset))
                if not self.train_dataset:
                    raise UserError("train_dataset: no pair whose responses differ, so there is nothing to learn")
            if eval_dataset is not None:
                self.eval_dataset = drop_identical(prepare(eval_dataset))[0]
        self.model_accepts_loss_kwargs = True  # our compute_loss divides by the optimiser's whole batch itself

    # --- the step ---

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], int]:
        """The optimiser's batch, and its number of pairs over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(len(batch["truncated"]) for batch in batches) * self.accelerator.num_processes

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward pass; before the first, the start is checked."""
        if not self._start_checked and self.state.global_step == 0:
            self._check_start(model, self._prepare_inputs(inputs))
        self._start_checked = True
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(
        self, model: Any, inputs: PairBatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss: the mean over the optimiser's whole batch, whatever its division into passes and processes."""
        margin, logprobs = self._margins(model, inputs)
        losses = LOSSES[self.args.loss](margin)
        pairs = num_items_in_batch if model.training and num_items_in_batch else len(losses)
        processes = self.accelerator.num_processes if model.training else 1
        self._add_metrics("train" if model.training else "eval", inputs, margin.detach(), logprobs.detach())
        loss = losses.sum() * processes / pairs
        return (loss, {"margin": margin}) if return_outputs else loss

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Metrics of the evaluation pairs, or of other `Pair`s.

        Raises:
            UserError: The rows would have to be scored by an opponent that training has changed.
        """
        if eval_dataset is not None and not all(isinstance(pair, Pair) for pair in eval_dataset):
            raise UserError("evaluate: give eval_dataset when the trainer is made, while the model is the opponent")
        metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return metrics

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of an evaluation batch; its metrics are those of training with `eval_` before them."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def _margins(self, model: Any, inputs: PairBatch) -> tuple[Tensor, Tensor]:
        """Margins [B] and the main player's log-probs [2B]."""
        logprobs = response_logprobs(model, inputs)
        real, synthetic = logprobs.chunk(2)
        opponent_real, opponent_synthetic = inputs["opponent_logprobs"].chunk(2)
        return spin_margin(real, synthetic, opponent_real, opponent_synthetic, self.args.beta), logprobs

    @torch.no_grad()
    def _check_start(self, model: Any, inputs: PairBatch) -> None:
        """At the start main player and opponent are one: every margin is 0, the logistic loss ln 2.

        Raises:
            WrongOpponent: They aren't.
        """
        with without_dropout(model), self.compute_loss_context_manager():
            margin, logprobs = self._margins(model, inputs)
        log_ratios = (logprobs - inputs["opponent_logprobs"]).abs()
        worst = float((log_ratios / inputs["response_lengths"].sqrt()).max())
        tolerance = LOG_RATIO_TOLERANCE.get(self._compute_dtype(), 0.2)
        if not worst <= tolerance:
            raise WrongOpponent(
                f"the main player doesn't start as the opponent: a log-ratio of {float(log_ratios.max()):.4g} where "
                f"0 is due (tolerance {tolerance} times the square root of a response's tokens). The opponent's "
                "log-probs were computed by other weights, in another precision or with another prompt: compute "
                "them anew."
            )
        self.log(
            {"start_loss": float(LOSSES[self.args.loss](margin).mean()), "start_margin": float(margin.abs().max())}
        )

    def _compute_dtype(self) -> torch.dtype:
        if self.args.bf16 or getattr(self.model, "is_loaded_in_4bit", False):
            return torch.bfloat16
        if self.args.fp16:
            return torch.float16
        dtype: torch.dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return dtype

    # --- what is logged ---

    def _add_metrics(self, mode: str, inputs: PairBatch, margin: Tensor, logprobs: Tensor) -> None:
        """Add a batch to the sums kept on the device: no sync."""
        rewards = self.args.beta * (logprobs - inputs["opponent_logprobs"])
        reward_real, reward_synthetic = rewards.chunk(2)
        logprob_real, logprob_synthetic = logprobs.chunk(2)
        length_real, length_synthetic = inputs["response_lengths"].chunk(2)
        per_pair = [
            margin,
            (margin > 0).float(),
            reward_real,
            reward_synthetic,
            logprob_real,
            logprob_synthetic,
            length_real,
            length_synthetic,
            inputs["truncated"],
        ]
        dtype = widest_float(margin.device)
        sums = [values.to(dtype).sum() for values in [*per_pair, torch.ones_like(margin), inputs["attention_mask"]]]
        added = torch.stack(sums)
        self._sums[mode] = self._sums[mode] + added if mode in self._sums else added

    def _take_metrics(self, mode: str) -> dict[str, float]:
        """Means over the pairs since the last time, over all processes."""
        if mode not in self._sums:
            return {}
        *sums, count, tokens = self.accelerator.reduce(self._sums.pop(mode), "sum").tolist()
        metrics = {name: total / count for name, total in zip(_PAIR_METRICS, sums, strict=True)}
        metrics["logprob_per_token_real"] = metrics["logprob_real"] / metrics["length_real"]
        metrics["logprob_per_token_synthetic"] = metrics["logprob_synthetic"] / metrics["length_synthetic"]
        metrics["tokens"] = tokens
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the pairs' metrics to what Trainer logs."""
        if "loss" in logs:
            metrics = self._take_metrics("train")
            now = time.perf_counter()
            if metrics:
                metrics["tokens_per_second"] = metrics["tokens"] / (now - self._last_log)
            self._last_log = now
            logs.update(metrics, dropped_identical=self.dropped_identical)
        elif "eval_loss" in logs:  # in place: evaluate() returns them
            logs.update({f"eval_{name}": value for name, value in self._take_metrics("eval").items()})
        super().log(logs, start_time)


class PairReader:
    """Makes `Pair`s of a dataset's rows; the model as it stands is the opponent where they bring no log-probs."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, pad_id: int) -> None:
        self._model = model
        self._renderer = Renderer(tokenizer, PromptSection()) if tokenizer is not None else None
        self._batch_size = batch_size
        self._pad_id = pad_id

    def __call__(self, dataset: Any) -> list[Pair]:
        """Raises UserError, with the row's number, where a row can't be read."""
        rows = list(dataset)
        pairs = [row if isinstance(row, Pair) else self._pair(row, number) for number, row in enumerate(rows)]
        unscored = [
            place
            for place, pair in enumerate(pairs)
            if math.isnan(pair.opponent_real_logprob) or math.isnan(pair.opponent_synthetic_logprob)
        ]
        for place, pair in zip(unscored, self._scored([pairs[i] for i in unscored]), strict=True):
            pairs[place] = pair
        return pairs

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
        except RenderError as error:
            raise UserError(f"row {number}: {error}") from None
        if row.get("synthetic_truncated"):
            synthetic_ids.pop()  # the end-of-turn token, which it never reached
        return {"prompt_ids": prompt_ids, "real_ids": real_ids, "synthetic_ids": synthetic_ids}

    def _scored(self, pairs: Sequence[Pair]) -> list[Pair]:
        responses = [(p.prompt_ids, p.real_ids) for p in pairs] + [(p.prompt_ids, p.synthetic_ids) for p in pairs]
        logprobs = [0.0] * len(responses)
        with without_dropout(self._model):
            for places, values in score_responses(self._model, responses, self._batch_size, self._pad_id):
                for place, value in zip(places, values, strict=True):
                    logprobs[place] = value
        real, synthetic = logprobs[: len(pairs)], logprobs[len(pairs) :]
        return [
            replace(pair, opponent_real_logprob=r, opponent_synthetic_logprob=s)
            for pair, r, s in zip(pairs, real, synthetic, strict=True)
        ]


def _words(response: Any) -> str:
    """A response's text, from a string or from a conversation whose last turn it is."""
    return response if isinstance(response, str) else str(response[-1]["content"])

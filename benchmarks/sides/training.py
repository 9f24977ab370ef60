"""Training on pairs: spinlm's SPINTrainer and TRL's DPOTrainer, both by their own train()."""

from __future__ import annotations

import time
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback

from benchmarks import models
from benchmarks.machine import matrix_peak
from benchmarks.record import Turn
from spinlm.data.pairs import Pair
from spinlm.training.spin_trainer import SPINConfig, SPINTrainer

COMMON: dict[str, Any] = {
    "num_train_epochs": 1,
    "learning_rate": 5e-5,
    "beta": 0.1,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 10,
}
"""What both sides are told; 10 steps between two logs is TRL's default."""

AT_ITS_BEST: dict[str, Any] = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
"""TRL without what it does by default and needn't, where memory suffices. Its padding_free is switched off in 1.16
whatever is asked, and its Liger kernels need Triton, which runs on no CPU."""


class Training:
    """A trainer that trains an epoch each turn.

    What is made once for a training (the reference's or opponent's log-probs, the choice of a layout) falls into
    its making and its warm-up, so it isn't in any turn.

    Attributes:
        name: The side's.
        trainer: A SPINTrainer or a DPOTrainer.
        made_in: Seconds that making the trainer took, of which scoring by the opponent is nearly all.
    """

    def __init__(
        self, name: str, trainer: Trainer, pairs: int, made_in: float = 0.0, peak_size: int | None = None
    ) -> None:
        """Times train() from on_train_begin to on_train_end."""
        self.name = name
        self.trainer: Any = trainer
        self.made_in = made_in
        self._pairs = pairs
        self._peak_size = peak_size
        self._clock = _Clock()
        self.trainer.add_callback(self._clock)

    def turn(self) -> Turn:
        """An epoch; the machine's matrix peak is measured just before, where it is asked for."""
        detail = {} if self._peak_size is None else {"matrix_peak": matrix_peak(self._peak_size)}
        self.trainer.train()
        return Turn(self.name, self._clock.seconds, self._pairs, detail)

    def warm_up(self, pairs: int | None = None) -> None:
        """Train before it counts: on all the pairs, or only on the first ones."""
        dataset = self.trainer.train_dataset
        if pairs is not None:
            self.trainer.train_dataset = dataset.select(range(pairs))
        self.turn()
        self.trainer.train_dataset = dataset

    def logged(self, names: dict[str, str]) -> list[dict[str, float]]:
        """What was logged at each step, under names of ours."""
        entries = [entry for entry in self.trainer.state.log_history if "loss" in entry]
        return [{ours: float(entry[theirs]) for ours, theirs in names.items()} for entry in entries]


class _Clock(TrainerCallback):
    """Seconds from a training's begin to its end."""

    def __init__(self) -> None:
        self._started = self.seconds = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self._started


def spin_training(
    model: Any,
    pairs: Sequence[Pair],
    optimiser_batch: int,
    name: str = "spinlm",
    peak_size: int | None = None,
    **settings: Any,
) -> Training:
    """SPINTrainer with a fresh adapter; the opponent is scored here."""
    args = SPINConfig(output_dir=_anywhere(), **(COMMON | _batches(optimiser_batch, optimiser_batch) | settings))
    started = time.perf_counter()
    trainer = SPINTrainer(
        model, args, list(pairs), peft_config=models.lora(), pad_id=models.load_tokenizer().pad_token_id
    )
    made_in = time.perf_counter() - started
    _be_quiet(trainer)
    return Training(name, trainer, len(pairs), made_in, peak_size)


def dpo_training(
    model: Any,
    pairs: Sequence[Pair],
    optimiser_batch: int,
    name: str = "TRL defaults",
    batch: int | None = None,
    **settings: Any,
) -> Training:
    """DPOTrainer with a fresh adapter and its defaults, but for bf16, which is off: both sides compute in float32.

    Args:
        model: Without adapter.
        pairs: Already tokens; none is long enough to be truncated.
        optimiser_batch: Pairs in a step of the optimiser.
        name: The side's.
        batch: Pairs in a forward pass. Default: all of the optimiser's batch, which is TRL's default too.
        settings: Of DPOConfig.
    """
    import trl

    class OfTokens(trl.DPOTrainer):
        """Takes the pairs' token ids as they are."""

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    args = trl.DPOConfig(
        output_dir=_anywhere(),
        bf16=False,
        **(COMMON | _batches(optimiser_batch, batch or optimiser_batch) | settings),
    )
    longest = max(len(p.prompt_ids) + max(len(p.real_ids), len(p.synthetic_ids)) for p in pairs)
    assert args.max_length is None or longest <= args.max_length, "TRL would cut responses"
    rows = [{"prompt_ids": p.prompt_ids, "chosen_ids": p.real_ids, "rejected_ids": p.synthetic_ids} for p in pairs]
    trainer = OfTokens(
        model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=models.load_tokenizer(),
        peft_config=models.lora(),
    )
    _be_quiet(trainer)
    return Training(name, trainer, len(pairs))


def _batches(optimiser_batch: int, batch: int) -> dict[str, int]:
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": optimiser_batch // batch}


def _be_quiet(trainer: Any) -> None:
    trainer.remove_callback(PrinterCallback)


_places: list[TemporaryDirectory[str]] = []


def _anywhere() -> str:
    """A directory that goes when the process does: nothing is saved in it."""
    _places.append(TemporaryDirectory(prefix="spinlm-bench-"))
    return _places[-1].name

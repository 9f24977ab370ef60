"""What every training here needs: checkpoints that count only when whole, resume, and a stop at NaN."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import OutOfMemoryError
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from spinlm.errors import UserError, first_line
from spinlm.rundir import file_hashes, flush_to_disk, read_json, write_json

TIMING = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second")
"""What is logged of time: the rest is the same each time a run is repeated."""

OnLog = Callable[[int, int, dict[str, float]], None]
"""Called with the step, the number of steps, and what was logged."""


class Arguments(TrainingArguments):
    """TrainingArguments for lists of pairs or examples, on one device a process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.remove_unused_columns = False
        self.logging_nan_inf_filter = False  # would look at the loss, a device sync, at every step
        if self.n_gpu > 1:
            self._n_gpu = 1  # several GPUs are for torchrun or accelerate launch, not for DataParallel

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """As ever, but that a training of one step doesn't take it at a learning rate of 0."""
        return min(int(super().get_warmup_steps(num_training_steps)), num_training_steps - 1)


class NonFiniteLoss(UserError):
    """The loss or its gradient is NaN or infinite."""


def train_resumably(trainer: Trainer, on_log: OnLog | None = None) -> list[dict[str, Any]]:
    """Train from the last whole checkpoint, if there is one.

    Returns:
        What was logged at each logging step, timing left out: the same whether interrupted or not.

    Raises:
        NonFiniteLoss: With the step and the last good checkpoint, which is kept.
    """
    directory = Path(str(trainer.args.output_dir))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_LogEnd())
    trainer.add_callback(_StopAtNonFinite(directory))
    trainer.add_callback(_CommitCheckpoint(trainer))
    if on_log is not None and trainer.is_world_process_zero():
        trainer.add_callback(_Report(on_log))
    checkpoint = last_checkpoint(directory)
    begun = _Begun()
    trainer.add_callback(begun)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:  # of what was pickled, torch opens numbers and tensors only
        if checkpoint is None or begun.has_begun or isinstance(error, (UserError, MemoryError, OutOfMemoryError)):
            raise
        raise UserError(
            f"{checkpoint}: not a checkpoint that a run writes: {first_line(error)}. Delete it: training begins anew"
        ) from None
    history = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    # In one order: a checkpoint gives back its entries sorted.
    return [{name: entry[name] for name in sorted(entry.keys() - set(TIMING))} for entry in history]


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    for checkpoint in sorted(directory.glob("checkpoint-*"), key=step_of, reverse=True):
        if _is_whole(checkpoint):
            return checkpoint
    return None


def _is_whole(checkpoint: Path) -> bool:
    if any(checkpoint.glob("*model*.bin*")):  # weights in a pickle, which no checkpoint of ours has
        return False
    try:
        return bool(read_json(_mark(checkpoint)) == file_hashes(checkpoint))
    except (FileNotFoundError, ValueError):
        return False


def _mark(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.json")


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written at."""
    return int(checkpoint.name.removeprefix("checkpoint-").removesuffix(".json"))


class _CommitCheckpoint(TrainerCallback):
    """Records a checkpoint once all of it is on the disk, then removes the one before."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            flush_to_disk(checkpoint)
            write_json(_mark(checkpoint), file_hashes(checkpoint))
            for older in Path(args.output_dir).glob("checkpoint-*"):
                if step_of(older) < state.global_step:
                    shutil.rmtree(older) if older.is_dir() else older.unlink()
        self._trainer.accelerator.wait_for_everyone()


class EachCheckpoint(TrainerCallback):
    """Calls back at each checkpoint, before it counts as whole: what is done then is done for every checkpoint."""

    def __init__(self, on_checkpoint: Callable[[int], None]) -> None:
        """Takes what to call with the step."""
        self._on_checkpoint = on_checkpoint

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._on_checkpoint(state.global_step)


class _Begun(TrainerCallback):
    """Knows whether a step has begun: before that a checkpoint is read."""

    def __init__(self) -> None:
        self.has_begun = False

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.has_begun = True


class _LogEnd(TrainerCallback):
    """The last steps are logged (and so checked) too, where they don't fill a logging interval."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class _StopAtNonFinite(TrainerCallback):
    """Checks what is logged, before the checkpoint of the same step is written."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # In float16 an infinite gradient is how the loss scale is found: that step is skipped.
        for name in ("loss", "margin") if args.fp16 else ("loss", "margin", "grad_norm"):
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                checkpoint = last_checkpoint(self._directory)
                kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written before"
                raise NonFiniteLoss(
                    f"training stopped at step {state.global_step}: the {name.replace('_', ' ')} is {value}; {kept}. "
                    "Lower learning_rate or beta, raise warmup_steps, or train in float32 (a run goes on with "
                    "another recipe by --fork NEW_RUN)."
                )


class _Report(TrainerCallback):
    """Passes on what is logged."""

    def __init__(self, on_log: OnLog) -> None:
        self._on_log = on_log

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self._on_log(state.global_step, state.max_steps, logs or {})

"""What every training here needs: checkpoints that count only when whole, resume, and stops in order."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from spinlm import interruption
from spinlm.errors import UserError, first_line
from spinlm.files import file_hashes, flush_directory, flush_to_disk, read_json, remove, sealed, unsealed, write_json
from spinlm.training.nonfinite import NonFiniteLoss
from spinlm.training.passes import PassTrainer

TIMING = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second")
"""What is logged of time: the rest is the same each time a run is repeated."""

_NAME = re.compile(r"checkpoint-[0-9]+(\.json)?")
"""Of a checkpoint, and of the mark beside it; what has another name is none of ours."""

_NO_CHECKPOINT = (UnpicklingError, AttributeError, EOFError, KeyError, ValueError)
"""What a checkpoint comes to that no run has written. torch unpickles numbers and tensors only."""

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


def train_resumably(
    trainer: PassTrainer[Any], on_log: OnLog | None = None, say: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Train from the last whole checkpoint, if there is one.

    Args:
        trainer: What to train.
        on_log: Called at each logging step.
        say: Told of each checkpoint that isn't any more what was written.

    Returns:
        What was logged at each logging step, timing left out: the same whether interrupted or not.

    Raises:
        NonFiniteLoss: With the step, what it was trained on, and the last good checkpoint, which is kept.
        Interrupted: By a signal, once the step is finished and saved.
    """
    directory = Path(str(trainer.args.output_dir))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_LogEnd())
    trainer.add_callback(_CommitCheckpoint(trainer))
    trainer.add_callback(_StopInOrder(trainer))  # after what commits the checkpoint
    if on_log is not None and trainer.is_world_process_zero():
        trainer.add_callback(_Report(on_log))
    checkpoint = last_checkpoint(directory, say)
    begun = _Begun()
    trainer.add_callback(begun)
    try:
        with interruption.deferred():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except NonFiniteLoss as found:
        raise found.keeping(last_checkpoint(directory)) from None
    except _NO_CHECKPOINT as error:
        if checkpoint is None or begun.has_begun:
            raise
        raise UserError(
            f"{checkpoint}: not a checkpoint that a run writes: {first_line(error)}. Delete it: training begins anew"
        ) from error
    history = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    # In one order: a checkpoint gives back its entries sorted.
    return [{name: entry[name] for name in sorted(entry.keys() - set(TIMING))} for entry in history]


def last_checkpoint(directory: Path, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest checkpoint that was written to its end.

    Args:
        directory: Where a training keeps them.
        say: Told of each newer one that was written to its end, and isn't any more what was written.
    """
    marks = [path for path in directory.glob("checkpoint-*.json") if _NAME.fullmatch(path.name)]
    for mark in sorted(marks, key=step_of, reverse=True):
        checkpoint = mark.with_suffix("")
        try:
            if marked_hashes(mark) == file_hashes(checkpoint) and not _has_pickled_weights(checkpoint):
                return checkpoint
        except (ValueError, IsADirectoryError):
            pass
        say(f"{checkpoint}: not what was written, so training goes on from before it")
    return None


def _has_pickled_weights(checkpoint: Path) -> bool:
    """Whether the Trainer would take weights out of a pickle. FSDP's own, of another name, holds tensors only."""
    names = ("pytorch_model.bin*", "pytorch_model-*.bin", "adapter_model.bin")
    return any(any(checkpoint.glob(name)) for name in names)


def mark(checkpoint: Path) -> None:
    """Put down that a checkpoint is written to its end, once it is on the disk."""
    flush_to_disk(checkpoint)
    flush_directory(checkpoint.parent)
    write_json(checkpoint.with_name(f"{checkpoint.name}.json"), sealed(file_hashes(checkpoint)))


def marked_hashes(mark: Path) -> dict[str, str]:
    """Of a checkpoint's files, by their names, as the mark beside it has them.

    Raises:
        ValueError: The mark isn't what was written.
    """
    return unsealed(read_json(mark))


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written at."""
    return int(checkpoint.name.removeprefix("checkpoint-").removesuffix(".json"))


class _CommitCheckpoint(TrainerCallback):
    """Records a checkpoint once all of it is on the disk, then removes the one before.

    Trainer begins what it logs anew at a checkpoint. One between two logging steps keeps what is to be logged, too.
    """

    def __init__(self, trainer: PassTrainer[Any]) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        unlogged = self._unlogged(_checkpoint(args, state))
        if unlogged.exists():
            self._trainer.take_up(read_json(unlogged))

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = _checkpoint(args, state)
        if unlogged := self._trainer.unlogged():
            write_json(self._unlogged(checkpoint), unlogged)
        self._trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            mark(checkpoint)
            for older in Path(args.output_dir).glob("checkpoint-*"):
                if _NAME.fullmatch(older.name) and step_of(older) < state.global_step:
                    remove(older)
        self._trainer.accelerator.wait_for_everyone()

    def _unlogged(self, checkpoint: Path) -> Path:
        return checkpoint / f"unlogged-{self._trainer.accelerator.process_index}.json"


def _checkpoint(args: Any, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


class _StopInOrder(TrainerCallback):
    """At a signal to any of the processes: saves a checkpoint after the step that is under way, and ends there."""

    def __init__(self, trainer: PassTrainer[Any]) -> None:
        self._trainer = trainer
        self._signal: int | None = None

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._signal = self._of_any_process()
        if self._signal is not None:
            control.should_save = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._signal is not None:
            raise interruption.Interrupted(self._signal, f"after step {state.global_step}, which is saved")

    def _of_any_process(self) -> int | None:
        accelerator, mine = self._trainer.accelerator, interruption.pending()
        if accelerator.num_processes == 1:
            return mine
        signals = accelerator.gather(torch.tensor([mine or 0], device=accelerator.device))
        return int(signals.max()) or None


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
    """The last steps are logged too, where they don't fill a logging interval."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


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

"""NaN and infinity in training: looked for at every step before the optimiser takes it, then stopped at or skipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from spinlm.errors import UserError
from spinlm.players.logprobs import widest_float

_SKIPPED = "skipped_nonfinite"


class Named(Protocol):
    """Something to train on that messages can name."""

    @property
    def id(self) -> str: ...


class NonFiniteLoss(UserError):
    """The loss, its gradient or the weights are NaN or infinite."""

    def __init__(self, step: int, what: str, where: str = "", kept: str = "") -> None:
        """
        Args:
            step: The optimiser's, counted from 1.
            what: `the loss is nan`, …
            where: The rows that it comes from.
            kept: Which checkpoint there is to go back to.
        """
        self._parts = (step, what, where)
        found = "; ".join(part for part in (what, kept, where) if part)
        super().__init__(
            f"training stopped at step {step}: {found}. Lower learning_rate or beta, raise warmup_steps, or train in "
            "float32; training.skip_nonfinite skips single steps like this one (a run goes on with another recipe by "
            "--fork NEW_RUN)."
        )

    def keeping(self, checkpoint: Path | None) -> NonFiniteLoss:
        """The same, with the last good checkpoint."""
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written before"
        return NonFiniteLoss(*self._parts, kept)


class StepWatch(TrainerCallback):
    """Stops a training, or skips the step, where the optimiser would be given what isn't a number.

    Every number of a step is kept on its device until then: one wait for the device a step, and with several
    processes one small exchange, so that all of them come to the same.

    Attributes:
        say: Where a skipped step is told.
    """

    def __init__(self, trainer: Any, rows_are: str, skip: int) -> None:
        """
        Args:
            trainer: A PassTrainer.
            rows_are: What its rows are called.
            skip: How many steps of a training may be skipped.
        """
        self._trainer = trainer
        self._rows_are = rows_are
        self._skip = skip
        self._passes: list[tuple[Sequence[Named], Tensor, Mapping[str, Tensor]]] = []
        self.say: Callable[[str], None] = logging.get_logger(__name__).warning

    def saw(self, rows: Sequence[Named], loss: Tensor, numbers: Mapping[str, Tensor]) -> None:
        """Take note of a pass: its loss, and numbers of each of its rows by name."""
        self._passes.append((rows, loss, numbers))

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._passes = []

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        passes, self._passes = self._passes, []
        what = self._amiss(self._values(passes, args.fp16))
        self._trainer.end_step(taken=what is None)
        if what is None:
            return
        step, where = state.global_step + 1, self._origin(passes)
        if skipped_steps(state) >= self._skip:
            already = f" after {self._skip} such steps were skipped" if self._skip else ""
            raise NonFiniteLoss(step, what + already, where)
        self._trainer.model_wrapped.zero_grad()  # without gradients the optimiser does nothing
        state.stateful_callbacks[_SKIPPED] = {"steps": skipped_steps(state) + 1}
        if state.is_world_process_zero:
            self.say(
                f"step {step} skipped ({skipped_steps(state)} of {self._skip} that training.skip_nonfinite allows): "
                f"{what}; {where}"
            )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            self._check_weights(state)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._check_weights(state)

    def _check_weights(self, state: TrainerState) -> None:
        trained = [parameter for parameter in self._trainer.model_wrapped.parameters() if parameter.requires_grad]
        if not math.isfinite(self._together({"weights": _largest(trained)})["weights"]):
            raise NonFiniteLoss(state.global_step, "its weights are not finite numbers")

    def _values(self, passes: Sequence[tuple[Any, Tensor, Mapping[str, Tensor]]], fp16: bool) -> dict[str, float]:
        """Of the whole step. In float16 an infinite gradient is how the loss scale is found: that says nothing."""
        values = {"loss": torch.stack([loss for _, loss, _ in passes]).sum()}
        for name in passes[0][2].keys() - {"loss"}:
            values[name] = torch.cat([numbers[name] for _, _, numbers in passes]).sum()
        if not fp16:
            gradients = [parameter.grad for parameter in self._trainer.model_wrapped.parameters()]
            values["gradient"] = _largest(one for one in gradients if one is not None)
        return self._together(values)

    def _together(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """The sums over all processes: what isn't finite in one isn't in the sum."""
        accelerator = self._trainer.accelerator
        dtype = widest_float(accelerator.device)
        numbers = torch.stack([value.to(accelerator.device, dtype) for value in values.values()])
        if accelerator.num_processes > 1:
            numbers = accelerator.reduce(numbers, "sum")
        return dict(zip(values, numbers.tolist(), strict=True))

    @staticmethod
    def _amiss(values: Mapping[str, float]) -> str | None:
        for name, value in values.items():
            if not math.isfinite(value):
                return "the gradient is not finite" if name == "gradient" else f"the {name} is {value}"
        return None

    def _origin(self, passes: Sequence[tuple[Sequence[Named], Tensor, Mapping[str, Tensor]]]) -> str:
        """The rows whose own numbers aren't finite; where there are none, those of the whole step."""
        all_ids, ids = [], []
        for rows, _, numbers in passes:
            finite = torch.stack([torch.isfinite(one) for one in numbers.values()]).all(dim=0).tolist()
            all_ids += [row.id for row in rows]
            ids += [row.id for row, is_finite in zip(rows, finite, strict=True) if not is_finite]
        found = gather_object(ids)
        beginning = f"the {self._rows_are} in question" if found else f"the {self._rows_are} of that step"
        return f"{beginning}: {'; '.join(dict.fromkeys(found or gather_object(all_ids)))}"


def skipped_steps(state: TrainerState) -> int:
    """How many steps of a training have been skipped so far; a checkpoint keeps it."""
    return int((state.stateful_callbacks or {}).get(_SKIPPED, {}).get("steps", 0))


def _largest(tensors: Iterable[Tensor]) -> Tensor:
    """The largest number's size, NaN where there is one; of sharded tensors, in this process's part."""
    local = [one.to_local() if hasattr(one, "to_local") else one for one in tensors]
    return torch.nn.utils.get_total_norm([one.detach() for one in local], norm_type=math.inf)

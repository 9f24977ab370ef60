"""A Trainer that counts the optimiser's batch in rows and a pass through the model in tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import Trainer

from spinlm.players.layouts import into_passes
from spinlm.players.logprobs import Method, scoring
from spinlm.training.nonfinite import Named, StepWatch

Row = TypeVar("Row", bound=Named)


class PassTrainer(Trainer, Generic[Row]):
    """A batch goes through the model in as many passes as its tokens ask for; the gradient is that of one.

    Attributes:
        method: How log-probs are computed.
        tokens_per_pass: A row with more gets a pass of its own.
        numbers: Of each row of the last pass, by name, on the device: what has to be finite, its loss among it.
        watch: Over what is finite.
    """

    method: Method
    tokens_per_pass: int
    numbers: Mapping[str, Tensor]

    def __init__(self, rows_are: str, skip_nonfinite: int = 0, **kwargs: Any) -> None:
        """As Trainer, but for the collator: rows are laid out pass by pass.

        Args:
            rows_are: What messages call them.
            skip_nonfinite: How many steps may be skipped for a NaN or an infinity.
            kwargs: Trainer's.
        """
        super().__init__(data_collator=_keep_rows, **kwargs)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the optimiser's whole batch itself
        self.watch = StepWatch(self, rows_are, skip_nonfinite)
        self.add_callback(self.watch)

    # --- what each kind of training says ---

    @abstractmethod
    def count_items(self, rows: Sequence[Row]) -> int:
        """What the loss is the mean over."""

    @abstractmethod
    def count_tokens(self, rows: Sequence[Row]) -> int:
        """The tokens of one pass over rows."""

    @abstractmethod
    def lay_out(self, rows: Sequence[Row]) -> Any:
        """The batch of one pass."""

    def bundles(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows that have something in common, and go through the model together."""
        return [[row] for row in rows]

    def as_they_are_now(self, rows: list[Row]) -> list[Row]:
        """The rows of a batch when their step begins."""
        return rows

    def end_step(self, taken: bool) -> None:
        """A step's gradient is complete; it is taken, or skipped."""

    # --- the step ---

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The optimiser's batch, and its number of items over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [{"rows": self.as_they_are_now(batch["rows"])} for batch in batches]
        items = sum(self.count_items(batch["rows"]) for batch in batches)
        if self.accelerator.num_processes == 1:
            return batches, items
        return batches, self.accelerator.gather(torch.tensor(items, device=device)).sum()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward, pass by pass.

        What isn't finite is the watch's concern: the Trainer's own mean would never be a number again.
        """
        passes = self.passes(inputs["rows"])
        loss = torch.zeros((), device=self.args.device)
        with scoring(self.model, self.method):
            for number, rows in enumerate(passes, start=1):
                with self._gradients_synchronised(model, number == len(passes)):
                    loss_of_pass = super().training_step(model, self.lay_out(rows), num_items_in_batch)
                self.watch.saw(rows, loss_of_pass, self.numbers)
                loss += loss_of_pass
        return loss.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of an evaluation batch."""
        loss = torch.zeros((), device=self.args.device)
        items = self.count_items(inputs["rows"])
        with torch.no_grad(), scoring(self.model, self.method), self.compute_loss_context_manager():
            for rows in self.passes(inputs["rows"]):
                loss += self.compute_loss(model, self._prepare_inputs(self.lay_out(rows)), num_items_in_batch=items)
        return loss, None, None

    def passes(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The rows of each pass: as many passes in every process, where each pass gathers the model's weights."""
        fitting = [
            part
            for bundle in self.bundles(rows)
            for part in into_passes(bundle, self.count_tokens, self.tokens_per_pass)
        ]
        together = into_passes(fitting, lambda parts: self.count_tokens(_joined(parts)), self.tokens_per_pass)
        passes = [_joined(parts) for parts in together]
        if self.accelerator.num_processes > 1 and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            count = self.accelerator.gather(torch.tensor(len(passes), device=self.args.device)).max()
            while len(passes) < int(count):
                longest = passes.pop(max(range(len(passes)), key=lambda number: len(passes[number])))
                passes += [longest[::2], longest[1::2]]
        return passes

    # --- what is logged as a mean over several steps ---

    def unlogged(self) -> dict[str, Any]:
        """What has been added up since the last logging step, as JSON has it; empty where nothing has."""
        if self.state.global_step == self._globalstep_last_logged:
            return {}
        return {"last_logged": self._globalstep_last_logged, "loss": self._tr_loss.item()}

    def take_up(self, unlogged: Mapping[str, Any]) -> None:
        """Go on with what was added up when a checkpoint was written."""
        self._globalstep_last_logged = unlogged["last_logged"]
        self._tr_loss += unlogged["loss"]

    @contextmanager
    def _gradients_synchronised(self, model: Any, last: bool) -> Iterator[None]:
        """Between processes, in the last pass only, and there only if the Trainer wants it at all."""
        state = self.accelerator.gradient_state
        if last or not state.sync_gradients:
            yield
            return
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(True)

    def _prepare_input(self, data: Any) -> Any:
        """To the device as it is: with DeepSpeed Trainer would round log-probs to the model's half precision, too."""
        if isinstance(data, Mapping):
            return {name: self._prepare_input(value) for name, value in data.items()}
        if not isinstance(data, Tensor):
            return data
        on_gpu = self.args.device.type == "cuda"
        return (data.pin_memory() if on_gpu and data.device.type == "cpu" else data).to(
            self.args.device, non_blocking=on_gpu
        )

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated here: Trainer would ask padded rows for it."""
        return 0


def _keep_rows(rows: list[Any]) -> dict[str, Any]:
    return {"rows": rows}


def _joined(parts: Sequence[Sequence[Row]]) -> list[Row]:
    return [row for part in parts for row in part]

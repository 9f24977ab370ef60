"""Generation by transformers: continuous batching, and whole batches for models that it isn't for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch

from spinlm.data.render import Renderer
from spinlm.errors import OutOfMemory, UserError, first_line
from spinlm.generation.attention import decoding_attention
from spinlm.generation.continuous import ContinuousBatch, columns_needed, row_bytes
from spinlm.generation.engine import OnProgress, Request, Response, Sampling
from spinlm.generation.memory import rows_that_fit
from spinlm.generation.packed_linear import packed_bytes, packed_linears
from spinlm.generation.slot_cache import supports_slots
from spinlm.generation.whole_batches import decode_whole_batch
from spinlm.hardware import is_out_of_memory, release_memory, total_memory
from spinlm.players.logprobs import NOT_FINITE

WHOLE_BATCH = 32
"""Responses in a whole batch, where no other number is asked for."""

Answers = list[tuple[list[int], float]]
"""Token ids and log-prob of each request's response."""


class TransformersEngine:
    """Decodes with any causal language model of transformers, possibly with a LoRA adapter.

    What it is given in one call is decoded in the same batches whenever it is given again. Where memory runs out, the
    call begins again with half as many responses together, and so does every later one.

    Attributes:
        batching: `continuous`, or `whole` batches for models that remember more of a token than its keys
            and values (Mamba).
        packs_weights: Whether the linear layers are computed from packed copies: float32 on a CPU that has
            oneDNN, and memory for the copies.
    """

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        batch_size: int | None = None,
        on_halved: Callable[[int], None] | None = None,
    ) -> None:
        """Nothing is computed yet.

        Args:
            model: In evaluation mode.
            renderer: The tokenizer's side of it.
            batch_size: Responses decoded together. None: as many as fit into memory and are of use.
            on_halved: Called with the new batch size where memory has run out.
        """
        self._model = model
        self._renderer = renderer
        self._batch_size = batch_size
        self._on_halved = on_halved
        self._device = next(model.parameters()).device
        self.batching: Literal["continuous", "whole"] = "continuous" if supports_slots(model) else "whole"
        self._packed_bytes = self._bytes_to_pack()
        self.packs_weights = self._packed_bytes > 0

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: OnProgress | None = None
    ) -> list[Response]:
        """One response for each request, in their order.

        Raises:
            OutOfMemory: Not even one at a time fits.
        """
        if not requests:
            return []
        rows = min(self._batch_size or self._rows(requests, sampling), len(requests))
        while isinstance(answers := self._attempt(requests, sampling, rows, _Progress(on_progress)), str):
            rows = self._halve(rows, words=answers)
        return [self._response(ids, logprob) for ids, logprob in answers]

    def _attempt(
        self, requests: Sequence[Request], sampling: Sampling, rows: int, progress: _Progress
    ) -> Answers | str:
        """Where memory runs out, who says so in which words; nothing of the attempt is in memory then."""
        decode = self._in_whole_batches if self.batching == "whole" else self._continuously
        try:
            return decode(requests, sampling, rows, progress)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            words = first_line(error)
        progress.take_back()
        return words

    def _halve(self, rows: int, words: str) -> int:
        release_memory()
        if rows == 1:
            raise OutOfMemory(
                "generation, of one response at a time (generation.batch_size)",
                words,
                "generate",
                "Lower generation.max_new_tokens or data.max_prompt_tokens, or load the model smaller (model.dtype, "
                "model.load_in_4bit); a run goes on with another recipe by --fork NEW_RUN",
            )
        self._batch_size = rows // 2
        if self._on_halved is not None:
            self._on_halved(self._batch_size)
        return self._batch_size

    def _continuously(
        self, requests: Sequence[Request], sampling: Sampling, rows: int, on_progress: OnProgress
    ) -> Answers:
        batch = ContinuousBatch(
            self._model, requests, sampling, rows, self._renderer.stop_ids, self._renderer.pad_id, on_progress
        )
        with ExitStack() as for_the_time:
            if self.packs_weights:
                for_the_time.enter_context(packed_linears(self._model, rows))
            if self._device.type == "cpu":
                for_the_time.enter_context(decoding_attention(self._model))
            batch.run()
        return list(zip(batch.token_ids, batch.logprobs.tolist(), strict=True))

    def _in_whole_batches(
        self, requests: Sequence[Request], sampling: Sampling, rows: int, on_progress: OnProgress
    ) -> Answers:
        """Batches of requests of like length."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        answers: dict[int, tuple[list[int], float]] = {}
        for start in range(0, len(order), rows):
            places = order[start : start + rows]
            batch = [requests[i] for i in places]
            ids, logprobs = decode_whole_batch(
                self._model, batch, sampling, self._renderer.stop_ids, self._renderer.pad_id, on_progress
            )
            answers.update(zip(places, zip(ids, logprobs.tolist(), strict=True), strict=True))
        return [answers[i] for i in range(len(requests))]

    def _rows(self, requests: Sequence[Request], sampling: Sampling) -> int:
        """Where no number is asked for."""
        if self.batching == "whole":
            return WHOLE_BATCH
        columns = columns_needed(max(len(request.prompt_ids) for request in requests), sampling.max_new_tokens)
        held = sum(parameter.nbytes for parameter in self._model.parameters()) + self._packed_bytes
        on_gpu = self._device.type == "cuda"
        return rows_that_fit(total_memory(self._device), held, row_bytes(self._model, columns), on_gpu)

    def _bytes_to_pack(self) -> int:
        usable = self._device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        if self.batching == "whole" or not usable or torch.is_autocast_enabled("cpu"):
            return 0
        return packed_bytes(self._model, total_memory(self._device))

    def _response(self, ids: list[int], logprob: float) -> Response:
        if not math.isfinite(logprob):
            raise UserError(NOT_FINITE)
        finished = ids[-1] in self._renderer.stop_ids
        return Response(ids, self._renderer.text(ids), "stop" if finished else "length", logprob)


class _Progress:
    """Passes on what an attempt has made, and takes it back where it was in vain."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress
        self._tokens = self._finished = 0

    def __call__(self, tokens: int, finished: int) -> None:
        self._tokens += tokens
        self._finished += finished
        if self._on_progress is not None:
            self._on_progress(tokens, finished)

    def take_back(self) -> None:
        self(-self._tokens, -self._finished)

"""Continuous batching: a new request takes a row as soon as a response has ended in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlm.generation.engine import OnProgress, Request, Sampling
from spinlm.generation.sampling import Sampler
from spinlm.generation.slot_cache import Prefill, SlotCache
from spinlm.players.layouts import common_start
from spinlm.players.linear import rows_to_spare
from spinlm.players.logprobs import logits_argument

PREFILL_TOKENS = 1024
"""Prompt tokens in one forward pass, at most (but for a single prompt that is longer): what a CPU's caches hold."""
PREFILL_TOKENS_ON_GPU = 8192

SPARE_COLUMNS = 64
"""Columns more than the longest response needs: how many steps lie between two moves of the cache, at least."""

WIDTH_SHARE = 8
"""So many columns of a prefix, whose keys and values are only looked at, take the room of one that is run."""

LOGITS_COPIES = 4
"""Tensors of the vocabulary's size, in float32, that a draw has at the same time."""

REFILL_SHARE = 8
"""Rows are filled again when one in so many is free: a forward pass for each new prompt would cost more."""


class ContinuousBatch:
    """Answers requests in the rows of one cache.

    Attributes:
        token_ids: Of each request's response, up to and with its stop token.
        logprobs: Of each response, in float32, [requests].
    """

    def __init__(
        self,
        model: Any,
        requests: Sequence[Request],
        sampling: Sampling,
        rows: int,
        stop_ids: Collection[int],
        pad_id: int,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Nothing is computed yet.

        Args:
            model: One that `supports_slots`, in evaluation mode.
            requests: At least one.
            sampling: How to draw.
            rows: Responses decoded at the same time, at most.
            stop_ids: A response ends with any of them.
            pad_id: Fills up prompts; never seen.
            on_progress: Called after each draw.
        """
        self._model = model
        self._prompts = [tuple(request.prompt_ids) for request in requests]
        self._cap = sampling.max_new_tokens
        self._stop_ids = frozenset(stop_ids)
        self._pad_id = pad_id
        self._on_progress = on_progress
        self._device = next(model.parameters()).device
        self._prefill_tokens = PREFILL_TOKENS_ON_GPU if self._device.type == "cuda" else PREFILL_TOKENS
        self._last_only = logits_argument(model, 1)
        self._sampler = Sampler([request.seed for request in requests], sampling, self._device)
        self.token_ids: list[list[int]] = [[] for _ in requests]
        self.logprobs = torch.zeros(len(requests), dtype=torch.float32, device=self._device)
        # Longest first: what doesn't fit into memory shows at once. Equal prompts side by side.
        order = sorted(range(len(requests)), key=lambda i: (-len(self._prompts[i]), self._prompts[i]))
        self._waiting = deque(order)
        self._rows = rows
        self._prefix = self._prompts[0][: common_start(set(self._prompts))]
        columns = columns_needed(max(map(len, self._prompts)), self._cap)
        self._cache = SlotCache(rows + idle_rows(rows, self._device), columns)
        # Of the rows in use: the request, the column of its first token, the newest token (not in the cache yet).
        self._owners: list[int] = []
        self._begins = self._tokens = torch.empty(0, dtype=torch.long, device=self._device)

    def run(self) -> None:
        """Answer all."""
        if self._prefix:
            self._run_prefix()
        while self._waiting or self._owners:
            free = self._rows - len(self._owners)
            if self._waiting and (not self._owners or free * REFILL_SHARE >= self._rows):
                self._prefill()
            else:
                self._step()

    def _prefill(self) -> None:
        """Run the next prompts, each once however many responses it is to have, and draw their first tokens."""
        prompts, owners = self._next_prompts()
        rows, prefix = len(owners), len(self._prefix)
        width = max(len(prompt) for prompt in prompts)
        if self._cache.end < width:
            self._move_columns(width)
        input_ids, attention_mask = pad_left(prompts, self._pad_id, self._device)
        places = {prompt: place for place, prompt in enumerate(prompts)}
        copies = torch.tensor([places[self._prompts[owner]] for owner in owners], device=self._device)
        position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        self._cache.prefilling = Prefill(copies, self._columns(position_ids) if prefix else None)
        logits = self._forward(input_ids[:, prefix:], attention_mask, position_ids[:, prefix:])[copies]
        self._cache.prefilling = None

        lengths = torch.tensor([len(self._prompts[owner]) for owner in owners], device=self._device)
        self._owners += owners
        self._begins = torch.cat([self._begins, self._cache.end - lengths])
        self._cache.rows += rows
        self._cache.begin = min(self._cache.begin, self._cache.end - width)
        self._tokens = torch.cat([self._tokens, torch.zeros(rows, dtype=torch.long, device=self._device)])
        self._draw(logits, first=len(self._owners) - rows)

    def _run_prefix(self) -> None:
        """What all prompts begin with, once."""
        size, length = self._cache.size, len(self._prefix)
        self._cache = SlotCache(1, length)
        self._cache.end = length
        self._cache.prefilling = Prefill(torch.zeros(1, dtype=torch.long, device=self._device))
        input_ids, attention_mask = pad_left([self._prefix], self._pad_id, self._device)
        self._forward(input_ids, attention_mask, torch.arange(length, device=self._device)[None])
        self._cache = SlotCache(*size, prefix=self._cache)

    def _columns(self, positions: Tensor) -> Tensor:
        """Where each column's keys are: the prefix's by position, the others where the pass has them, padding anywhere.

        Args:
            positions: Of whole prompts padded on the left, [prompts, columns].
        """
        here = torch.arange(positions.shape[1], device=self._device)
        return torch.where(positions < len(self._prefix), positions, here)

    def _next_prompts(self) -> tuple[list[tuple[int, ...]], list[int]]:
        """Different prompts to run together, and the requests that they answer."""
        prompts: list[tuple[int, ...]] = []
        owners: list[int] = []
        while self._waiting and len(owners) < self._rows - len(self._owners):
            prompt = self._prompts[self._waiting[0]]
            if not prompts or prompt != prompts[-1]:
                if prompts and (len(prompts) + 1) * self._prefill_room(prompts[0]) > self._prefill_tokens:
                    break
                prompts.append(prompt)
            owners.append(self._waiting.popleft())
        return prompts, owners

    def _prefill_room(self, prompt: tuple[int, ...]) -> int:
        """Of each prompt beside this longest one, in tokens that are run; a prefix isn't, but its keys are there."""
        return max(len(prompt) - len(self._prefix), len(prompt) // WIDTH_SHARE)

    def _step(self) -> None:
        """One token more for every row in use."""
        cache = self._cache
        if cache.end == cache.size[1]:
            longest_waiting = len(self._prompts[self._waiting[0]]) if self._waiting else 0
            self._move_columns(max(cache.end - cache.begin, longest_waiting))
        columns = torch.arange(cache.begin, cache.end + 1, device=self._device)
        idle = (0, idle_rows(cache.rows, self._device))  # here, not in every layer; an idle row sees itself alone
        begins = F.pad(self._begins, idle, value=cache.end)
        attention_mask = (columns >= begins[:, None]).long()
        position_ids = (cache.end - begins)[:, None]
        logits = self._forward(F.pad(self._tokens, idle)[:, None], attention_mask, position_ids)
        cache.end += 1
        self._draw(logits[: cache.rows], first=0)

    def _forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """The logits after each row's last token, [n, V]."""
        output = self._model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=self._cache,
            use_cache=True,
            **self._last_only,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _draw(self, logits: Tensor, first: int) -> None:
        """Draw a token for each row from the first one on, and free the rows whose response ends with it."""
        owners = self._owners[first:]
        requests = torch.tensor(owners, device=self._device)
        ages = torch.tensor([len(self.token_ids[owner]) for owner in owners], device=self._device)
        tokens, logprobs = self._sampler.draw(logits, requests, ages)
        self._tokens[first:] = tokens
        self.logprobs.index_add_(0, requests, logprobs)
        for owner, token in zip(owners, tokens.tolist(), strict=True):
            self.token_ids[owner].append(token)
        ended = [row for row, owner in enumerate(owners, start=first) if self._has_ended(owner)]
        if ended:
            self._free(ended)
        self._forget_columns()
        if self._on_progress is not None:
            self._on_progress(len(owners), len(ended))

    def _has_ended(self, owner: int) -> bool:
        ids = self.token_ids[owner]
        return len(ids) == self._cap or ids[-1] in self._stop_ids

    def _free(self, ended: list[int]) -> None:
        """The last rows that go on take the places of those that ended, so that the rows in use are the first."""
        left = len(self._owners) - len(ended)
        targets = [row for row in ended if row < left]
        sources = sorted(set(range(left, len(self._owners))).difference(ended))
        order = list(range(left))
        for source, target in zip(sources, targets, strict=True):
            order[target] = source
        self._owners = [self._owners[row] for row in order]
        kept = torch.tensor(order, dtype=torch.long, device=self._device)
        self._begins, self._tokens = self._begins[kept], self._tokens[kept]
        if targets:
            self._cache.move_rows(*torch.tensor([sources, targets], device=self._device))
        self._cache.rows = left

    def _forget_columns(self) -> None:
        """Those before the oldest token of the rows in use."""
        lengths = [len(self._prompts[owner]) + len(self.token_ids[owner]) - 1 for owner in self._owners]
        self._cache.begin = self._cache.end - max(lengths, default=0)

    def _move_columns(self, end: int) -> None:
        self._begins += end - self._cache.end
        self._cache.move_columns(end)


def idle_rows(rows: int, device: torch.device) -> int:
    """Decoded beside so many that are in use, on a CPU: its products are of filled-up rows anyway."""
    return rows_to_spare(rows) if device.type == "cpu" else 0


def columns_needed(longest_prompt: int, max_new_tokens: int) -> int:
    """Of the cache, for a longest prompt and response."""
    return longest_prompt + max_new_tokens + SPARE_COLUMNS


def row_bytes(model: Any, columns: int) -> int:
    """What one response takes: its keys and values, found by running a token, and its logits."""
    device = next(model.parameters()).device
    cache = SlotCache(1, 1)
    cache.end, cache.prefilling = 1, Prefill(torch.zeros(1, dtype=torch.long, device=device))
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    vocabulary: int = model(input_ids=token, past_key_values=cache, use_cache=True).logits.shape[-1]
    return columns * cache.nbytes() + LOGITS_COPIES * vocabulary * 4


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [prompts, longest prompt] each."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids.to(device), attention_mask.to(device)

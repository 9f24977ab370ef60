"""Generation in whole batches by transformers' own `generate`: for every model that it can run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from spinlm.generation.continuous import pad_left
from spinlm.generation.engine import OnProgress, Request, Sampling
from spinlm.generation.sampling import Sampler


def decode_whole_batch(
    model: Any,
    requests: Sequence[Request],
    sampling: Sampling,
    stop_ids: Collection[int],
    pad_id: int,
    on_progress: OnProgress | None = None,
) -> tuple[list[list[int]], Tensor]:
    """Decode a batch until its last response has ended.

    Returns:
        Each response's token ids up to and with its stop token, and log-probs, [requests].
    """
    device = next(model.parameters()).device
    input_ids, attention_mask = pad_left([request.prompt_ids for request in requests], pad_id, device)
    chooser = _Chooser(requests, sampling, stop_ids, device, on_progress)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(stop_ids),
            pad_token_id=pad_id,
        ),
        logits_processor=LogitsProcessorList([chooser]),
    )
    answers = output[:, input_ids.shape[1] :].tolist()
    lengths = chooser.lengths.tolist()
    return [answer[:length] for answer, length in zip(answers, lengths, strict=True)], chooser.logprobs


class _Chooser(LogitsProcessor):  # type: ignore[no-untyped-call]
    """Chooses each row's next token itself and leaves `generate` no other choice.

    Attributes:
        logprobs: Sum of the chosen tokens' log-probs under the model, up to each row's end, [B].
        lengths: How many tokens each row has until its end, [B].
    """

    def __init__(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        stop_ids: Collection[int],
        device: torch.device,
        on_progress: OnProgress | None,
    ) -> None:
        self._sampler = Sampler([request.seed for request in requests], sampling, device)
        self._rows = torch.arange(len(requests), device=device)
        self._running = torch.ones(len(requests), dtype=torch.bool, device=device)
        self._stop_ids = torch.tensor(sorted(stop_ids), device=device)
        self._cap = sampling.max_new_tokens
        self._on_progress = on_progress
        self._step = 0
        self.logprobs = torch.zeros(len(requests), dtype=torch.float32, device=device)
        self.lengths = torch.zeros_like(self._rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, logprobs = self._sampler.draw(scores, self._rows, torch.full_like(self._rows, self._step))
        self.logprobs += torch.where(self._running, logprobs, 0.0)
        self.lengths += self._running
        self._step += 1
        ending = self._running & (torch.isin(tokens, self._stop_ids) | (self._step == self._cap))
        if self._on_progress is not None:
            self._on_progress(int(self._running.sum()), int(ending.sum()))
        self._running &= ~ending
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

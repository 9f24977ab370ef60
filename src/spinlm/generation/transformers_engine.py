"""Generation by transformers' own `generate`, for every model that it can run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from spinlm.data.render import Renderer
from spinlm.generation.engine import OnProgress, Request, Response, Sampling
from spinlm.players.logprobs import widest_float


class TransformersEngine:
    """Decodes batches of requests of like length, padded on the left."""

    def __init__(self, model: Any, renderer: Renderer, batch_size: int) -> None:
        self._model = model
        self._renderer = renderer
        self._batch_size = batch_size

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: OnProgress | None = None
    ) -> list[Response]:
        """One response for each request, in their order."""
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        responses: dict[int, Response] = {}
        for start in range(0, len(order), self._batch_size):
            places = order[start : start + self._batch_size]
            batch = self._decode([requests[i] for i in places], sampling, on_progress)
            responses.update(zip(places, batch, strict=True))
        return [responses[i] for i in range(len(requests))]

    def _decode(self, requests: list[Request], sampling: Sampling, on_progress: OnProgress | None) -> list[Response]:
        stop_ids = sorted(self._renderer.stop_ids)
        device = next(self._model.parameters()).device
        input_ids, attention_mask = _pad_left([r.prompt_ids for r in requests], self._renderer.pad_id, device)
        sampler = SeededSampler([r.seed for r in requests], sampling, stop_ids, device, on_progress)
        output = self._model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,
                eos_token_id=stop_ids,
                pad_token_id=self._renderer.pad_id,
            ),
            logits_processor=LogitsProcessorList([sampler]),
        )
        answers = output[:, input_ids.shape[1] :].tolist()
        logprobs = sampler.logprobs.tolist()
        return [self._response(answer, logprob) for answer, logprob in zip(answers, logprobs, strict=True)]

    def _response(self, answer: list[int], logprob: float) -> Response:
        ids = _up_to_stop(answer, self._renderer.stop_ids)
        finished = bool(ids) and ids[-1] in self._renderer.stop_ids
        return Response(ids, self._renderer.text(ids), "stop" if finished else "length", logprob)


class SeededSampler(LogitsProcessor):  # type: ignore[no-untyped-call]
    """Chooses each row's next token itself and leaves `generate` no other choice.

    A row's uniform numbers are drawn from its own seed before decoding starts, so that its response
    depends on nothing that is decoded beside it.

    Attributes:
        logprobs: Sum of the chosen tokens' log-probs under the model, up to each row's end, [B].
    """

    def __init__(
        self,
        seeds: Sequence[int],
        sampling: Sampling,
        stop_ids: Collection[int],
        device: torch.device,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.logprobs = torch.zeros(len(seeds), dtype=torch.float32, device=device)
        self._running = torch.ones(len(seeds), dtype=torch.bool, device=device)
        self._stop_ids = torch.tensor(sorted(stop_ids), device=device)
        self._sampling = sampling
        self._on_progress = on_progress
        self._step = 0
        self._uniforms = torch.empty(0)
        if sampling.temperature > 0:
            self._uniforms = torch.stack([_uniforms(seed, sampling.max_new_tokens) for seed in seeds])
            self._uniforms = self._uniforms.to(device, widest_float(device))
        self._warpers = LogitsProcessorList()
        if sampling.top_k > 0:
            self._warpers.append(TopKLogitsWarper(top_k=sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p=sampling.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = torch.log_softmax(scores.float(), dim=-1)
        tokens = self._choose(input_ids, logprobs)
        chosen = logprobs.gather(1, tokens[:, None])[:, 0]
        self.logprobs += torch.where(self._running, chosen, 0.0)
        stops = torch.isin(tokens, self._stop_ids)
        if self._on_progress is not None:
            last = self._step + 1 == self._sampling.max_new_tokens
            finishing = self._running if last else self._running & stops
            self._on_progress(int(self._running.sum()), int(finishing.sum()))
        self._running &= ~stops
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def _choose(self, input_ids: Tensor, logprobs: Tensor) -> Tensor:
        if self._sampling.temperature == 0:
            return logprobs.argmax(dim=-1)
        warped = self._warpers(input_ids, logprobs / self._sampling.temperature)
        cumulative = torch.softmax(warped, dim=-1).to(self._uniforms.dtype).cumsum(dim=-1)
        targets = self._uniforms[:, self._step, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp(max=logprobs.shape[1] - 1)


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids.to(device), attention_mask.to(device)


def _up_to_stop(ids: list[int], stop_ids: Collection[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in stop_ids:
            return ids[: place + 1]
    return ids

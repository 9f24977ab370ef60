"""Answering prompts: spinlm's engine, transformers' generate, and a forward pass over the same tokens."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.inputs import answer_tokens
from benchmarks.record import Turn
from spinlm.data.render import Renderer
from spinlm.generation.engine import Request, Sampling
from spinlm.generation.transformers_engine import TransformersEngine
from spinlm.players.linear import fast_linear_layers

Prompts = Sequence[Sequence[int]]
OFFICIAL_BATCH = 16
"""The official script's."""

FORWARD_TOKENS = 2048
"""Tokens in a batch of the plain forward pass."""


class Generation(ABC):
    """A side that answers the same prompts each turn.

    Attributes:
        name: The side's.
        answers: Of the last turn, up to their ends.
    """

    def __init__(self, name: str, prompts: Prompts, max_new_tokens: int) -> None:
        self.name = name
        self.answers: list[list[int]] = []
        self._prompts = prompts
        self._max_new_tokens = max_new_tokens

    def turn(self) -> Turn:
        """Answer all prompts by sampling at temperature 1."""
        started = time.perf_counter()
        self.answers = self.answered(self._prompts, Sampling(self._max_new_tokens))
        seconds = time.perf_counter() - started
        tokens = sum(map(len, self.answers))
        return Turn(self.name, seconds, tokens, {"tokens_an_answer": tokens / len(self.answers)})

    @abstractmethod
    def answered(self, prompts: Prompts, sampling: Sampling) -> list[list[int]]:
        """Answers up to their ends."""


class SpinlmGeneration(Generation):
    """spinlm's transformers engine, by default with as many slots as it takes itself."""

    def __init__(
        self, model: Any, renderer: Renderer, prompts: Prompts, max_new_tokens: int, slots: int | None = None
    ) -> None:
        super().__init__("spinlm" if slots is None else f"spinlm, {slots} slots", prompts, max_new_tokens)
        self._engine = TransformersEngine(model, renderer, slots)

    def answered(self, prompts: Prompts, sampling: Sampling) -> list[list[int]]:
        requests = [Request(list(prompt), seed) for seed, prompt in enumerate(prompts)]
        return [response.token_ids for response in self._engine.generate(requests, sampling)]


class TransformersGeneration(Generation):
    """transformers' `generate`, in batches of the prompts as they come, as the official script does."""

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        prompts: Prompts,
        max_new_tokens: int,
        batch: int,
        by_length: bool = False,
    ) -> None:
        super().__init__(
            f"transformers, batch {batch}" + (" by length" if by_length else ""),
            sorted(prompts, key=len) if by_length else prompts,
            max_new_tokens,
        )
        self._model = model
        self._renderer = renderer
        self._batch = batch

    def answered(self, prompts: Prompts, sampling: Sampling) -> list[list[int]]:
        torch.manual_seed(0)
        batches = (prompts[start : start + self._batch] for start in range(0, len(prompts), self._batch))
        return [answer for batch in batches for answer in self._answered(batch, sampling)]

    @torch.no_grad()
    def _answered(self, prompts: Prompts, sampling: Sampling) -> list[list[int]]:
        batch = self._renderer.tokenizer.pad(
            {"input_ids": list(map(list, prompts))}, padding_side="left", return_tensors="pt"
        )
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        output = self._model.generate(
            **batch,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(self._renderer.stop_ids),
            pad_token_id=self._renderer.pad_id,
            **(choice if sampling.temperature > 0 else {"do_sample": False}),
        )
        answers = output[:, batch["input_ids"].shape[1] :].tolist()
        return [answer_tokens(answer, self._renderer.stop_ids) for answer in answers]


class PagedGeneration(Generation):
    """transformers' own continuous batching, `generate_batch`, over paged keys and values."""

    def __init__(self, model: Any, renderer: Renderer, prompts: Prompts, max_new_tokens: int) -> None:
        super().__init__("transformers, generate_batch", prompts, max_new_tokens)
        self._model = model
        self._renderer = renderer

    def answered(self, prompts: Prompts, sampling: Sampling) -> list[list[int]]:
        torch.manual_seed(0)
        settings = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            top_k=0,
            eos_token_id=sorted(self._renderer.stop_ids),
            pad_token_id=self._renderer.pad_id,
        )
        outputs = self._model.generate_batch(
            list(map(list, prompts)),
            generation_config=settings,
            # By default its blocks take all of the memory.
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=2 * len(prompts), max_batch_tokens=256),
        )
        by_prompt = {tuple(output.prompt_ids): list(output.generated_tokens) for output in outputs.values()}
        return [answer_tokens(by_prompt[tuple(prompt)], self._renderer.stop_ids) for prompt in prompts]


class ForwardPass:
    """The model over prompts and the answers another side gave, all at once: the same tokens, nothing to wait for.

    The head is computed where an answer's tokens are predicted, as in generation; linear layers as in training.
    """

    name = "forward pass"

    def __init__(self, model: Any, prompts: Prompts, answers: Prompts) -> None:
        """Batches are of sequences of like length, FORWARD_TOKENS tokens or so."""
        self._model = model
        self._answered = sum(map(len, answers))
        couples = sorted(zip(prompts, answers, strict=True), key=lambda couple: len(couple[0]) + len(couple[1]))
        self._batches: list[list[tuple[Sequence[int], Sequence[int]]]] = [[]]
        for couple in couples:
            width = len(couple[0]) + len(couple[1])
            if (len(self._batches[-1]) + 1) * width > FORWARD_TOKENS and self._batches[-1]:
                self._batches.append([])
            self._batches[-1].append(couple)

    @torch.no_grad()
    def turn(self) -> Turn:
        started = time.perf_counter()
        with fast_linear_layers(self._model):
            for batch in self._batches:
                self._forward(batch)
        return Turn(self.name, time.perf_counter() - started, self._answered, {})

    def _forward(self, batch: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        mask, predicting = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(batch):
            length = len(prompt) + len(answer)
            ids[row, :length] = torch.tensor([*prompt, *answer])
            mask[row, :length] = 1
            predicting[row, len(prompt) - 1 : length - 1] = True
        hidden = self._model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        self._model.get_output_embeddings()(hidden[predicting])


def unlike(ours: Prompts, others: Prompts) -> float:
    """The share of answers that aren't the same, token for token."""
    return sum(list(a) != list(b) for a, b in zip(ours, others, strict=True)) / len(ours)

"""Drawing next tokens: each request's by its own seed, whatever is decoded beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from spinlm.generation.engine import Sampling
from spinlm.players.logprobs import widest_float

BLOCK = 256
"""Tokens that are summed together where a draw first looks for its place in the vocabulary."""


class Sampler:
    """Draws the tokens of many requests.

    A request's uniform numbers are drawn from its own seed before decoding starts, one for each of its tokens.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        self._uniforms = torch.empty(0)
        if sampling.temperature > 0:
            self._uniforms = torch.stack([_uniforms(seed, sampling.max_new_tokens) for seed in seeds])
            self._uniforms = self._uniforms.to(device, widest_float(device))
        self._warpers = LogitsProcessorList()
        if sampling.top_k > 0:
            self._warpers.append(TopKLogitsWarper(top_k=sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p=sampling.top_p))

    def draw(self, logits: Tensor, requests: Tensor, ages: Tensor) -> tuple[Tensor, Tensor]:
        """One token for each of n rows, and its log-prob under the model, untempered, in float32.

        Args:
            logits: The model's own, [n, V]; overwritten, since a copy would take longer than the draw.
            requests: Which request each row answers, [n].
            ages: How many tokens of the response there are already, [n].

        Returns:
            Tokens and log-probs, both [n].
        """
        logits, temperature = logits.float(), self._sampling.temperature
        if temperature == 0:
            tokens = logits.argmax(dim=-1)
        else:
            warped = logits if temperature == 1 else logits / temperature
            warped = self._warpers(torch.empty(0), warped)
            tokens, logprobs = inverse_cdf(warped, self._uniforms[requests, ages])
            if warped is logits:
                return tokens, logprobs
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)


def inverse_cdf(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the first token whose cumulative probability exceeds the row's uniform number.

    Looked for among blocks of the vocabulary first and then inside one, so that no more than the blocks' sums
    and one block are added up in high precision.

    Args:
        logits: [n, V]; overwritten.
        uniforms: In [0, 1), in the precision to add up with, [n].

    Returns:
        Tokens of probability above zero, and their log-probs in float32, both [n].
    """
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
    if weights.shape[1] % BLOCK:
        weights = F.pad(weights, (0, -weights.shape[1] % BLOCK))
    blocks = weights.view(len(weights), -1, BLOCK)
    sums = blocks.sum(dim=-1).to(uniforms.dtype).cumsum(dim=-1)
    block = _first_above(sums, uniforms[:, None] * sums[:, -1:])
    before = F.pad(sums, (1, 0)).gather(1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].to(uniforms.dtype).cumsum(dim=-1)
    tokens = block * BLOCK + _first_above(inside, uniforms[:, None] * sums[:, -1:] - before)
    tokens.clamp_(max=logits.shape[1] - 1)  # NaN would point past the vocabulary
    chosen = weights.gather(1, tokens).to(uniforms.dtype)
    return tokens[:, 0], (chosen.log() - sums[:, -1:].log())[:, 0].float()


def _first_above(cumulative: Tensor, targets: Tensor) -> Tensor:
    """The place where a cumulative sum first exceeds its target, or, short of it by rounding, last grows, [n, 1]."""
    grows_last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()).clamp_(max=cumulative.shape[1] - 1)
    return torch.minimum(torch.searchsorted(cumulative, targets, right=True), grows_last)


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

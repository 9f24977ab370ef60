"""Pairs and the batches that players and trainers work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """A prompt, the real and a synthetic response, and the opponent's log-probs of both."""

    prompt_ids: list[int]
    real_ids: list[int]
    synthetic_ids: list[int]
    opponent_real_logprob: float
    opponent_synthetic_logprob: float
    synthetic_truncated: bool = False


class ResponseBatch(TypedDict):
    """Prompts with a response each, padded on the right: N responses, T tokens, R response tokens in all.

    Attributes:
        input_ids: [N, T].
        attention_mask: [N, T], 1 for tokens and 0 for padding.
        positions: [R], where in the flattened [N * T] the model predicts each response token.
        targets: [R], the response tokens.
        rows: [R], the response each of them belongs to.
    """

    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    targets: Tensor
    rows: Tensor


class PairBatch(ResponseBatch):
    """B pairs as N = 2B responses: the real ones, then the synthetic ones.

    Attributes:
        opponent_logprobs: [2B], in the same order.
        response_lengths: [2B], in tokens.
        truncated: [B], 1 where the synthetic response was cut at the token cap.
    """

    opponent_logprobs: Tensor
    response_lengths: Tensor
    truncated: Tensor


def drop_identical(pairs: Sequence[Pair]) -> tuple[list[Pair], int]:
    """The pairs whose responses differ, and how many don't: those would only add zero gradients."""
    differing = [pair for pair in pairs if pair.real_ids != pair.synthetic_ids]
    return differing, len(pairs) - len(differing)


def collate_responses(responses: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> ResponseBatch:
    """Lay out (prompt ids, response ids) couples as a batch."""
    import torch

    width = max(len(prompt) + len(response) for prompt, response in responses)
    input_ids = torch.full((len(responses), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(responses), width), dtype=torch.long)
    positions: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    for row, (prompt, response) in enumerate(responses):
        length = len(prompt) + len(response)
        input_ids[row, :length] = torch.tensor([*prompt, *response])
        attention_mask[row, :length] = 1
        first = row * width + len(prompt) - 1  # a token is predicted from the one before it
        positions.extend(range(first, first + len(response)))
        targets.extend(response)
        rows.extend([row] * len(response))
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "positions": torch.tensor(positions),
        "targets": torch.tensor(targets),
        "rows": torch.tensor(rows),
    }


def collate_pairs(pairs: Sequence[Pair], pad_id: int) -> PairBatch:
    """Lay out pairs as a batch."""
    import torch

    real = [(pair.prompt_ids, pair.real_ids) for pair in pairs]
    synthetic = [(pair.prompt_ids, pair.synthetic_ids) for pair in pairs]
    logprobs = [p.opponent_real_logprob for p in pairs] + [p.opponent_synthetic_logprob for p in pairs]
    return {
        **collate_responses(real + synthetic, pad_id),
        "opponent_logprobs": torch.tensor(logprobs, dtype=torch.float32),
        "response_lengths": torch.tensor([len(response) for _, response in real + synthetic]),
        "truncated": torch.tensor([float(pair.synthetic_truncated) for pair in pairs]),
    }

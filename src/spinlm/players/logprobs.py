"""Log-probs of responses: the only place where tokens are shifted against the logits that predict them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlm.data.pairs import ResponseBatch, collate_responses


def widest_float(device: torch.device) -> torch.dtype:
    """float64, but on Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def response_logprobs(model: Any, batch: ResponseBatch) -> Tensor:
    """The log-prob of each response: the sum over its tokens, end-of-turn included, in float32, [N].

    Args:
        model: A causal language model, possibly wrapped for distribution.
        batch: N prompts with a response each.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    predicting = logits.flatten(0, 1).index_select(0, batch["positions"])
    token_logprobs = -F.cross_entropy(predicting.float(), batch["targets"], reduction="none")
    sums = torch.zeros(len(batch["input_ids"]), dtype=torch.float32, device=token_logprobs.device)
    return sums.index_add(0, batch["rows"], token_logprobs)


@torch.no_grad()
def score_responses(
    model: Any,
    responses: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int,
    pad_id: int,
) -> Iterator[tuple[list[int], list[float]]]:
    """The log-probs of many (prompt ids, response ids) couples, batch by batch.

    Longest first, so that a batch that doesn't fit shows itself at once and padding stays small.

    Yields:
        The places of a batch's responses in the input, and their log-probs.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(responses)), key=lambda i: -len(responses[i][0]) - len(responses[i][1]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch: Any = collate_responses([responses[i] for i in places], pad_id)
        on_device: Any = {name: tensor.to(device) for name, tensor in batch.items()}
        yield places, response_logprobs(model, on_device).tolist()

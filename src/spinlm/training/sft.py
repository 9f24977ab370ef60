"""The supervised stage: transformers' Trainer on the real responses alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import Trainer

from spinlm.data.pairs import collate_responses
from spinlm.data.prepare import TokenizedExample
from spinlm.training.checkpoints import Arguments

IGNORED = -100
"""The label that transformers' losses leave out."""


def sft_trainer(model: Any, args: Arguments, examples: Sequence[TokenizedExample], pad_id: int) -> Trainer:
    """A Trainer on the examples' response tokens; prompts are read, not learned."""

    collate = partial(collate_supervised, pad_id=pad_id)
    return Trainer(model=model, args=args, data_collator=collate, train_dataset=list(examples))


def collate_supervised(batch: Sequence[TokenizedExample], pad_id: int) -> dict[str, torch.Tensor]:
    """Token ids, mask and labels, [N, T]; prompt and padding are labelled IGNORED."""
    laid_out = collate_responses([(example.prompt_ids, example.real_ids) for example in batch], pad_id)
    labels = torch.full_like(laid_out["input_ids"], IGNORED)
    labels.view(-1)[laid_out["positions"] + 1] = laid_out["targets"]
    return {
        "input_ids": laid_out["input_ids"],
        "attention_mask": laid_out["attention_mask"],
        "labels": labels,
    }

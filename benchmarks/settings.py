"""How large everything is that the benchmarks measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import yaml

from spinlm.errors import UserError


@dataclass(frozen=True)
class Sizes:
    """Sizes of all measures; `python -m benchmarks --size name=value` changes single ones.

    Attributes:
        rounds: How often each other side is timed between two timings of ours.
        short_pairs: Pairs in an epoch of the short set.
        balanced_pairs: Of the balanced set.
        long_pairs: Of the set with long prompts.
        gpt_neo_pairs: Of the short set, for GPT-Neo.
        optimiser_batch: Pairs in a step of the optimiser, on every side (TRL's default batch).
        warm_up_pairs: TRL trains on these before it is timed.
        parity_pairs: Pairs in the check that both trainers compute the same.
        prompts: Prompts answered in a turn of generation.
        max_new_tokens: A response is cut there.
        slots: Responses that spinlm (and vLLM) decode together.
        greedy_prompts: Prompts in the check that greedy tokens are the same.
        paged_prompts: Prompts that transformers' own continuous batching answers.
        search_prompts: Prompts in the search for transformers' best batch.
        search_tokens: Cap of responses in that search.
        iteration_pairs: Examples of the whole iteration.
        iteration_epochs: Its epochs of training.
        iteration_new_tokens: Its cap of responses.
        iteration_rounds: As `rounds`, for the whole iteration.
        growth_pairs: Pairs of the short set that growth starts from.
        peak_size: Rows and columns of the matrix product whose rate is the peak.
    """

    rounds: int = 2
    short_pairs: int = 16
    balanced_pairs: int = 8
    long_pairs: int = 8
    gpt_neo_pairs: int = 8
    optimiser_batch: int = 8
    warm_up_pairs: int = 2
    parity_pairs: int = 2
    prompts: int = 256
    max_new_tokens: int = 128
    slots: int = 64
    greedy_prompts: int = 8
    paged_prompts: int = 32
    search_prompts: int = 128
    search_tokens: int = 32
    iteration_pairs: int = 128
    iteration_epochs: int = 2
    iteration_new_tokens: int = 32
    iteration_rounds: int = 1
    growth_pairs: int = 16
    peak_size: int = 3072

    def pairs(self, name: str) -> int:
        """Pairs in an epoch of a set."""
        return int(getattr(self, f"{name}_pairs"))


QUICK = Sizes(
    rounds=1,
    short_pairs=8,
    prompts=32,
    max_new_tokens=32,
    slots=16,
    greedy_prompts=4,
    search_prompts=32,
    search_tokens=8,
    iteration_pairs=8,
    iteration_epochs=1,
    iteration_new_tokens=16,
    growth_pairs=8,
)
"""Does all that can be done in some minutes; its ratios are rough."""


def with_sizes(sizes: Sizes, changes: Sequence[str]) -> Sizes:
    """Sizes with `name=value` changes.

    Raises:
        UserError: There is no such size, or the value isn't a whole number above 0.
    """
    values = parse(changes)
    for name, value in values.items():
        if name not in {field.name for field in fields(Sizes)}:
            raise UserError(
                f"--size {name}: no such size; there are: {', '.join(field.name for field in fields(Sizes))}"
            )
        if type(value) is not int or value < 1:
            raise UserError(f"--size {name}={value}: give a whole number above 0")
    return replace(sizes, **values)


def parse(changes: Sequence[str]) -> dict[str, Any]:
    """`name=value` with the value in YAML.

    Raises:
        UserError: One isn't of that form.
    """
    values = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or not name:
            raise UserError(f"{change!r}: write name=value")
        values[name] = yaml.safe_load(text)
    return values

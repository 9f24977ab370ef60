"""Examples become token ids, are checked against the limits, and are split into train and held-out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from spinlm.config import DataSection
from spinlm.data.examples import Dropped, Example
from spinlm.data.render import Renderer, RenderError
from spinlm.errors import UserError

MOST_TIMES_TOO_LONG = 8
"""A text with this many times the characters that fit, were all of its tokens the longest that there are, is dropped
unread, also where `data.overlong` would have it truncated."""


@dataclass(frozen=True)
class TokenizedExample:
    """An example and its tokens.

    Attributes:
        id: The example's.
        prompt_ids: As every stage sees them.
        real_ids: The real response, its end-of-turn token included.
        prompt: The last user message, for people.
        real: The real response's text.
        verifier: The example's.
    """

    id: str
    prompt_ids: list[int]
    real_ids: list[int]
    prompt: str
    real: str
    verifier: dict[str, Any] | None = None


@dataclass(frozen=True)
class Split:
    """The dataset as a run uses it."""

    train: list[TokenizedExample]
    held_out: list[TokenizedExample]
    dropped: list[Dropped]

    def drop_counts(self) -> dict[str, int]:
        return dict(Counter(dropped.reason for dropped in self.dropped).most_common())


def prepare(
    examples: Iterable[Example], dropped: Sequence[Dropped], renderer: Renderer, section: DataSection, seed: int
) -> Split:
    """Tokenise, drop or truncate what is over-long, split off the held-out part.

    Raises:
        UserError: No example is left, or none for training.
    """
    tokenized: list[TokenizedExample] = []
    openings: list[str] = []
    all_dropped = list(dropped)
    for example in examples:
        outcome = _tokenize(example, renderer, section)
        if isinstance(outcome, Dropped):
            all_dropped.append(outcome)
        else:
            tokenized.append(outcome)
            openings.append(_opening(example))
    split = _split(tokenized, openings, all_dropped, section.held_out, seed)
    if not tokenized:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in split.drop_counts().items())
        raise UserError(f"{section.source}: no example is left: {reasons or 'it has no rows'}")
    if not split.train:
        raise UserError(
            f"{section.source}: data.held_out={section.held_out} leaves none of the {len(tokenized)} examples "
            "to train on"
        )
    return split


def _tokenize(example: Example, renderer: Renderer, section: DataSection) -> TokenizedExample | Dropped:
    if reason := _far_too_long(example, renderer, section):
        return Dropped(example.id, reason)
    try:
        prompt_ids = renderer.prompt_ids(example.messages)
        real_ids = renderer.response_ids(example.messages, example.response)
    except RenderError as error:
        return Dropped(example.id, str(error))
    if not prompt_ids:
        return Dropped(example.id, "empty prompt")
    prompt_limit = min(section.max_prompt_tokens, section.max_length - len(real_ids))
    if prompt_limit < 1:
        return Dropped(example.id, "response over data.max_length")
    if len(prompt_ids) > prompt_limit:
        if section.overlong == "drop":
            over = "max_prompt_tokens" if len(prompt_ids) > section.max_prompt_tokens else "max_length"
            return Dropped(example.id, f"prompt over data.{over}")
        prompt_ids = _without_its_left(prompt_ids, prompt_limit, renderer.bos_id)
    return TokenizedExample(
        id=example.id,
        prompt_ids=prompt_ids,
        real_ids=real_ids,
        prompt=example.messages[-1]["content"],
        real=example.response,
        verifier=example.verifier,
    )


def _far_too_long(example: Example, renderer: Renderer, section: DataSection) -> str:
    """Why a text of many megabytes needn't be tokenised to know that it doesn't fit; empty where it may."""
    most = MOST_TIMES_TOO_LONG * renderer.longest_token
    if len(example.response) > most * section.max_length:
        return "response over data.max_length"
    if sum(len(message["content"]) for message in example.messages) > most * section.max_prompt_tokens:
        return "prompt over data.max_prompt_tokens"
    return ""


def _without_its_left(prompt_ids: list[int], limit: int, bos_id: int | None) -> list[int]:
    """The prompt's last tokens, after its beginning-of-sequence token if it has one: models rely on that."""
    if prompt_ids[0] == bos_id and limit > 1:
        return [prompt_ids[0], *prompt_ids[-(limit - 1) :]]
    return prompt_ids[-limit:]


def _opening(example: Example) -> str:
    """What a conversation begins with: turns of one conversation, and copies of it, stay on one side."""
    return next(message["content"] for message in example.messages if message["role"] == "user")


def _split(
    tokenized: list[TokenizedExample],
    openings: list[str],
    dropped: list[Dropped],
    held_out: int | float,
    seed: int,
) -> Split:
    wanted = held_out if isinstance(held_out, int) else round(held_out * len(tokenized))
    groups = Counter(openings)
    shuffled = sorted(groups)
    random.Random(seed).shuffle(shuffled)
    chosen: set[str] = set()
    count = 0
    for opening in shuffled:
        if count + groups[opening] <= wanted:
            chosen.add(opening)
            count += groups[opening]
    return Split(
        train=[e for e, opening in zip(tokenized, openings, strict=True) if opening not in chosen],
        held_out=[e for e, opening in zip(tokenized, openings, strict=True) if opening in chosen],
        dropped=dropped,
    )

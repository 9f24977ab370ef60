"""How prompts and their responses are laid out for a forward pass, and how many go into one.

- `shared`: all in one row; a prompt once, then its responses side by side, each of which sees the prompt and itself.
  What all prompts of the row begin with (a system prompt, a template's header) is there once for all of them.
- `packed`: all in one row; the prompt again before each response, each couple by itself.
- `plain`: a row for each couple, padded on the right: what every causal language model understands.

The last token of a response is predicted but never read: it is in no row. One row of all is filled up to a
multiple of `ROWS_TOGETHER` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal, TypedDict, TypeVar

import torch
from torch import Tensor

from spinlm.data.pairs import Group, Pair, group_pairs
from spinlm.players.linear import rows_to_spare

Layout = Literal["shared", "packed", "plain"]
LAYOUTS: tuple[Layout, ...] = ("shared", "packed", "plain")
"""The fastest first."""

TOKENS_ON_GPU, TRAINING_TOKENS_ON_CPU, SCORING_TOKENS_ON_CPU = 2048, 384, 1024
"""In a pass, where no other number is asked for. In training on a CPU more are no faster: what they keep leaves its
caches. Scoring keeps nothing."""

LEAST_IN_COMMON = 8
"""Tokens that prompts have to begin with, all of them, for running these once to be worth it."""

Item = TypeVar("Item")

Segment = tuple[int, int]
"""A stretch of a row: its length in tokens, and the number of the segment that it continues, or -1.

Its tokens see those before them in it, and all of the segment that it continues and of what that one continues.
"""


class ResponseBatch(TypedDict):
    """N responses to prompts, R response tokens in all, in rows of T tokens.

    Attributes:
        input_ids: [rows, T].
        attention_mask: [rows, T], 1 for tokens and 0 for padding; None where there are segments.
        position_ids: [rows, T]; None where they count from 0 in each row.
        segments: Those that the one row is made of; none in the plain layout.
        predicting: [R], where in the flattened rows the model predicts each response token.
        targets: [R], the response tokens.
        owners: [R], the number of the response that each of them belongs to.
        lengths: [N], the responses' lengths in tokens.
        read: [], the tokens in the rows that aren't padding.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    segments: tuple[Segment, ...]
    predicting: Tensor
    targets: Tensor
    owners: Tensor
    lengths: Tensor
    read: Tensor


class PairBatch(ResponseBatch):
    """B pairs, whose responses are N at most: one that several pairs share is there once.

    Attributes:
        real: [B], the number of each pair's real response.
        synthetic: [B], the number of its synthetic response.
        initial: [B], the number of the starting player's response, or of the synthetic one where it has none.
        opponent_real: [B], the opponent's log-probs of the real responses.
        opponent_synthetic: [B], those of the synthetic responses.
        reference_real: [B], what the main player's log-probs of the real responses are measured against.
        reference_synthetic: [B], the same of the synthetic responses.
        truncated: [B], 1 where the synthetic response was cut at the token cap.
    """

    real: Tensor
    synthetic: Tensor
    initial: Tensor
    opponent_real: Tensor
    opponent_synthetic: Tensor
    reference_real: Tensor
    reference_synthetic: Tensor
    truncated: Tensor


def lay_out(groups: Sequence[Group], layout: Layout, pad_id: int) -> ResponseBatch:
    """A batch of all the groups' responses, numbered in their order."""
    if layout != "shared":
        groups = [Group(one.prompt_ids, [response]) for one in groups for response in one.responses]
    responses = [response for one in groups for response in one.responses]
    lengths = torch.tensor([len(response) for response in responses])
    rows = _padded_rows(groups, pad_id) if layout == "plain" else _one_row(groups, pad_id, layout)
    return {
        **rows,  # type: ignore[typeddict-item]
        "targets": torch.tensor([token for response in responses for token in response], dtype=torch.long),
        "owners": torch.repeat_interleave(torch.arange(len(responses)), lengths),
        "lengths": lengths,
        "read": torch.tensor(_read_in(groups, layout)),
    }


def lay_out_pairs(pairs: Sequence[Pair], layout: Layout, pad_id: int) -> PairBatch:
    """A batch of pairs."""
    grouped = group_pairs(pairs)
    reference_real, reference_synthetic = zip(*(pair.reference_logprobs for pair in pairs), strict=True)
    return {
        **lay_out(grouped.groups, layout, pad_id),
        "real": torch.tensor(grouped.real),
        "synthetic": torch.tensor(grouped.synthetic),
        "initial": torch.tensor(grouped.initial),
        "opponent_real": torch.tensor([pair.opponent_real_logprob for pair in pairs]),
        "opponent_synthetic": torch.tensor([pair.opponent_synthetic_logprob for pair in pairs]),
        "reference_real": torch.tensor(reference_real),
        "reference_synthetic": torch.tensor(reference_synthetic),
        "truncated": torch.tensor([float(pair.synthetic_truncated) for pair in pairs]),
    }


def _one_row(groups: Sequence[Group], pad_id: int, layout: Layout) -> dict[str, object]:
    """Groups one after the other; the first token of each response is predicted from the prompt's last."""
    ids: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    segments: list[Segment] = []
    opening = opening_of(groups, layout)
    if opening:
        ids += groups[0].prompt_ids[:opening]
        positions += range(opening)
        segments.append((opening, -1))
    for prompt, responses in ((one.prompt_ids, one.responses) for one in groups):
        own = prompt[opening:]
        prompt_number, last_of_prompt = len(segments), len(ids) + len(own) - 1
        ids += own
        positions += range(opening, len(prompt))
        segments.append((len(own), 0 if opening else -1))
        for response in responses:
            read = response[:-1]
            if response:
                predicting += [last_of_prompt, *range(len(ids), len(ids) + len(read))]
            if read:
                segments.append((len(read), prompt_number))
            ids += read
            positions += range(len(prompt), len(prompt) + len(read))
    if spare := rows_to_spare(len(ids)):  # in the last segment, where none sees them
        ids += [pad_id] * spare
        positions += [0] * spare
        length, before = segments[-1]
        segments[-1] = (length + spare, before)
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": None,
        "position_ids": torch.tensor([positions]),
        "segments": tuple(segments),
        "predicting": torch.tensor(predicting, dtype=torch.long),
    }


def common_start(prompts: Collection[list[int]] | Collection[tuple[int, ...]]) -> int:
    """How many tokens all the prompts begin with, if it is worth it; each keeps one of its own, to predict from."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # all prompts lie between them
    most = min(map(len, prompts)) - 1
    common = next((place for place in range(most) if first[place] != last[place]), most)
    return common if common >= LEAST_IN_COMMON else 0


def opening_of(groups: Sequence[Group], layout: Layout) -> int:
    """The tokens of a first segment that all the prompts share."""
    return common_start([list(one.prompt_ids) for one in groups]) if layout == "shared" else 0


def _padded_rows(groups: Sequence[Group], pad_id: int) -> dict[str, object]:
    couples = [(one.prompt_ids, one.responses[0]) for one in groups]
    width = max(_read(prompt, response) for prompt, response in couples)
    input_ids = torch.full((len(couples), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(couples), width), dtype=torch.long)
    predicting: list[int] = []
    for row, (prompt, response) in enumerate(couples):
        length = _read(prompt, response)
        input_ids[row, :length] = torch.tensor([*prompt, *response][:length])
        attention_mask[row, :length] = 1
        first = row * width + len(prompt) - 1
        predicting += range(first, first + len(response))
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": None,
        "segments": (),
        "predicting": torch.tensor(predicting, dtype=torch.long),
    }


def _read(prompt: Sequence[int], *responses: Sequence[int]) -> int:
    """The tokens of a prompt and of responses to it that a model has to read."""
    return len(prompt) + sum(max(0, len(response) - 1) for response in responses)


def _read_in(groups: Sequence[Group], layout: Layout) -> int:
    """Those of all groups, of a shared opening once."""
    again = (len(groups) - 1) * opening_of(groups, layout)
    return sum(_read(one.prompt_ids, *one.responses) for one in groups) - again


def count_tokens(groups: Sequence[Group], layout: Layout) -> int:
    """The tokens of a forward pass over these groups, padding included."""
    if layout == "shared":
        return _filled(_read_in(groups, layout)) if groups else 0
    couples = [_read(one.prompt_ids, response) for one in groups for response in one.responses]
    return _filled(sum(couples)) if layout == "packed" else len(couples) * max(couples, default=0)


def _filled(tokens: int) -> int:
    return tokens + rows_to_spare(tokens)


def tokens_per_pass(asked: int | None, on_gpu: bool, training: bool) -> int:
    """The number that was asked for, or what suits the device and the passes."""
    on_cpu = TRAINING_TOKENS_ON_CPU if training else SCORING_TOKENS_ON_CPU
    return asked or (TOKENS_ON_GPU if on_gpu else on_cpu)


def into_passes(
    items: Sequence[Item], tokens: Callable[[Sequence[Item]], int], tokens_per_pass: int
) -> list[list[Item]]:
    """Items of like length together, as many as fit into each pass; one too long for any gets its own.

    The longest come first, so that a pass that doesn't fit in memory shows itself at once.
    """
    passes: list[list[Item]] = []
    for item in sorted(items, key=lambda item: -tokens([item])):
        if passes and tokens([*passes[-1], item]) <= tokens_per_pass:
            passes[-1].append(item)
        else:
            passes.append([item])
    return passes

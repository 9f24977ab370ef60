"""Prompts and responses laid out for a forward pass, worked out by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from spinlm.data.pairs import Group, Pair
from spinlm.players import layouts
from spinlm.players.layouts import (
    LAYOUTS,
    Layout,
    common_start,
    count_tokens,
    into_passes,
    lay_out,
    lay_out_pairs,
    tokens_per_pass,
)

GROUPS = [Group([1, 2], [[3], [4, 5, 6]]), Group([7], [[8, 9]])]

PAIRS = [
    Pair([1, 2], [3], [4, 5, 6], -1.5, -2.5, synthetic_truncated=True),
    Pair([7], [8, 9], [9, 8], -0.25, -4.0),
    Pair([1, 2], [3], [6], -1.5, -0.5),
]


def test_shared_is_a_prompt_once_and_its_responses_side_by_side() -> None:
    batch = lay_out(GROUPS, "shared", pad_id=99)
    assert batch["input_ids"].tolist() == [[1, 2, 4, 5, 7, 8]]
    assert batch["position_ids"] is not None
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch["attention_mask"] is None
    assert batch["segments"] == ((2, -1), (2, 0), (1, -1), (1, 2))
    # 3 and 4 are both predicted where 2 is, at place 1; 5 and 6 where 4 and 5 are; 8 where 7 is and 9 where 8 is.
    # 3, 6 and 9 end their responses: nothing is predicted from them.
    assert batch["predicting"].tolist() == [1, 1, 2, 3, 4, 5]


def test_a_row_of_more_than_eight_tokens_is_filled_up_to_a_multiple_of_eight() -> None:
    groups = [Group([1, 2, 3, 4], [[5, 6, 7], [8]]), Group([9, 10, 11], [[12, 13]])]
    batch = lay_out(groups, "shared", pad_id=99)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 99, 99, 99, 99, 99, 99]]
    assert batch["position_ids"] is not None
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 0, 0, 0, 0, 0]]
    assert batch["segments"] == ((4, -1), (2, 0), (3, -1), (7, 2)), "behind the last segment, where none sees them"
    assert batch["predicting"].tolist() == [3, 4, 5, 3, 8, 9]
    assert (batch["read"].item(), count_tokens(groups, "shared")) == (10, 16)


def test_the_fill_may_follow_a_prompt() -> None:
    batch = lay_out([Group([1] * 9, [[2]])], "packed", pad_id=99)
    assert batch["segments"] == ((16, -1),)
    assert batch["predicting"].tolist() == [8]


def test_what_all_prompts_begin_with_is_there_once() -> None:
    opening = [11, 12, 13, 14, 15, 16, 17, 18]
    groups = [Group([*opening, 1, 2], [[3, 4], [5]]), Group([*opening, 1], [[6, 7]]), Group([*opening, 8], [[9]])]
    batch = lay_out(groups, "shared", pad_id=99)
    assert batch["input_ids"].tolist() == [[*opening, 1, 2, 3, 1, 6, 8, 99, 99]]
    assert batch["position_ids"] is not None
    assert batch["position_ids"].tolist() == [[*range(8), 8, 9, 10, 8, 9, 8, 0, 0]]
    assert batch["segments"] == ((8, -1), (2, 0), (1, 1), (1, 0), (1, 3), (3, 0))
    assert batch["predicting"].tolist() == [9, 10, 9, 11, 12, 13]
    assert (batch["read"].item(), count_tokens(groups, "shared")) == (14, 16)
    packed = [length for length, before in lay_out(groups, "packed", 99)["segments"] if before == -1]
    assert packed[:3] == [10, 10, 9], "where each row is by itself, each has its own"


def test_each_prompt_keeps_a_token_of_its_own_to_predict_from() -> None:
    groups = [Group([1] * 10, [[3, 4]]), Group([1] * 12, [[5]])]
    batch = lay_out(groups, "shared", pad_id=99)
    assert batch["segments"] == ((9, -1), (1, 0), (1, 1), (5, 0)), "two of the last five fill the row"
    assert batch["predicting"].tolist() == [9, 10, 13]


@pytest.mark.parametrize("groups", [[Group([1] * 20, [[2]])], [Group([1] * 8, [[2]]), Group([1] * 20, [[2]])]])
def test_one_prompt_or_a_short_opening_is_laid_out_as_it_is(groups: list[Group]) -> None:
    segments = lay_out(groups, "shared", pad_id=99)["segments"]
    assert [before for _, before in segments] == [-1] * len(groups)


@pytest.mark.parametrize(
    ("prompts", "tokens"),
    [
        ([(1, 2, 3, 4), (1, 2, 3, 5, 6)], 3),
        ([(1, 2, 3), (1, 2, 3, 4)], 2),  # each keeps a token of its own
        ([(1, 2, 3, 4)], 0),  # one prompt is run once as it is
        ([(1, 2, 9), (1, 3, 9)], 0),  # too short
        ([(1, 2, 3), (1, 2, 3, 4), (2, 2, 3)], 0),
        ([(7,), (7, 8, 9)], 0),
        ([], 0),
    ],
)
def test_what_prompts_begin_with(prompts: list[tuple[int, ...]], tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "LEAST_IN_COMMON", 2)
    assert common_start(prompts) == tokens


def test_packed_is_the_prompt_again_before_each_response() -> None:
    batch = lay_out(GROUPS, "packed", pad_id=99)
    assert batch["input_ids"].tolist() == [[1, 2, 1, 2, 4, 5, 7, 8]]
    assert batch["position_ids"] is not None
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3, 0, 1]]
    assert batch["attention_mask"] is None
    assert batch["segments"] == ((2, -1), (2, -1), (2, 1), (1, -1), (1, 3))
    assert batch["predicting"].tolist() == [1, 3, 4, 5, 6, 7]


def test_plain_is_a_padded_row_for_each_response() -> None:
    batch = lay_out(GROUPS, "plain", pad_id=99)
    assert batch["input_ids"].tolist() == [[1, 2, 99, 99], [1, 2, 4, 5], [7, 8, 99, 99]]
    assert batch["attention_mask"] is not None
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["position_ids"] is None
    assert batch["segments"] == ()
    # 3 is predicted at place 1; the second row begins at place 4, the third at 8.
    assert batch["predicting"].tolist() == [1, 5, 6, 7, 8, 9]


def test_a_tokens_own_value_may_be_the_padding() -> None:
    batch = lay_out([Group([0], [[0, 0]]), Group([0, 0, 0], [[0]])], "plain", pad_id=0)
    assert batch["attention_mask"] is not None
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["predicting"].tolist() == [0, 1, 5]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_targets_are_the_responses_tokens_in_their_order_in_every_layout(layout: Layout) -> None:
    batch = lay_out(GROUPS, layout, pad_id=0)
    assert batch["targets"].tolist() == [3, 4, 5, 6, 8, 9]
    assert batch["owners"].tolist() == [0, 1, 1, 1, 2, 2]
    assert batch["lengths"].tolist() == [1, 3, 2]
    flat = batch["input_ids"].flatten()
    assert flat[batch["predicting"]].tolist() == [2, 2, 4, 5, 7, 8], "each from the token before it"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_with_the_same_prompt_and_real_response_share_them(layout: Layout) -> None:
    batch = lay_out_pairs(PAIRS, layout, pad_id=0)
    # Responses by prompt: 0 is [3], 1 is [4, 5, 6], 2 is [6]; then 3 is [8, 9] and 4 is [9, 8].
    assert batch["targets"].tolist() == [3, 4, 5, 6, 6, 8, 9, 9, 8]
    assert batch["lengths"].tolist() == [1, 3, 1, 2, 2]
    assert batch["real"].tolist() == [0, 3, 0]
    assert batch["synthetic"].tolist() == [1, 4, 2]
    assert batch["opponent_real"].tolist() == [-1.5, -0.25, -1.5]
    assert batch["opponent_synthetic"].tolist() == [-2.5, -4.0, -0.5]
    assert batch["opponent_real"].dtype == batch["opponent_synthetic"].dtype == torch.float32
    assert batch["truncated"].tolist() == [1.0, 0.0, 0.0]


def test_a_shared_row_of_pairs() -> None:
    batch = lay_out_pairs(PAIRS, "shared", pad_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 4, 5, 7, 8, 9]]
    assert batch["position_ids"] is not None
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 1]]
    assert batch["segments"] == ((2, -1), (2, 0), (1, -1), (1, 2), (1, 2))
    assert batch["predicting"].tolist() == [1, 1, 2, 3, 1, 4, 5, 4, 6]


@pytest.mark.parametrize(("layout", "tokens"), [("shared", 6), ("packed", 8), ("plain", 12)])
def test_tokens_of_a_pass(layout: Layout, tokens: int) -> None:
    assert count_tokens(GROUPS, layout) == tokens
    assert count_tokens(GROUPS[1:], layout) == 2
    assert count_tokens([], layout) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_many_tokens_are_counted_as_are_laid_out(layout: Layout) -> None:
    generator = random.Random(0)
    for _ in range(20):
        groups = [
            Group(
                [1] * generator.randint(1, 9), [[2] * generator.randint(1, 9) for _ in range(generator.randint(1, 3))]
            )
            for _ in range(generator.randint(1, 5))
        ]
        batch = lay_out(groups, layout, pad_id=0)
        assert count_tokens(groups, layout) == batch["input_ids"].numel()
        if layout != "plain":
            assert sum(length for length, _ in batch["segments"]) == batch["input_ids"].numel()


@pytest.mark.parametrize(
    ("budget", "passes"),
    [
        (10, [[12], [9], [5, 4], [3, 1]]),  # 12 has more than a pass, and gets its own; 5 + 4 + 3 would be 12
        (13, [[12], [9], [5, 4, 3, 1]]),  # 12 + 9 and 9 + 5 would be more; 5 + 4 + 3 + 1 is just 13
        (1, [[12], [9], [5], [4], [3], [1]]),
        (1000, [[12, 9, 5, 4, 3, 1]]),
    ],
)
def test_items_of_like_length_go_together_the_longest_first(budget: int, passes: list[list[int]]) -> None:
    assert into_passes([5, 3, 9, 1, 4, 12], sum, budget) == passes
    assert into_passes([], sum, budget) == []


def test_tokens_of_a_pass_by_device_and_use() -> None:
    found = {(gpu, training): tokens_per_pass(None, gpu, training) for gpu in (0, 1) for training in (0, 1)}
    assert found == {(0, 0): 1024, (0, 1): 384, (1, 0): 2048, (1, 1): 2048}
    assert {tokens_per_pass(100, gpu, training) for gpu, training in found} == {100}


def test_padding_counts() -> None:
    def padded(lengths: Sequence[int]) -> int:
        return len(lengths) * max(lengths)

    assert into_passes([2, 8, 3, 7], padded, 16) == [[8, 7], [3, 2]]  # 3 more would make 24
    assert into_passes([2, 8, 3, 7], padded, 24) == [[8, 7, 3], [2]]


def test_every_item_is_in_one_pass_and_the_passes_fit() -> None:
    generator = random.Random(1)
    for _ in range(200):
        items = [(generator.randint(1, 30), number) for number in range(generator.randint(0, 25))]
        budget = generator.randint(1, 60)
        passes = into_passes(items, lambda items: sum(length for length, _ in items), budget)
        assert sorted(item for part in passes for item in part) == sorted(items)
        assert all(sum(length for length, _ in part) <= budget or len(part) == 1 for part in passes)
        lengths = [length for part in passes for length, _ in part]
        assert lengths == sorted(lengths, reverse=True)

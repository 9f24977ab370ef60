"""Pairs laid out as batches, worked out by hand."""

import torch

from spinlm.data.pairs import Pair, collate_pairs, collate_responses, drop_identical

SHORT = Pair([1, 2], [3], [4, 5, 6], -1.5, -2.5, synthetic_truncated=True)
LONG = Pair([7], [8, 9], [9, 8], -0.25, -4.0)


def test_responses_beside_their_prompts() -> None:
    batch = collate_responses([([1, 2], [3]), ([4], [5, 6, 7]), ([8, 9, 10], [])], pad_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [4, 5, 6, 7], [8, 9, 10, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    # 3 is predicted at place 1, where 2 is; 5, 6 and 7 where 4, 5 and 6 are, in the second row, which begins at 4.
    assert batch["positions"].tolist() == [1, 4, 5, 6]
    assert batch["targets"].tolist() == [3, 5, 6, 7]
    assert batch["rows"].tolist() == [0, 1, 1, 1]


def test_a_tokens_own_value_may_be_the_padding() -> None:
    batch = collate_responses([([0], [0, 0]), ([0, 0, 0], [0])], pad_id=0)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["positions"].tolist() == [0, 1, 6]


def test_pairs_are_real_responses_and_then_synthetic_ones() -> None:
    batch = collate_pairs([SHORT, LONG], pad_id=99)
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 99, 99],
        [7, 8, 9, 99, 99],
        [1, 2, 4, 5, 6],
        [7, 9, 8, 99, 99],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["positions"].tolist() == [1, 5, 6, 11, 12, 13, 15, 16]
    assert batch["targets"].tolist() == [3, 8, 9, 4, 5, 6, 9, 8]
    assert batch["rows"].tolist() == [0, 1, 1, 2, 2, 2, 3, 3]
    assert batch["opponent_logprobs"].tolist() == [-1.5, -0.25, -2.5, -4.0]
    assert batch["opponent_logprobs"].dtype == torch.float32
    assert batch["response_lengths"].tolist() == [1, 2, 3, 2]
    assert batch["truncated"].tolist() == [1.0, 0.0]


def test_each_target_is_predicted_from_the_token_before_it() -> None:
    batch = collate_pairs([SHORT, LONG], pad_id=99)
    flat = batch["input_ids"].flatten()
    assert flat[batch["positions"] + 1].tolist() == batch["targets"].tolist()
    assert flat[batch["positions"]].tolist() == [2, 7, 8, 2, 4, 5, 7, 9]


def test_identical_responses_are_dropped_and_counted() -> None:
    same, cut = Pair([1], [2, 3], [2, 3], 0.0, 0.0), Pair([1], [2, 3], [2], 0.0, 0.0)
    assert drop_identical([SHORT, same, cut, LONG, same]) == ([SHORT, cut, LONG], 2)
    assert drop_identical([same]) == ([], 1)
    assert drop_identical([]) == ([], 0)

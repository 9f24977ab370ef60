"""The number of rows, from numbers worked out by hand."""

from __future__ import annotations

import torch

import tiny
from spinlm.generation.continuous import columns_needed, row_bytes
from spinlm.generation.memory import MOST_ROWS, MOST_ROWS_ON_GPU, rows_that_fit
from spinlm.hardware import total_memory


def test_rows_share_half_of_what_is_left() -> None:
    assert rows_that_fit(total=10_000, held=6_000, row_bytes=400, on_gpu=False) == 5
    assert rows_that_fit(total=10_000, held=6_000, row_bytes=100, on_gpu=False) == 16, "20 are filled up to 24"
    assert rows_that_fit(total=10_000, held=6_000, row_bytes=3_000, on_gpu=False) == 1
    assert rows_that_fit(total=10_000, held=6_000, row_bytes=1, on_gpu=False) == MOST_ROWS
    assert rows_that_fit(total=10_000, held=6_000, row_bytes=1, on_gpu=True) == MOST_ROWS_ON_GPU
    assert rows_that_fit(total=10_000, held=16_000, row_bytes=1, on_gpu=True) == 1


def test_a_row_takes_its_keys_and_values_and_its_logits() -> None:
    """Two layers, keys and values, one head of 8; 4 copies of 260 logits; four bytes each."""
    columns = columns_needed(longest_prompt=20, max_new_tokens=10)
    assert row_bytes(tiny.build_model("llama"), columns) == columns * 2 * 2 * 8 * 4 + 4 * 260 * 4


def test_the_whole_memory_counts_and_not_what_is_free() -> None:
    before = total_memory(torch.device("cpu"))
    ballast = torch.ones(50_000_000)
    assert total_memory(torch.device("cpu")) == before > ballast.nbytes

"""The number of rows, from numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

import tiny
from spinlm.generation import memory
from spinlm.generation.continuous import columns_needed, row_bytes
from spinlm.generation.memory import rows_that_fit, total_memory


def test_rows_share_half_of_what_the_weights_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(100, 10, bias=False)  # 4,000 bytes
    monkeypatch.setattr(memory, "total_memory", lambda device: 10_000)
    assert rows_that_fit(model, row_bytes=100, copied_bytes=2_000) == 20
    assert rows_that_fit(model, row_bytes=3_000, copied_bytes=2_000) == 1
    assert rows_that_fit(model, row_bytes=1, copied_bytes=0) == memory.MOST_ROWS["cpu"]


def test_a_row_takes_its_keys_and_values_and_its_logits() -> None:
    """Two layers, keys and values, one head of 8; 4 copies of 260 logits; four bytes each."""
    columns = columns_needed(longest_prompt=20, max_new_tokens=10)
    assert row_bytes(tiny.build_model("llama"), columns) == columns * 2 * 2 * 8 * 4 + 4 * 260 * 4


def test_the_whole_memory_counts_and_not_what_is_free() -> None:
    before = total_memory(torch.device("cpu"))
    ballast = torch.ones(50_000_000)
    assert total_memory(torch.device("cpu")) == before > ballast.nbytes

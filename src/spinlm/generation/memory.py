"""How many responses fit into a machine's memory, counted by what doesn't change while it runs."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

MOST_ROWS = {"cpu": 128}
"""Beyond this a CPU gains nothing."""
MOST_ROWS_ELSEWHERE = 512

SHARE = 0.5
"""Of the memory, for keys, values and logits: the rest is for activations, and whoever else is there."""


def rows_that_fit(model: nn.Module, row_bytes: int, copied_bytes: int) -> int:
    """How many responses to decode together.

    By the memory that the machine, its control group or its GPU has in all, and not by what is free at the
    moment: a shard made again has to be decoded in the same batches.

    Args:
        model: The model.
        row_bytes: What one response takes.
        copied_bytes: What copies of the weights take.
    """
    device = next(model.parameters()).device
    weights = sum(parameter.nbytes for parameter in model.parameters())
    room = SHARE * (total_memory(device) - weights - copied_bytes)
    return max(1, min(MOST_ROWS.get(device.type, MOST_ROWS_ELSEWHERE), int(room / row_bytes)))


def total_memory(device: torch.device) -> int:
    """Bytes of the GPU, or else of the machine or the control group that this process is confined to."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_cgroup_limits()])


def _cgroup_limits() -> list[int]:
    texts = [
        path.read_text().strip()
        for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
        if path.exists()
    ]
    return [int(text) for text in texts if text.isdecimal()]

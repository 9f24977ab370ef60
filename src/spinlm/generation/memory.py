"""How many responses are decoded together, counted by what doesn't change while a run goes on."""

from __future__ import annotations

from spinlm.players.linear import ROWS_TOGETHER

MOST_ROWS, MOST_ROWS_ON_GPU = 128, 512
"""Beyond this nothing is gained."""

SHARE = 0.5
"""Of the memory, for keys, values and logits: the rest is for activations, and whoever else is there."""


def rows_that_fit(total: int, held: int, row_bytes: int, on_gpu: bool) -> int:
    """By the memory that there is in all, not by what is free: a shard made again is decoded in the same batches.

    Args:
        total: Bytes of the machine, its control group or its GPU.
        held: By the weights and their copies.
        row_bytes: What one response takes.
        on_gpu: Or on a CPU.
    """
    most = MOST_ROWS_ON_GPU if on_gpu else MOST_ROWS
    fitting = max(1, min(most, int(SHARE * (total - held) / row_bytes)))
    return fitting - fitting % ROWS_TOGETHER if fitting > ROWS_TOGETHER else fitting

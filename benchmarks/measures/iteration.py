"""One whole iteration."""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.record import Record
from benchmarks.sides.iteration import OfficialIteration, SpinlmIteration

GOAL = 5.0


def whole(bench: Bench, record: Record) -> None:
    """Against the official pipeline's shape; both begin with a dataset's file and end with an adapter's."""
    ours, official = SpinlmIteration(bench.sizes), OfficialIteration(bench.sizes)
    record.take_turns(ours, [official], bench.sizes.iteration_rounds)
    steps = {
        side.name: {turn.detail["steps"] for turn in record.turns if turn.side == side.name}
        for side in (ours, official)
    }
    apart = abs(max(steps[ours.name]) - max(steps[official.name]))
    record.check("steps of the optimiser, apart", apart, 0)
    record.ratio("whole iterations/s", ours, official, at_least=GOAL)

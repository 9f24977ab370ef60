"""Peak memory above the weights while training."""

from __future__ import annotations

from benchmarks import models
from benchmarks.bench import Bench
from benchmarks.memory import Job, measured
from benchmarks.record import Record, Spread

GOAL = 1 / 3


def peak(bench: Bench, record: Record, set_name: str) -> None:
    """spinlm's over TRL's with its defaults; two of ours around one of theirs. TRL's second epoch is left out."""
    sizes = bench.sizes
    common = (models.SMOLLM2, set_name, sizes.optimiser_batch, 1, 1, sizes.optimiser_batch)
    ours = Job("spinlm", *common, settings={"num_train_epochs": 2} | bench.spin)
    theirs = Job("trl", *common, settings={})
    above = {"spinlm": [], "trl": []}  # type: dict[str, list[float]]
    for job in (ours, theirs, ours):
        above[job.side].append(measured(job)["above"])
        record.say(f"{job.side}: {above[job.side][-1] / 2**30:.2f} GiB above the weights")
    spread = Spread.of(mine / their for mine in above["spinlm"] for their in above["trl"])
    record.figure(f"peak memory above the weights, {set_name}", "TRL defaults", spread, at_most=GOAL, bytes=above)

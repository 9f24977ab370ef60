"""What twice as much costs: time and peak memory of spinlm's training alone."""

from __future__ import annotations

from benchmarks import models
from benchmarks.bench import Bench
from benchmarks.inputs import SETS
from benchmarks.memory import Job, measured
from benchmarks.record import Record, Spread, Turn, ratios
from benchmarks.sides.training import Training, spin_training

TIME, FLAT = 2.1, 1.1
"""Twice the work in little more than twice the time; memory that stays within a tenth."""


def growth(bench: Bench, record: Record) -> None:
    """Pairs, responses and vocabulary, each doubled by itself."""
    sizes = bench.sizes

    def job(model: str = models.SMOLLM2, copies: int = 1, responses: int = 1, new_pairs: int = 1) -> Job:
        settings = {"num_train_epochs": 2} | bench.spin
        pairs = new_pairs * sizes.growth_pairs
        return Job("spinlm", model, "short", pairs, copies, responses, sizes.optimiser_batch, settings)

    base, doubled = (
        job(),
        {
            "pairs x 2": job(copies=2),
            "responses x 2": job(responses=2),
            "vocabulary x 2": job(models.SMOLLM2_WIDE),
        },
    )
    one = _Epochs("as it is", base)
    others = [_Epochs(name, other) for name, other in doubled.items()]
    for side in (one, *others):
        side.turn()
    record.take_turns(one, others, sizes.rounds)
    least = measured(base)["above"]
    doubled["pairs x 2"] = job(new_pairs=2)  # of other lengths: each new one may make something that is kept
    for name, other in doubled.items():
        record.figure(f"time, {name}", "as it is", Spread.of(ratios(record.turns, one.name, name)), at_most=TIME)
        grown = measured(other)["above"]
        flat = FLAT if other.stretched == 1 else None
        spread = Spread.of([grown / least])
        record.figure(f"peak memory, {name}", "as it is", spread, at_most=flat, bytes=[least, grown])


class _Epochs:
    """A training whose turn counts as one, however many pairs it has."""

    def __init__(self, name: str, job: Job) -> None:
        self.name = name
        pairs = SETS[job.pair_set].stretched(job.stretched).pairs(job.pairs, copies=job.copies)
        settings = job.settings | {"num_train_epochs": 1}
        self._training: Training = spin_training(models.load_model(job.model), pairs, job.optimiser_batch, **settings)

    def turn(self) -> Turn:
        return Turn(self.name, self._training.turn().seconds, 1, {})

"""Training pairs a second, against TRL's defaults and TRL at its best, and the share of the matrix peak."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks import models
from benchmarks.bench import Bench
from benchmarks.inputs import SETS
from benchmarks.record import Record, Spread, ratios
from benchmarks.sides.training import AT_ITS_BEST, Training, dpo_training, spin_training
from benchmarks.work import Shapes, training_work
from spinlm.data.pairs import Pair

GOALS = {"short": (6.0, 3.0), "balanced": (5.0, 2.5), "long": (6.0, 3.0)}
"""Against TRL's defaults, and at its best."""
PEAK_SHARE = 0.65
BATCHES = (1, 2, 4, 8)
SEARCH_PAIRS = 4
PARITY_STEPS = 3
PARITY_LEARNING_RATE = 1e-4
"""High enough that the steps are seen in the loss, low enough that the last one is far from 0."""
PARITY = {"loss": 1e-3, "margin": 1e-3, "real": 1e-2, "synthetic": 1e-2}
"""How far apart both sides may be after equal steps: log-probs are sums over a response, in float32."""


def train(bench: Bench, record: Record, set_name: str) -> None:
    """A set on SmolLM2."""
    _train(bench, record, set_name, models.SMOLLM2, bench.sizes.pairs(set_name), *GOALS[set_name])


def train_gpt_neo(bench: Bench, record: Record) -> None:
    """The short set on GPT-Neo, which has no goal of its own."""
    _train(bench, record, "short", models.GPT_NEO, bench.sizes.gpt_neo_pairs, None, None)


def _train(
    bench: Bench,
    record: Record,
    set_name: str,
    model: str,
    count: int,
    against_defaults: float | None,
    against_best: float | None,
) -> None:
    sizes, pairs = bench.sizes, SETS[set_name].pairs(count)
    check_parity(bench, record, model, pairs[: sizes.parity_pairs])
    batch = _best_batch(bench, record, model, pairs)

    def load() -> Any:
        return models.load_model(model)

    shapes = Shapes.of(load(), models.RANK)
    ours = spin_training(load(), pairs, sizes.optimiser_batch, peak_size=sizes.peak_size, **bench.spin)
    defaults = dpo_training(load(), pairs, sizes.optimiser_batch)
    best = dpo_training(load(), pairs, sizes.optimiser_batch, "TRL at its best", batch, **AT_ITS_BEST)
    ours.warm_up()
    for side in (defaults, best):
        side.warm_up(sizes.warm_up_pairs)
    record.take_turns(ours, [defaults, best], sizes.rounds)
    record.ratio("train pairs/s", ours, defaults, at_least=against_defaults)
    record.ratio("train pairs/s", ours, best, at_least=against_best)
    scored = [replace(t, seconds=t.seconds + ours.made_in) if t.side == ours.name else t for t in record.turns]
    once = Spread.of(ratios(scored, ours.name, defaults.name))
    record.figure("train pairs/s, one epoch, scoring counted", defaults.name, once, scoring_seconds=ours.made_in)
    work = training_work(shapes, pairs)
    turns = [turn for turn in record.turns if turn.side == ours.name]
    shares = Spread.of(work / turn.seconds / turn.detail["matrix_peak"] for turn in turns)
    record.figure("share of the matrix peak, training", "physical limit", shares, at_least=PEAK_SHARE, work=work)


def check_parity(bench: Bench, record: Record, model: str, pairs: list[Pair]) -> None:
    """Both trainers take the same few steps on the same pairs, one batch of all, and log the same."""
    settings: dict[str, Any] = {
        "max_steps": PARITY_STEPS,
        "learning_rate": PARITY_LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
    }
    ours = spin_training(models.load_model(model), pairs, len(pairs), **(bench.spin | settings))
    theirs = dpo_training(models.load_model(model), pairs, len(pairs), **settings)
    for side in (ours, theirs):
        side.turn()
    names = {"loss": "loss", "margin": "margin", "real": "logprob_real", "synthetic": "logprob_synthetic"}
    trl_names = {"loss": "loss", "margin": "rewards/margins", "real": "logps/chosen", "synthetic": "logps/rejected"}
    logged, trl_logged = ours.logged(names), theirs.logged(trl_names)
    record.note(f"losses by step: spinlm {_losses(logged)}; TRL {_losses(trl_logged)}")
    for name, tolerance in PARITY.items():
        apart = max(abs(a[name] - b[name]) for a, b in zip(logged, trl_logged, strict=True))
        record.check(f"{name} in {PARITY_STEPS} equal steps, spinlm and TRL", apart, tolerance)


def _losses(logged: list[dict[str, float]]) -> str:
    return ", ".join(f"{entry['loss']:.4f}" for entry in logged)


def _best_batch(bench: Bench, record: Record, model: str, pairs: list[Pair]) -> int:
    """TRL's fastest batch in a short run: larger ones are tried as long as they are faster."""
    best, fastest = 0, 0.0
    for batch in (size for size in BATCHES if size <= bench.sizes.optimiser_batch):
        some = pairs[: max(batch, SEARCH_PAIRS)]
        side: Training = dpo_training(models.load_model(model), some, len(some), batch=batch, **AT_ITS_BEST)
        rate = side.turn().rate
        record.say(f"TRL at its best, batch {batch}: {rate:.4g} pairs a second")
        if rate < fastest:
            break
        best, fastest = batch, rate
    record.note(f"TRL's best batch: {best}")
    return best

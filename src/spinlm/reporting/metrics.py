"""metrics.jsonl: every number of a run in one long table; docs/measures.md describes it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from spinlm.evaluation.measures import PARTS
from spinlm.reporting.benchmarks import benchmark_records
from spinlm.reporting.diagnostics import diagnostics
from spinlm.reporting.judged import judged_results
from spinlm.reporting.summary import is_iteration, measured_players
from spinlm.reporting.training_log import committed_log, trained_players
from spinlm.rundir import RunDir

if TYPE_CHECKING:
    from pandas import DataFrame

FILE = "metrics.jsonl"
Source = Literal["training", "held_out", "diagnostics", "benchmark", "judge"]


@dataclass(frozen=True)
class Metric:
    """One number, a row of metrics.jsonl.

    Attributes:
        source: Where it comes from.
        player: Whose it is.
        step: The optimiser's step within that player's training; None elsewhere.
        metric: Its name.
        value: The number; None where it isn't finite.
        low: The lower end of its 95 % interval, where it has one.
        high: The upper end.
        count: Over how many prompts (or questions) it is taken.
    """

    source: Source
    player: str
    step: int | None
    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    count: int | None = None


def metrics(run: RunDir) -> list[Metric]:
    """Every number that is committed in a run, always in the same order.

    Raises:
        UserError: There is no run, or something in it isn't what was committed.
    """
    return [*_training(run), *_held_out(run), *_diagnostics(run), *_benchmarks(run), *_judged(run)]


def write_metrics(run: RunDir) -> None:
    """Write metrics.jsonl anew: the same bytes for the same artifacts."""
    run.put(FILE, "".join(json.dumps(vars(metric)) + "\n" for metric in metrics(run)))


def metrics_frame(run: RunDir) -> DataFrame:
    """The same as a pandas frame, a column for each attribute of `Metric`."""
    from pandas import DataFrame

    names = [field.name for field in fields(Metric)]
    frame = DataFrame([vars(metric) for metric in metrics(run)], columns=names)
    return frame.astype({"step": "Int64", "value": float, "low": float, "high": float, "count": "Int64"})


def evaluations_frame(run: RunDir) -> DataFrame:
    """The held-out measures as a pandas frame.

    Returns:
        A row for each player and measure: player, iteration (none for others than main players), measure, value,
        low, high, prompts.
    """
    from pandas import DataFrame

    rows = [
        {
            "player": metric.player,
            "iteration": int(metric.player.removeprefix("iteration-")) if is_iteration(metric.player) else None,
            "measure": metric.metric,
            "value": metric.value,
            "low": metric.low,
            "high": metric.high,
            "prompts": metric.count,
        }
        for metric in _held_out(run)
    ]
    names = ["player", "iteration", "measure", "value", "low", "high", "prompts"]
    frame = DataFrame(rows, columns=names)
    return frame.astype({"iteration": "Int64", "value": float, "low": float, "high": float, "prompts": "Int64"})


def _training(run: RunDir) -> Iterator[Metric]:
    for player in trained_players(run.recipe()):
        for row in committed_log(run, player):
            for name in sorted(row.keys() - {"step"}):
                yield Metric("training", player, row["step"], name, _finite(row[name]))


def _held_out(run: RunDir) -> Iterator[Metric]:
    for player in measured_players(run, run.recipe()):
        of_player: Mapping[str, Mapping[str, Any]] = run.committed_json(f"evaluation/{player}/measures.json")
        for name in (name for name in PARTS if name in of_player):
            value, low, high = (_finite(of_player[name][end]) for end in ("value", "low", "high"))
            yield Metric("held_out", player, None, name, value, low, high, of_player[name]["prompts"])


def _diagnostics(run: RunDir) -> Iterator[Metric]:
    for player, found in diagnostics(run, run.recipe()).items():
        for name in sorted(found.values):
            yield Metric("diagnostics", player, None, name, _finite(found.values[name]))


def _benchmarks(run: RunDir) -> Iterator[Metric]:
    """Named by suite, task and lm-eval's metric; the interval is 1.96 standard errors to each side."""
    for found in benchmark_records(run):
        name = f"{found['suite']}/{found['task']}/{found['metric']}"
        value, error = found["value"], found["stderr"]
        low, high = (None, None) if value is None or error is None else (value - 1.96 * error, value + 1.96 * error)
        yield Metric("benchmark", found["player"], None, name, value, low, high, found["examples"])


JUDGED = ("win_rate", "length_controlled_win_rate", "position_bias", "grade")


def _judged(run: RunDir) -> Iterator[Metric]:
    """Named by benchmark, questions, judge and, of two players, the other one."""
    for suite, result in judged_results(run):
        parts = [
            suite,
            result["questions"],
            result["judge"],
            *([f"against {result['other']}"] if "other" in result else []),
        ]
        for name in JUDGED:
            if measured := result.get(name):
                value, low, high = (_finite(measured[end]) for end in ("value", "low", "high"))
                metric = "/".join([*parts, name])
                yield Metric("judge", result["player"], None, metric, value, low, high, measured["prompts"])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

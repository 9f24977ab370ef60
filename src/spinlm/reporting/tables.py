"""The tables of the report page: text in cells, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from spinlm.reporting.report import COLUMNS, with_interval
from spinlm.reporting.status import StageStatus
from spinlm.reporting.summary import Summary, Values

QUANTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Attributes:
        caption: What it shows.
        headings: Of its columns.
        rows: Its cells.
        best: The row to stand out, by its first cell.
        notes: What a reader has to know of it.
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: str | None = None
    notes: Sequence[str] = ()


def measures_table(measures: Mapping[str, Mapping[str, Values]], who: str, best: str | None = None) -> Table:
    """Everybody's held-out measures.

    Args:
        measures: Of each, by name.
        who: What they are.
        best: The one to stand out.
    """
    shown = [name for name in COLUMNS if any(name in measured for measured in measures.values())]
    rows = [
        [name, *(with_interval(measured[of]) if of in measured else "–" for of in shown)]
        for name, measured in measures.items()
    ]
    return Table("Held-out measures, with 95 % intervals", [who, *(COLUMNS[name] for name in shown)], rows, best)


def differences_table(summary: Summary) -> Table:
    """The best minus each other player, by the measure that chose it."""
    return beside_table(summary, f"{summary.best} minus each other player", "player", "the best is")


def beside_table(summary: Summary, caption: str, who: str, what: str) -> Table:
    """The differences of a summary under other headings."""
    rows = [
        [other, with_interval(change, signed=True), outcome_words(summary, other)]
        for other, change in summary.differences.items()
    ]
    return Table(caption, [who, "difference", what], rows)


def outcome_words(summary: Summary, other: str) -> str:
    """`better, beyond noise`."""
    outcome = summary.outcome(other)
    if outcome.word == "equal":
        return "equal"
    return f"{outcome.word}, {'beyond' if outcome.beyond_noise else 'within'} noise"


def stages_table(stages: Iterable[StageStatus]) -> Table:
    """How far each stage is, and what it took."""
    rows = [
        [
            stage.name,
            stage.state,
            duration(stage.seconds) if stage.seconds else "–",
            f"{stage.tokens:,}" if stage.tokens else "–",
            f"{stage.tokens / stage.seconds:,.0f}" if stage.tokens and stage.seconds else "–",
        ]
        for stage in stages
    ]
    return Table("Stages", ["stage", "state", "time", "tokens", "tokens a second"], rows)


def quantiles_table(caption: str, values: Mapping[str, Sequence[float]]) -> Table:
    """The quantiles and the mean of each of several sets of numbers."""
    rows = [
        [name, *(f"{number:.4g}" for number in (*np.percentile(numbers, QUANTILES), np.mean(numbers)))]
        for name, numbers in values.items()
        if len(numbers)
    ]
    return Table(caption, ["", *(f"{q} %" for q in QUANTILES), "mean"], rows)


def numbers_table(caption: str, of_players: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for each number that any player has, a column for each player."""
    names = list(dict.fromkeys(name for numbers in of_players.values() for name in numbers))
    rows = [
        [
            name,
            *(
                f"{numbers[name]:.4g}" if name in numbers and isfinite(numbers[name]) else "–"
                for numbers in of_players.values()
            ),
        ]
        for name in names
    ]
    return Table(caption, ["", *of_players], rows)


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3:07 min`, `2:05 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"

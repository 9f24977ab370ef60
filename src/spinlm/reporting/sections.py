"""What else has been measured of a run, as sections of its page: benchmark suites, and what judges made of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spinlm.reporting.benchmarks import BenchmarkTable, Row, benchmark_tables
from spinlm.reporting.judged import JudgedTable, judged_tables
from spinlm.reporting.tables import Table
from spinlm.rundir import RunDir


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        id: Where links lead.
        title: Its heading.
        tables: What it shows, each with its notes.
    """

    id: str
    title: str
    tables: Sequence[Table]


def sections(run: RunDir) -> list[Section]:
    """Those that a run has something for."""
    found = (_benchmarks(benchmark_tables(run)), _judged(judged_tables(run)))
    return [section for section in found if section.tables]


def _benchmarks(found: Sequence[BenchmarkTable]) -> Section:
    tables = []
    for table in found:
        tables.append(_benchmark(table, table.title, table.rows, table.notes))
        if table.paper:
            tables.append(_benchmark(table, f"{table.suite}, for comparison: {table.source}", table.paper))
    return Section("benchmarks", "Benchmarks", tables)


def _judged(found: Sequence[JudgedTable]) -> Section:
    tables = [Table(table.title, table.headings, table.rows, notes=table.notes) for table in found]
    return Section("judged", "Judged answers", tables)


def _benchmark(table: BenchmarkTable, caption: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> Table:
    average = ["average"] if table.has_average else []
    cells = [
        [row.label, *map(table.text, (*row.scores, row.average) if table.has_average else row.scores)] for row in rows
    ]
    return Table(caption, ["player", *table.headings, *average], cells, notes=notes)

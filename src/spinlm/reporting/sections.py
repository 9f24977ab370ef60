"""What else has been measured of a run, as sections of its page: benchmark suites, and what judges made of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

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
        notes: What a reader has to know.
        tables: What it shows.
    """

    id: str
    title: str
    notes: Sequence[str]
    tables: Sequence[Table]


def sections(run: RunDir) -> list[Section]:
    """Those that a run has something for."""
    found = (_benchmarks(benchmark_tables(run)), _judged(judged_tables(run)))
    return [section for section in found if section.tables]


def _benchmarks(found: Sequence[BenchmarkTable]) -> Section:
    tables = []
    for table in found:
        tables.append(_benchmark(table, table.title, table.rows))
        if table.paper:
            tables.append(_benchmark(table, f"{table.suite}, for comparison: {table.source}", table.paper))
    notes = chain.from_iterable((f"{table.suite}: {note}" for note in table.notes) for table in found)
    return Section("benchmarks", "Benchmarks", list(notes), tables)


def _judged(found: Sequence[JudgedTable]) -> Section:
    notes = dict.fromkeys(note for table in found for note in table.notes)
    tables = [Table(table.title, table.headings, table.rows) for table in found]
    return Section("judged", "Judged answers", list(notes), tables)


def _benchmark(table: BenchmarkTable, caption: str, rows: Sequence[Row]) -> Table:
    average = ["average"] if table.has_average else []
    cells = [
        [row.label, *map(table.text, (*row.scores, row.average) if table.has_average else row.scores)] for row in rows
    ]
    return Table(caption, ["player", *table.headings, *average], cells)

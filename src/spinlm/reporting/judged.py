"""What judges made of a run's players, as tables: read from the run directory alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from spinlm.files import digest
from spinlm.reporting.report import with_interval
from spinlm.reporting.training_log import weights_hash
from spinlm.rundir import RunDir

Result = Mapping[str, Any]
"""A committed `result.json`."""


@dataclass(frozen=True)
class JudgedTable:
    """A table of text.

    Attributes:
        title: What was judged, on which questions, and by whom.
        headings: Of the columns.
        rows: A cell for each heading.
        notes: What a reader has to know.
    """

    title: str
    headings: list[str]
    rows: list[list[str]]
    notes: list[str]

    def rich(self) -> Table:
        """For the terminal: intervals on a line of their own, so that it fits 80 characters."""
        caption = escape("\n".join(self.notes))
        table = Table(title=escape(self.title), caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for place, heading in enumerate(self.headings):
            table.add_column(escape(heading), justify="right" if place else "left")
        for row in self.rows:
            table.add_row(*(escape(cell).replace(" [", "\n[") for cell in row))
        return table


def judged_tables(run: RunDir, keys: Sequence[str] | None = None) -> list[JudgedTable]:
    """A table for each benchmark, set of questions and judge.

    Args:
        run: The run.
        keys: Only these results. None: all that are committed, but for those of players that were trained
            anew since.
    """
    results: dict[tuple[str, str, str], list[Result]] = {}
    for suite, result in judged_results(run, keys):
        results.setdefault((suite, result["questions"], result["judge"]), []).append(result)
    return [_TABLES[suite](questions, judge, of_table) for (suite, questions, judge), of_table in results.items()]


def judged_results(run: RunDir, keys: Sequence[str] | None = None) -> list[tuple[str, Result]]:
    """The results themselves, each with its benchmark's name; see `judged_tables`.

    Where different questions (or ways to ask) have one name, it is told apart by a hash.
    """
    if keys is None:
        keys = [key for record in run.records() if _is_result(key := record["key"]) and _is_current(run, record)]
    results = {key: run.committed_json(key, "result.json") for key in keys}
    setups = {key: _setup(run.record(key)["inputs"]) for key in keys}
    named_alike: dict[tuple[str, str, str], set[str]] = {}
    for key, result in results.items():
        named_alike.setdefault(_names(key, result), set()).add(setups[key])
    for key, result in results.items():
        if len(named_alike[_names(key, result)]) > 1:
            result["questions"] += f" ({setups[key]})"
    return [(key.split("/")[1], result) for key, result in results.items()]


def _names(key: str, result: Result) -> tuple[str, str, str]:
    return key.split("/")[1], result["questions"], result["judge"]


def _setup(inputs: Mapping[str, Any]) -> str:
    """What was asked and how, whoever answered: only results of one setup can be compared."""
    return digest({name: value for name, value in inputs.items() if name not in ("players", "answers")})[:6]


def _arena_table(questions: str, judge: str, results: Sequence[Result]) -> JudgedTable:
    rows = [
        [
            f"{r['player']} against {r['other']}",
            with_interval(r["win_rate"]),
            with_interval(r["length_controlled_win_rate"]),
            f"{r['wins']} / {r['ties']} / {r['losses']}",
            _optional(r["position_bias"]),
            f"{r['length']['value']:.0f} / {r['other_length']['value']:.0f}",
        ]
        for r in results
    ]
    headings = ["", "win rate", "length-controlled", "won / tied / lost", "orders disagree", "characters"]
    notes = ["Ties count half; a question is won where the judge prefers the answer in both orders. 95 % intervals."]
    notes += _notes([(f"{r['player']} against {r['other']}", r) for r in results])
    return JudgedTable(f"arena: {questions}, judged by {judge}", headings, rows, notes)


def _mt_bench_table(questions: str, judge: str, results: Sequence[Result]) -> JudgedTable:
    turns = sorted({turn for r in results for turn in r["turns"]}, key=int)
    categories = list(dict.fromkeys(name for r in results for name in r["categories"]))
    rows = [
        [
            r["player"],
            with_interval(r["grade"]),
            *(_optional(r["turns"].get(turn)) for turn in turns),
            *(_value(r["categories"].get(name)) for name in categories),
        ]
        for r in results
    ]
    headings = ["", "grade", *(f"turn {turn}" for turn in turns), *categories]
    notes = ["Mean grades from 1 to 10, with 95 % intervals.", *_notes([(r["player"], r) for r in results])]
    return JudgedTable(f"mt-bench: {questions}, judged by {judge}", headings, rows, notes)


_TABLES: Mapping[str, Callable[[str, str, Sequence[Result]], JudgedTable]] = {
    "arena": _arena_table,
    "mt-bench": _mt_bench_table,
}


def _notes(results: Sequence[tuple[str, Result]]) -> list[str]:
    """What weakens a result."""
    notes = []
    for name, result in results:
        counts = {
            "without a verdict": result["no_verdict"],
            "equal answers, not judged": result.get("equal_answers", 0),
            "answers cut at the cap": result["cut"] + result.get("other_cut", 0),
        }
        if any(counts.values()):
            notes.append(f"{name}: " + ", ".join(f"{count} {what}" for what, count in counts.items() if count) + ".")
    return notes


def _optional(measured: Mapping[str, float] | None) -> str:
    return with_interval(measured) if measured else "–"


def _value(measured: Mapping[str, float] | None) -> str:
    return f"{measured['value']:.2f}" if measured else "–"


def _is_result(key: str) -> bool:
    return key.startswith(tuple(f"benchmarks/{suite}/" for suite in _TABLES))


def _is_current(run: RunDir, record: Mapping[str, Any]) -> bool:
    """Whether its players are still those that the run has under these names."""
    players: Mapping[str, str] = record["inputs"]["players"]
    return all(weights_hash(run, name) in (None, player) for name, player in players.items())

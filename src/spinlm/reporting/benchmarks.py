"""A run's benchmark scores as tables, read from the run directory alone; beneath them a paper's, where there are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from spinlm.reporting.training_log import weights_hash
from spinlm.rundir import RunDir

FOLDER = "benchmarks"
SUITE_FILE = "suite.json"


@dataclass(frozen=True)
class Score:
    """A player's score, in the unit that is shown (percent, or as lm-eval gives it).

    Attributes:
        value: The score.
        stderr: Its standard error over the task's examples; None where it isn't known.
        truncated: Whether some prompt was longer than the model takes, and lost its beginning.
    """

    value: float
    stderr: float | None = None
    truncated: bool = False


@dataclass(frozen=True)
class Column:
    """A task and one of its metrics.

    Attributes:
        task: The task's name in file names.
        title: For people.
        metric: `acc_norm`, or with a filter `exact_match,strict-match`.
        num_fewshot: Solved examples before each question; None where it differs among a group's tasks.
        examples: How many were asked; 0 before any.
        higher_is_better: None where that isn't known.
    """

    task: str
    title: str
    metric: str
    num_fewshot: int | None
    examples: int
    higher_is_better: bool | None

    @property
    def details(self) -> str:
        """`ARC: 25-shot acc_norm`."""
        shots = "" if self.num_fewshot is None else f"{self.num_fewshot}-shot "
        return f"{self.title}: {shots}{_metric(self)}"


@dataclass(frozen=True)
class Row:
    """A player's scores, or those of a model in a paper.

    Attributes:
        label: The player's name, or the paper's.
        scores: One for each column; None where it isn't measured.
        average: Their mean, where all are there and more is better in each.
    """

    label: str
    scores: tuple[Score | None, ...]
    average: Score | None


@dataclass(frozen=True)
class BenchmarkTable:
    """A suite's scores.

    Attributes:
        suite: Its name.
        folder: Where its results are kept in the run directory.
        description: What it is.
        limit: Only so many examples of each task were asked, the first ones; None: all.
        percent: Whether scores are in percent.
        columns: What was measured.
        rows: The run's players, in order.
        paper: The rows of a paper.
        source: Which paper; empty where there is none.
    """

    suite: str
    folder: str
    description: str
    limit: int | None
    percent: bool
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    paper: tuple[Row, ...]
    source: str

    @property
    def title(self) -> str:
        """With the description, the unit, and a warning where it was but a try."""
        about = [one for one in (self.description, "percent" if self.percent else "") if one]
        if self.limit is not None:
            about.append(f"the first {self.limit} examples of each task only")
        return f"{self.suite}: {', '.join([*about, 'with standard errors'])}"

    @property
    def has_average(self) -> bool:
        return any(one.average is not None for one in chain(self.rows, self.paper))

    @property
    def headings(self) -> list[str]:
        """One for each column: the task's, and the metric where it has several."""
        titles = [column.title for column in self.columns]
        return [c.title if titles.count(c.title) == 1 else f"{c.title} {_metric(c)}" for c in self.columns]

    @property
    def notes(self) -> list[str]:
        """What has to be known to read it: shots and metrics, and whether prompts were cut."""
        notes = ["; ".join(column.details for column in self.columns) + "."]
        if any(score is not None and score.truncated for one in self.rows for score in one.scores):
            notes.append("*: some prompts are longer than the model takes, and lost their beginning.")
        return notes

    def rich(self) -> Group:
        """For the terminal: the players' table, and the paper's beneath it."""
        parts: list[RenderableType] = [f"[italic]{escape(self.title)}[/]", self._rich(self.rows)]
        if self.paper:
            parts += [f"[italic]for comparison: {escape(self.source)}[/]", self._rich(self.paper)]
        return Group(*parts, *map(escape, self.notes))

    def _rich(self, rows: Sequence[Row]) -> Table:
        """A score is on two lines, so that six tasks fit a terminal."""
        table = Table(box=SIMPLE_HEAD, padding=0)
        table.add_column("", overflow="fold", min_width=11)
        for heading in self.headings:
            table.add_column(escape(heading), justify="right", overflow="fold")
        if self.has_average:
            table.add_column("average", justify="right")
        for one in rows:
            table.add_row(*(escape(cell).replace(" ±", "\n±") for cell in self._cells(one)))
        return table

    def markdown(self) -> str:
        """For `benchmarks.md`."""
        lines = [f"## {self.title}", "", *self._markdown(self.rows)]
        if self.paper:
            lines += ["", f"For comparison, {self.source}:", "", *self._markdown(self.paper)]
        return "\n".join([*lines, "", *self.notes]) + "\n"

    def _markdown(self, rows: Sequence[Row]) -> list[str]:
        headings = ["", *self.headings, *(["average"] if self.has_average else [])]
        lines = [headings, ["---"] * len(headings), *map(self._cells, rows)]
        return ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]

    def text(self, score: Score | None) -> str:
        """`60.41 ± 1.43` in percent, `0.6041 ± 0.0143` else."""
        if score is None:
            return "–"
        digits = 2 if self.percent else 4
        error = "" if score.stderr is None else f" ± {score.stderr:.{digits}f}"
        return f"{score.value:.{digits}f}{'*' if score.truncated else ''}{error}"

    def _cells(self, one: Row) -> list[str]:
        scores = [*one.scores, one.average] if self.has_average else one.scores
        return [one.label, *map(self.text, scores)]


def benchmark_tables(run: RunDir) -> list[BenchmarkTable]:
    """A table for each suite of which something is measured, by name."""
    tables = [_table(run, folder, suite) for folder, suite in _suites(run)]
    return [table for table in tables if table.rows]


def benchmark_records(run: RunDir) -> list[dict[str, Any]]:
    """Every committed score, all metrics: suite, player, task, metric, value, stderr (as lm-eval has them), shots,
    examples."""
    return [
        {
            "suite": folder.name,
            "player": player,
            "task": task["name"],
            "metric": metric,
            "value": score["value"],
            "stderr": score["stderr"],
            "shots": result["num_fewshot"],
            "examples": result["examples"],
        }
        for folder, suite in _suites(run)
        for player in _players(folder)
        for task in suite["tasks"]
        for result in _results(run, folder, player, task["name"])
        for metric, score in result["scores"].items()
    ]


def _metric(column: Column) -> str:
    """`acc_norm`, `exact_match strict-match`."""
    return column.metric.removesuffix(",none").replace(",", " ")


def _suites(run: RunDir) -> list[tuple[Path, dict[str, Any]]]:
    """Where each suite's results are, and what it is."""
    keys = [record["key"] for record in run.records()]
    described = [key for key in keys if re.fullmatch(rf"{FOLDER}/[^/]+/{SUITE_FILE}", key)]
    return sorted(((run.path / key).parent, run.committed_json(key)) for key in described)


def _players(folder: Path) -> list[str]:
    """Base, SFT model, iterations, control."""
    places = {"base": -2, "sft": -1, "control": math.inf}
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    iterations = {name: int(name.removeprefix("iteration-")) for name in names if re.fullmatch(r"iteration-\d+", name)}
    return sorted((places | iterations).keys() & names, key=lambda name: (places | iterations)[name])


def _results(run: RunDir, folder: Path, player: str, task: str) -> Iterator[dict[str, Any]]:
    """The one result that is committed, or none; one of weights that were trained anew since is none."""
    key = (folder / player / f"{task}.json").relative_to(run.path).as_posix()
    if run.has_record(key) and weights_hash(run, player) in (None, run.record(key)["inputs"].get("player")):
        yield run.committed_json(key)


def _table(run: RunDir, folder: Path, suite: Mapping[str, Any]) -> BenchmarkTable:
    results = {
        (player, task["name"]): result
        for player in _players(folder)
        for task in suite["tasks"]
        for result in _results(run, folder, player, task["name"])
    }
    columns = tuple(chain.from_iterable(_columns(task, results) for task in suite["tasks"]))
    scale = 100.0 if suite["percent"] else 1.0
    players = list(dict.fromkeys(player for player, _ in results))
    scores = {player: [_score(results.get((player, one.task)), one, scale) for one in columns] for player in players}
    paper = suite["paper"] or {"source": "", "rows": []}
    return BenchmarkTable(
        suite=suite["name"],
        folder=folder.relative_to(run.path).as_posix(),
        description=suite["description"],
        limit=suite["limit"],
        percent=suite["percent"],
        columns=columns,
        rows=tuple(_row(player, scores[player], columns) for player in players),
        paper=tuple(_row(one["model"], _published(one["scores"], columns), columns) for one in paper["rows"]),
        source=paper["source"],
    )


def _columns(task: Mapping[str, Any], results: Mapping[tuple[str, str], dict[str, Any]]) -> Iterator[Column]:
    """The task's metric, or each that it gave."""
    of_task = [result for (_, name), result in results.items() if name == task["name"]]
    one = of_task[0] if of_task else {"num_fewshot": task["num_fewshot"], "examples": 0, "higher_is_better": {}}
    metrics = [task["metric"]] if task["metric"] else dict.fromkeys(m for result in of_task for m in result["scores"])
    for metric in metrics:
        yield Column(
            task=task["name"],
            title=task["title"],
            metric=metric,
            num_fewshot=one["num_fewshot"],
            examples=one["examples"],
            higher_is_better=one["higher_is_better"].get(metric.partition(",")[0]),
        )


def _score(result: Mapping[str, Any] | None, column: Column, scale: float) -> Score | None:
    score = None if result is None else result["scores"].get(column.metric)
    if result is None or score is None or score["value"] is None:
        return None
    stderr = None if score["stderr"] is None else scale * score["stderr"]
    return Score(scale * score["value"], stderr, result["truncated"])


def _published(scores: Mapping[str, float], columns: Sequence[Column]) -> list[Score | None]:
    return [Score(scores[column.task]) if column.task in scores else None for column in columns]


def _row(label: str, scores: Sequence[Score | None], columns: Sequence[Column]) -> Row:
    known = [score for score in scores if score is not None]
    comparable = len({column.task for column in columns}) == len(columns) > 1
    if len(known) < len(scores) or not comparable or any(not column.higher_is_better for column in columns):
        return Row(label, tuple(scores), None)
    errors = [score.stderr for score in known if score.stderr is not None]
    stderr = math.hypot(*errors) / len(known) if len(errors) == len(known) else None
    return Row(label, tuple(scores), Score(math.fsum(score.value for score in known) / len(known), stderr))

"""Benchmark tables, with numbers worked out by hand, from run directories that hold nothing else."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from made_run import MadeRun
from spinlm.benchmarking import _describe, folder_of
from spinlm.errors import UserError
from spinlm.evaluation.harness import Catalogue
from spinlm.evaluation.suites import Suite, find_suite
from spinlm.files import write_json
from spinlm.reporting.benchmarks import BenchmarkTable, benchmark_records, benchmark_tables
from spinlm.reporting.metrics import metrics
from spinlm.reporting.sections import sections
from spinlm.rundir import RunDir

SUITE: dict[str, Any] = {
    "description": "two tasks",
    "tasks": [
        {"task": "arc_easy", "title": "ARC", "num_fewshot": 25, "metric": "acc_norm,none"},
        {"task": "gsm8k", "title": "GSM8K", "metric": "exact_match,strict-match"},
    ],
    "percent": True,
}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def describe(run: RunDir, name: str = "mine", limit: int | None = None, **changes: Any) -> None:
    _describe(run, name, Suite.model_validate({**SUITE, **changes}), limit)


def put(run: RunDir, player: str, task: str, folder: str = "benchmarks/mine", **changes: Any) -> None:
    """A committed result: 0.5 ± 0.03 by acc_norm, or 0.25 ± 0.04 by exact match."""
    of_arc = {"acc_norm,none": {"value": 0.5, "stderr": 0.03}, "acc,none": {"value": 0.125, "stderr": None}}
    of_gsm8k = {"exact_match,strict-match": {"value": 0.25, "stderr": 0.04}}
    result = {
        "scores": of_arc if task == "arc_easy" else of_gsm8k,
        "higher_is_better": {"acc_norm": True, "acc": True, "exact_match": True},
        "num_fewshot": 25 if task == "arc_easy" else 5,
        "examples": 100,
        "truncated": False,
        **changes,
    }
    with run.artifact(f"{folder}/{player}/{task}.json", "benchmark", {}).staging() as place:
        write_json(place, result)


def train(run: RunDir, folder: str, weights: str) -> str:
    """Committed weights, and their hash."""
    artifact = run.artifact(f"{folder}/adapter", "train", {})
    with artifact.staging() as place:
        place.mkdir()
        (place / "weights").write_text(weights)
    return artifact.hash


def test_of_weights_that_were_trained_anew_no_score_is_shown(run: RunDir) -> None:
    describe(run)
    inputs = {"player": train(run, "iterations/0", "old")}
    with run.artifact("benchmarks/mine/iteration-0/arc_easy.json", "benchmark", inputs).staging() as place:
        write_json(
            place, {"scores": {"acc_norm,none": {"value": 0.5, "stderr": 0.03}}, "higher_is_better": {}, **COUNTS}
        )
    assert [row.label for row in table(run).rows] == ["iteration-0"]
    train(run, "iterations/0", "new")
    assert all(not one.rows for one in benchmark_tables(run))


COUNTS = {"num_fewshot": 25, "examples": 100, "truncated": False}


def table(run: RunDir) -> BenchmarkTable:
    (one,) = benchmark_tables(run)
    return one


def shown(table: BenchmarkTable, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table.rich())
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


class TestTable:
    def test_values_errors_and_their_average(self, run: RunDir) -> None:
        """(50 + 25) / 2 ± √(3² + 4²) / 2 percent."""
        describe(run)
        for task in ("arc_easy", "gsm8k"):
            put(run, "base", task)
        (row,) = table(run).rows
        arc, gsm8k = row.scores
        assert arc is not None and gsm8k is not None and row.average is not None
        assert (arc.value, arc.stderr) == (50.0, pytest.approx(3.0))
        assert (gsm8k.value, gsm8k.stderr) == (25.0, pytest.approx(4.0))
        assert (row.average.value, row.average.stderr) == (37.5, pytest.approx(2.5))

    def test_players_in_order(self, run: RunDir) -> None:
        describe(run)
        for player in ("control", "iteration-10", "iteration-2", "sft", "base"):
            put(run, player, "arc_easy")
        assert [row.label for row in table(run).rows] == ["base", "sft", "iteration-2", "iteration-10", "control"]

    def test_what_isnt_measured(self, run: RunDir) -> None:
        """A dash, and no average over fewer tasks."""
        describe(run)
        put(run, "base", "arc_easy")
        put(run, "sft", "arc_easy")
        put(run, "sft", "gsm8k")
        base, sft = table(run).rows
        assert base.scores[1] is None and base.average is None
        assert sft.average is not None
        assert "| base | 50.00 ± 3.00 | – | – |" in table(run).markdown()

    def test_what_isnt_committed_doesnt_count(self, run: RunDir) -> None:
        describe(run)
        put(run, "base", "arc_easy")
        run.record_path("benchmarks/mine/base/arc_easy.json").unlink()
        assert benchmark_tables(run) == [] == benchmark_records(run)

    def test_no_average_where_less_is_better(self, run: RunDir) -> None:
        describe(run)
        put(run, "base", "arc_easy")
        put(run, "base", "gsm8k", higher_is_better={"exact_match": False})
        assert table(run).rows[0].average is None and not table(run).has_average

    def test_all_metrics_where_none_is_chosen(self, run: RunDir) -> None:
        """As lm-eval has them, with a column each, and no average of different things."""
        describe(run, tasks=[{"task": "arc_easy", "title": "ARC"}], percent=False)
        put(run, "base", "arc_easy")
        one = table(run)
        assert one.headings == ["ARC acc", "ARC acc_norm"]
        assert [one.text(score) for score in one.rows[0].scores] == ["0.1250", "0.5000 ± 0.0300"]
        assert not one.has_average

    def test_a_score_that_is_no_number(self, run: RunDir) -> None:
        describe(run)
        put(run, "base", "arc_easy", scores={"acc_norm,none": {"value": None, "stderr": None}})
        assert table(run).rows[0].scores == (None, None)
        assert math.isnan(float(benchmark_records(run)[0]["value"] or "nan"))

    def test_a_try_has_a_table_of_its_own(self, run: RunDir) -> None:
        describe(run)
        describe(run, limit=5)
        put(run, "base", "arc_easy")
        put(run, "sft", "arc_easy", folder=folder_of("mine", 5), examples=5)
        whole, part = benchmark_tables(run)
        assert (whole.limit, part.limit) == (None, 5)
        assert [row.label for row in part.rows] == ["sft"]
        assert "the first 5 examples of each task only" in part.title

    def test_what_was_cut(self, run: RunDir) -> None:
        describe(run)
        put(run, "base", "arc_easy", truncated=True)
        assert "| base | 50.00* ± 3.00 |" in table(run).markdown()
        assert table(run).notes[1].startswith("*: some prompts are longer")


PAPER = {"source": "arXiv 1", "rows": {"Z": {"arc_easy": 60.0, "gsm8k": 30.5}, "A": {"gsm8k": 1.0}}}


class TestPaper:
    def test_its_rows_in_its_order_and_apart(self, run: RunDir) -> None:
        describe(run, paper=PAPER)
        put(run, "base", "arc_easy")
        one = table(run)
        assert [row.label for row in one.rows] == ["base"]
        assert [row.label for row in one.paper] == ["Z", "A"]
        assert one.paper[0].average is None  # gsm8k isn't measured here yet, so it isn't known what is better
        put(run, "base", "gsm8k")
        average = table(run).paper[0].average
        assert average is not None and (average.value, average.stderr) == (45.25, None)
        page = table(run).markdown()
        assert (
            page.index("| base |")
            < page.index("For comparison, arXiv 1:")
            < page.index("| Z | 60.00 | 30.50 | 45.25 |")
        )
        assert "| A | – | 1.00 | – |" in page

    def test_of_the_leaderboard_fits_a_terminal(self, run: RunDir) -> None:
        """80 characters wide, and no heading or score is broken."""
        _, suite = find_suite("open-llm-leaderboard", Catalogue())
        _describe(run, "open-llm-leaderboard", suite, None)
        for player in ("base", "sft", "iteration-0", "iteration-3", "control"):
            for task in suite.tasks:
                assert task.metric is not None
                scores = {task.metric: {"value": 0.6041, "stderr": 0.0143}}
                better = {task.metric.partition(",")[0]: True}
                folder = "benchmarks/open-llm-leaderboard"
                put(run, player, task.name, folder=folder, scores=scores, higher_is_better=better)
        text = shown(table(run))
        assert max(map(len, text.splitlines())) <= 80
        for word in ("TruthfulQA", "Winogrande", "HellaSwag", "iteration-0", "average", "zephyr-7b-sft-full"):
            assert word in text
        assert text.count("± 1.43") == 5 * 6
        assert "for comparison: arXiv 2401.01335v3" in text


def test_names_are_text(run: RunDir) -> None:
    """Neither markup of the terminal's nor cells of Markdown's."""
    describe(run, description="[red]a|b[/red]", tasks=[{"task": "arc_easy", "title": "[bold]A|B"}])
    put(run, "base", "arc_easy")
    assert "[red]a|b[/red]" in shown(table(run), width=200)
    assert "[bold]A|B" in shown(table(run), width=200)
    heading = table(run).markdown().splitlines()[2]
    assert heading == r"|  | [bold]A\|B acc | [bold]A\|B acc_norm |"


def test_records_are_as_lm_eval_has_them(run: RunDir) -> None:
    describe(run)
    put(run, "base", "arc_easy")
    put(run, "base", "gsm8k")
    records = benchmark_records(run)
    assert [(r["task"], r["metric"], r["value"], r["stderr"], r["shots"], r["examples"]) for r in records] == [
        ("arc_easy", "acc,none", 0.125, None, 25, 100),
        ("arc_easy", "acc_norm,none", 0.5, 0.03, 25, 100),
        ("gsm8k", "exact_match,strict-match", 0.25, 0.04, 5, 100),
    ]
    assert {(r["suite"], r["player"]) for r in records} == {("mine", "base")}


class TestOnThePage:
    def test_a_section_with_the_papers_rows_beneath(self, run: RunDir) -> None:
        paper = {"source": "arXiv 1", "rows": {"theirs": {"arc_easy": 60.0, "gsm8k": 30.0}}}
        describe(run, paper=paper)
        for task in ("arc_easy", "gsm8k"):
            put(run, "base", task)
        (section,) = sections(run)
        assert (section.id, section.title) == ("benchmarks", "Benchmarks")
        ours, theirs = section.tables
        assert ours.caption == "mine: two tasks, percent, with standard errors"
        assert ours.headings == ["player", "ARC", "GSM8K", "average"]
        assert ours.rows == [["base", "50.00 ± 3.00", "25.00 ± 4.00", "37.50 ± 2.50"]]
        assert theirs.caption == "mine, for comparison: arXiv 1"
        assert theirs.rows == [["theirs", "60.00", "30.00", "45.00"]]
        assert section.tables[0].notes == ["ARC: 25-shot acc_norm; GSM8K: 5-shot exact_match strict-match."]

    def test_nothing_measured_no_section(self, run: RunDir) -> None:
        describe(run)
        assert sections(run) == []

    def test_among_the_metrics(self, tmp_path: Path) -> None:
        made = MadeRun(tmp_path / "run")
        describe(made.run)
        put(made.run, "base", "arc_easy")
        assert [(m.source, m.player, m.metric, m.value, m.low, m.count) for m in metrics(made.run)] == [
            ("benchmark", "base", "mine/arc_easy/acc,none", 0.125, None, 100),
            ("benchmark", "base", "mine/arc_easy/acc_norm,none", 0.5, pytest.approx(0.5 - 1.96 * 0.03), 100),
        ]

    def test_what_is_broken_is_named(self, run: RunDir) -> None:
        describe(run)
        put(run, "base", "arc_easy")
        (run.path / "benchmarks/mine/base/arc_easy.json").write_text("{")
        with pytest.raises(UserError, match=r"base/arc_easy\.json: not what was committed"):
            sections(run)
        (run.path / "benchmarks/mine/suite.json").write_text('{"tasks": [')
        with pytest.raises(UserError, match=r"mine/suite\.json: not what was committed .*spinlm evaluate .*--repair"):
            sections(run)

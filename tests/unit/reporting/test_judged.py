"""Tables of judged benchmarks, from results that are committed by hand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tiny
from integration import command
from spinlm.config import load_recipe
from spinlm.errors import UserError
from spinlm.files import write_json
from spinlm.reporting.judged import JudgedTable, judged_tables
from spinlm.reporting.metrics import metrics
from spinlm.reporting.sections import sections
from spinlm.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    tiny.write_dataset(tmp_path / "data.jsonl")
    run = RunDir(tmp_path / "run")
    with run.locked():
        run.begin(load_recipe(command.write_recipe(tmp_path / "recipe.yaml")), {})
    return run


def measured(value: float, prompts: int = 10) -> dict[str, float]:
    return {"value": value, "low": value - 0.125, "high": value + 0.125, "prompts": prompts}


def commit(run: RunDir, key: str, players: dict[str, str], result: dict[str, Any]) -> None:
    artifact = run.artifact(key, "benchmark", {"players": players})
    with artifact.staging() as place:
        place.mkdir()
        write_json(place / "result.json", result)


def arena(player: str, other: str, judge: str = "org/judge", **changes: Any) -> dict[str, Any]:
    return {
        "player": player,
        "other": other,
        "judge": judge,
        "questions": "held-out",
        "win_rate": measured(0.75),
        "length_controlled_win_rate": measured(0.5),
        "wins": 6,
        "ties": 3,
        "losses": 1,
        "no_verdict": 0,
        "equal_answers": 0,
        "position_bias": measured(0.25),
        "first_preferred": measured(0.5),
        "length": measured(120.4),
        "other_length": measured(80.0),
        "cut": 0,
        "other_cut": 0,
        **changes,
    }


def test_arena(run: RunDir) -> None:
    commit(run, "benchmarks/arena/iteration-0-vs-sft/x", {}, arena("iteration-0", "sft"))
    weak = arena("iteration-1", "sft", position_bias=None, no_verdict=2, equal_answers=1, cut=3, other_cut=4)
    commit(run, "benchmarks/arena/iteration-1-vs-sft/x", {}, weak)
    assert judged_tables(run) == [
        JudgedTable(
            title="arena: held-out, judged by org/judge",
            headings=["", "win rate", "length-controlled", "won / tied / lost", "orders disagree", "characters"],
            rows=[
                [
                    "iteration-0 against sft",
                    "0.750 [0.625, 0.875]",
                    "0.500 [0.375, 0.625]",
                    "6 / 3 / 1",
                    "0.250 [0.125, 0.375]",
                    "120 / 80",
                ],
                [
                    "iteration-1 against sft",
                    "0.750 [0.625, 0.875]",
                    "0.500 [0.375, 0.625]",
                    "6 / 3 / 1",
                    "–",
                    "120 / 80",
                ],
            ],
            notes=[
                "Ties count half; a question is won where the judge prefers the answer in both orders. 95 % intervals.",
                "iteration-1 against sft: 2 without a verdict, 1 equal answers, not judged, 7 answers cut at the cap.",
            ],
        )
    ]


def test_mt_bench(run: RunDir) -> None:
    for player, categories in (("sft", {"maths": measured(2.0)}), ("iteration-0", {"prose": measured(9.0)})):
        result = {
            "player": player,
            "judge": "org/judge",
            "questions": "mine",
            "grade": measured(5.5),
            "turns": {"1": measured(6.0), "2": measured(5.0)},
            "categories": categories,
            "no_verdict": 0,
            "cut": 0,
        }
        commit(run, f"benchmarks/mt-bench/{player}/x", {}, result)
    (table,) = judged_tables(run)
    assert table.headings == ["", "grade", "turn 1", "turn 2", "prose", "maths"]
    assert table.rows == [
        ["iteration-0", "5.50 [5.38, 5.62]", "6.00 [5.88, 6.12]", "5.00 [4.88, 5.12]", "9.00", "–"],
        ["sft", "5.50 [5.38, 5.62]", "6.00 [5.88, 6.12]", "5.00 [4.88, 5.12]", "–", "2.00"],
    ]


def test_each_judge_and_set_of_questions_has_its_table(run: RunDir) -> None:
    for number, (judge, questions) in enumerate([("a", "one"), ("b", "one"), ("a", "other")]):
        commit(run, f"benchmarks/arena/x-vs-y/{number}", {}, arena("x", "y", judge, questions=questions))
    assert [table.title for table in judged_tables(run)] == [
        "arena: one, judged by a",
        "arena: one, judged by b",
        "arena: other, judged by a",
    ]
    (table,) = judged_tables(run, ["benchmarks/arena/x-vs-y/1"])
    assert table.title == "arena: one, judged by b"


def test_players_that_are_others_now(run: RunDir) -> None:
    """Trained anew, an iteration has the name of one that was judged; what isn't the run's is nobody's name."""
    adapter = run.artifact("iterations/0/adapter", "train", {})
    with adapter.staging() as place:
        place.mkdir()
        (place / "weights").write_text("old")
    commit(run, "benchmarks/arena/one", {"iteration-0": adapter.hash, "base": "any"}, arena("iteration-0", "base"))
    commit(run, "benchmarks/arena/two", {"org/other": "any", "a.jsonl": None}, arena("org/other", "a.jsonl"))  # type: ignore[dict-item]
    assert sum(len(table.rows) for table in judged_tables(run)) == 2
    with adapter.staging() as place:
        place.mkdir()
        (place / "weights").write_text("new")
    (table,) = judged_tables(run)
    assert [row[0] for row in table.rows] == ["org/other against a.jsonl"]


def test_other_questions_of_the_same_name_have_a_table_of_their_own(run: RunDir) -> None:
    """A file that was edited, say: wins on other questions can't be compared."""
    for name, questions, rate in (("one", "hash 1", 0.5), ("two", "hash 2", 0.875)):
        artifact = run.artifact(f"benchmarks/arena/{name}", "benchmark", {"players": {}, "questions": questions})
        with artifact.staging() as place:
            place.mkdir()
            write_json(place / "result.json", arena("iteration-0", "sft", win_rate=measured(rate)))
    tables = judged_tables(run)
    assert [table.rows[0][1] for table in tables] == ["0.500 [0.375, 0.625]", "0.875 [0.750, 1.000]"]
    assert len({table.title for table in tables}) == 2
    found = [metric.metric for metric in metrics(run) if metric.source == "judge"]
    assert len(found) == len(set(found)) == 6


def test_a_run_without_any(run: RunDir) -> None:
    assert judged_tables(run) == []


def test_names_are_shown_as_they_are(run: RunDir) -> None:
    commit(run, "benchmarks/arena/x-vs-y/x", {}, arena("[red]x[/red]", "y", judge="[b]j"))
    (table,) = judged_tables(run)
    console = Console(file=io.StringIO(), width=200)
    console.print(table.rich())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]x[/red] against y" in shown
    assert "judged by [b]j" in shown


def test_on_the_page(run: RunDir) -> None:
    commit(run, "benchmarks/arena/iteration-0-vs-sft/x", {}, arena("iteration-0", "sft"))
    commit(run, "benchmarks/arena/iteration-1-vs-sft/x", {}, arena("iteration-1", "sft", judge="another"))
    (section,) = sections(run)
    assert (section.id, section.title) == ("judged", "Judged answers")
    assert [table.caption for table in section.tables] == [table.title for table in judged_tables(run)]
    assert section.tables[0].rows[0][:2] == ["iteration-0 against sft", "0.750 [0.625, 0.875]"]
    assert [table.notes for table in section.tables] == [table.notes for table in judged_tables(run)]


def test_among_the_metrics(run: RunDir) -> None:
    commit(run, "benchmarks/arena/iteration-0-vs-sft/x", {}, arena("iteration-0", "sft", position_bias=None))
    assert [(m.source, m.player, m.metric, m.value, m.low, m.count) for m in metrics(run)] == [
        ("judge", "iteration-0", "arena/held-out/org/judge/against sft/win_rate", 0.75, 0.625, 10),
        ("judge", "iteration-0", "arena/held-out/org/judge/against sft/length_controlled_win_rate", 0.5, 0.375, 10),
    ]


def test_a_result_that_is_broken_is_named(run: RunDir) -> None:
    commit(run, "benchmarks/arena/iteration-0-vs-sft/x", {}, arena("iteration-0", "sft"))
    (run.path / "benchmarks/arena/iteration-0-vs-sft/x/result.json").write_text("{")
    with pytest.raises(UserError, match=r"x/result\.json: not what was committed"):
        sections(run)

"""The report and the model card, with numbers worked out by hand and texts that would be something else in Markdown."""

import io
from typing import Any

import pytest
from rich.console import Console

from spinlm.reporting.report import Report, Sample, verdict
from spinlm.reporting.summary import Summary


def measured(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "prompts": 10}


MEASURES = {
    "base": {"accuracy_sampled": measured(0.1, 0.0625, 0.2), "real_nll": measured(2.5, 2.0, 3.0)},
    "iteration-0": {
        "accuracy_sampled": measured(0.5, 0.3, 0.7),
        "real_nll": measured(1.25, 1.0, 1.5),
        "discriminability": measured(0.75, 0.5, 1.0),
    },
    "iteration-1": {"accuracy_sampled": measured(0.4004, 0.25, 0.55), "real_nll": measured(12.34, 9.96, 15.0)},
}


def summary(**changes: Any) -> Summary:
    return Summary(
        **{
            "title": "demo",
            "measures": MEASURES,
            "select_by": "accuracy_sampled",
            "best": "iteration-0",
            "differences": {"base": measured(0.4, 0.25, 0.55), "iteration-1": measured(0.0996, -0.1, 0.3)},
            **changes,
        }
    )


def report(*samples: Sample, **changes: Any) -> Report:
    return Report(summary(**changes), samples)


def shown(thing: Any) -> str:
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


class TestMarkdown:
    def test_the_whole_page(self) -> None:
        page = report(Sample("2+2?", "4", {"base": "5\n6", "iteration-0": "4"})).markdown()
        assert page == (
            "# demo\n"
            "\n"
            "Best iteration: iteration-0, by accuracy_sampled: 0.500 [0.300, 0.700].\n"
            "It is better than base (0.100 [0.062, 0.200]) by +0.400 [+0.250, +0.550]: beyond noise.\n"
            "\n"
            "## Held-out measures, with 95 % intervals\n"
            "\n"
            "| player | accuracy, sampled | real NLL a token | reward accuracy |\n"
            "| --- | --- | --- | --- |\n"
            "| base | 0.100 [0.062, 0.200] | 2.50 [2.00, 3.00] | – |\n"
            "| iteration-0 | 0.500 [0.300, 0.700] | 1.25 [1.00, 1.50] | 0.750 [0.500, 1.000] |\n"
            "| iteration-1 | 0.400 [0.250, 0.550] | 12.3 [10.0, 15.0] | – |\n"
            "\n"
            "## Held-out prompt 1\n"
            "\n"
            "**prompt**\n\n```\n2+2?\n```\n\n"
            "**real response**\n\n```\n4\n```\n\n"
            "**base**\n\n```\n5\n6\n```\n\n"
            "**iteration-0**\n\n```\n4\n```\n\n"
        )

    @pytest.mark.parametrize(
        ("text", "fence"),
        [
            ("plain", "```"),
            ("", "```"),
            ("```python\nprint(1)\n```", "````"),
            ("``` and `````", "``````"),
            ("# heading\n| a | b |\n<script>alert(1)</script>\n[red]x[/red] **bold**", "```"),
        ],
    )
    def test_texts_are_shown_as_they_are(self, text: str, fence: str) -> None:
        page = report(Sample(text, text, {"base": text})).markdown()
        assert page.count(f"\n{fence}\n{text}\n{fence}\n") == 3
        assert fence not in text

    def test_nothing_held_out(self) -> None:
        page = report(measures={}, best=None, held_out=0).markdown()
        assert "Nothing was held out, so nothing was measured: the latest iteration is also called the best." in page
        assert "|" not in page


class TestVerdict:
    @pytest.mark.parametrize("held_out", [None, 3])
    def test_nothing_is_measured_yet(self, held_out: int | None) -> None:
        text = verdict(summary(measures={"base": MEASURES["base"]}, best=None, held_out=held_out))
        assert text == "No iteration is measured yet."

    @pytest.mark.parametrize(
        ("change", "select_by", "words"),
        [
            (measured(0.4, 0.25, 0.55), "accuracy_sampled", "better by +0.400 [+0.250, +0.550]: beyond noise."),
            (measured(-0.4, -0.55, -0.25), "accuracy_sampled", "worse by -0.400 [-0.550, -0.250]: beyond noise."),
            (measured(0.1, -0.05, 0.25), "accuracy_sampled", "better by +0.100 [-0.050, +0.250]: within noise."),
            (measured(-1.25, -2.0, -0.5), "real_nll", "better by -1.25 [-2.00, -0.50]: beyond noise."),
            (measured(0.5, 0.0, 1.0), "real_nll", "worse by +0.500 [+0.000, +1.000]: within noise."),
        ],
    )
    def test_the_best_against_where_it_started(self, change: dict[str, float], select_by: str, words: str) -> None:
        lines = verdict(summary(select_by=select_by, differences={"base": change})).splitlines()
        assert lines[0].startswith(f"Best iteration: iteration-0, by {select_by}: ")
        theirs = {"accuracy_sampled": "0.100 [0.062, 0.200]", "real_nll": "2.50 [2.00, 3.00]"}[select_by]
        assert lines[1:] == [f"It is {words.replace(' by', f' than base ({theirs}) by')}"]

    def test_no_difference(self) -> None:
        text = verdict(summary(differences={"base": measured(0.0, -0.1, 0.2)}))
        assert text.splitlines()[1:] == ["It is equal to base."]

    def test_every_other_player_but_the_iterations(self) -> None:
        measures = {**MEASURES, "sft": MEASURES["base"], "control": MEASURES["iteration-1"]}
        differences = dict.fromkeys(["base", "sft", "iteration-1", "control"], measured(-1.25, -2.0, -0.5))
        text = verdict(summary(measures=measures, select_by="real_nll", differences=differences))
        assert text.splitlines() == [
            "Best iteration: iteration-0, by real_nll: 1.25 [1.00, 1.50].",
            "It is better than base (2.50 [2.00, 3.00]) by -1.25 [-2.00, -0.50]: beyond noise.",
            "It is better than sft (2.50 [2.00, 3.00]) by -1.25 [-2.00, -0.50]: beyond noise.",
            "It is better than control (12.3 [10.0, 15.0]) by -1.25 [-2.00, -0.50]: beyond noise.",
        ]


def test_the_table_has_a_column_for_each_player() -> None:
    lines = [line.split() for line in shown(report().table()).splitlines()[1:] if line.strip(" ─")]
    assert lines == [
        ["base", "iteration", "0", "iteration", "1"],
        ["accuracy,", "sampled", "0.1", "0.5", "0.4"],
        ["0.06–0.20", "0.30–0.70", "0.25–0.55"],
        ["real", "NLL", "a", "token", "2.5", "1.25", "12.3"],
        ["2–3", "1–1.5", "10–15"],
        ["reward", "accuracy", "–", "0.75", "–"],
        ["0.50–1"],
    ]


def test_more_players_than_fit_a_terminal_go_below() -> None:
    players = ["base", "sft", *(f"iteration-{t}" for t in range(4)), "control"]
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    console.print(report(measures=dict.fromkeys(players, MEASURES["iteration-0"])).table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    first, second = text.split("control")
    assert (first.count("iteration"), second.count("iteration")) == (4, 0)
    assert (first.count("0.30–0.70"), second.count("0.30–0.70")) == (6, 1)
    assert "…" not in text


def test_the_tables_title_is_shown_as_it_is() -> None:
    assert "my[red]run: held-out measures" in shown(report(title="my[red]run").table())

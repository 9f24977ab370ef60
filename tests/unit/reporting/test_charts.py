"""The charts: valid Vega-Lite, whose numbers are those of the run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import altair as alt
import pytest

from made_run import plausible
from spinlm.reporting.charts import (
    POINTS,
    Chart,
    curves,
    differences_chart,
    distributions,
    overlaid_curves,
    overlaid_training,
    supervised_curves,
    thinned,
    training_curves,
)
from spinlm.reporting.summary import Summary, summarise


def measured(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "prompts": 10}


MEASURES = {
    "base": {"real_nll": measured(3.0, 2.9, 3.1)},
    "sft": {"real_nll": measured(2.0, 1.9, 2.1)},
    "iteration-0": {"real_nll": measured(1.5, 1.4, 1.6), "drift": measured(0.1, 0.0, 0.2)},
    "iteration-1": {"real_nll": measured(1.25, 1.2, 1.3), "drift": measured(0.2, 0.1, 0.3)},
    "control": {"real_nll": measured(1.75, 1.7, 1.8)},
}
DIFFERENCES = {
    name: measured(-1.0, -1.5, -0.5 if name != "iteration-0" else 0.5) for name in MEASURES if name != "iteration-1"
}
SUMMARY = Summary("run", MEASURES, "real_nll", "iteration-1", DIFFERENCES, held_out=10)
LOGS = {
    "iteration-0": [{"step": 0, "start_loss": 0.69}, {"step": 1, "loss": 0.7, "margin": 0.0}, {"step": 2, "loss": 0.5}],
    "iteration-1": [{"step": 1, "loss": 0.6, "margin": 0.1}, {"step": 2, "loss": 0.4, "margin": math.inf}],
}


def data(chart: Chart, name: str, *fields: str) -> list[Any]:
    rows = [tuple(row[field] for field in fields) for row in chart.spec["datasets"][name]]
    return [row[0] for row in rows] if len(fields) == 1 else rows


def layers(chart: Chart) -> list[str]:
    return [layer["data"]["name"] for layer in chart.spec["layer"]]


class TestCurves:
    def test_a_chart_for_each_measure_that_iterations_have(self) -> None:
        assert [chart.title for chart in curves(SUMMARY)] == ["Real NLL a token", "Drift, nats a token"]
        assert curves(Summary("run", {"base": MEASURES["base"]}, "real_nll", None, {})) == []

    def test_from_the_start_over_the_iterations_with_the_others_as_lines(self) -> None:
        nll, drift = curves(SUMMARY)
        assert data(nll, "path", "x", "value", "low", "high") == [
            ("start", 2.0, 1.9, 2.1),
            ("0", 1.5, 1.4, 1.6),
            ("1", 1.25, 1.2, 1.3),
        ]
        assert data(nll, "best", "player") == ["iteration-1"]
        assert data(nll, "base", "value") == [3.0]
        assert data(nll, "control", "value") == [1.75]
        assert data(drift, "path", "x") == ["0", "1"]

    def test_what_there_is_none_of_has_no_layer(self) -> None:
        nll, drift = curves(SUMMARY)
        assert set(layers(nll)) == {"base", "control", "path", "best"}
        assert set(layers(drift)) == {"path", "best"}

    def test_in_words(self) -> None:
        assert curves(SUMMARY)[1].description == (
            "Drift, nats a token: iteration-0: 0.100 [0.000, 0.200]; iteration-1: 0.200 [0.100, 0.300]"
        )

    def test_without_sft_the_base_is_the_start_and_no_line(self) -> None:
        measures = {name: MEASURES[name] for name in ("base", "iteration-0")}
        (nll, _) = curves(Summary("run", measures, "real_nll", "iteration-0", {}))
        assert data(nll, "path", "player") == ["base", "iteration-0"]
        assert data(nll, "base", "value") == []


def test_what_is_not_finite_is_not_drawn_but_said() -> None:
    """As of a player that has diverged."""
    diverged = measured(math.nan, math.nan, math.nan)
    measures = {**MEASURES, "iteration-0": {"real_nll": diverged}, "control": {"real_nll": diverged}}
    summary = Summary("run", measures, "real_nll", "iteration-1", {**DIFFERENCES, "iteration-0": diverged})
    (nll, _) = curves(summary)
    assert data(nll, "path", "player") == ["sft", "iteration-1"]
    assert data(nll, "control", "player") == []
    assert "iteration-0: nan" in nll.description
    assert data(differences_chart(summary), "players", "player") == ["base", "sft", "control"]
    assert data(overlaid_curves({"a": summary})[0], "path", "player") == ["sft", "iteration-1"]


def test_the_differences_say_what_they_come_to() -> None:
    chart = differences_chart(SUMMARY)
    assert chart.title == "iteration-1 minus the other: real NLL a token (lower is better)"
    assert data(chart, "players", "player", "value", "says") == [
        ("base", -1.0, "better, beyond noise"),
        ("sft", -1.0, "better, beyond noise"),
        ("iteration-0", -1.0, "better, within noise"),
        ("control", -1.0, "better, beyond noise"),
    ]


class TestTraining:
    def test_iterations_one_after_another(self) -> None:
        charts = {chart.title: chart for chart in training_curves(LOGS)}
        assert list(charts) == ["Loss", "Margin"]
        assert data(charts["Loss"], "log", "x", "step", "player", "value") == [
            (1, 1, "iteration-0", 0.7),
            (2, 2, "iteration-0", 0.5),
            (3, 1, "iteration-1", 0.6),
            (4, 2, "iteration-1", 0.4),
        ]
        assert data(charts["Loss"], "starts", "x", "name") == [(0, "iteration-0"), (2, "iteration-1")]
        assert charts["Loss"].description == "Loss: over 4 steps, loss from 0.7 to 0.4"

    def test_what_is_not_finite_is_left_out(self) -> None:
        margin = training_curves(LOGS)[1]
        assert data(margin, "log", "x", "value") == [(1, 0.0), (3, 0.1)]

    def test_long_curves_are_averaged(self) -> None:
        rows = [{"step": step, "loss": float(step)} for step in range(1, 11)]
        assert thinned(rows, "loss", 10) == rows
        assert thinned(rows, "loss", 5) == [{"step": 2 * n, "loss": 2 * n - 0.5} for n in range(1, 6)]
        assert thinned(rows, "loss", 3)[-1] == {"step": 10, "loss": 9.0}
        log = [{"step": step, "loss": 1.0} for step in range(1, 5001)]
        (loss,) = training_curves({"iteration-0": log, "iteration-1": log})
        assert len(loss.spec["datasets"]["log"]) == POINTS
        assert loss.spec["datasets"]["log"][-1]["x"] == 10000

    def test_a_curve_of_a_single_row_has_a_mark(self) -> None:
        """A line through one point can't be seen."""
        log = {"iteration-0": [{"step": 1, "loss": 0.7}], "iteration-1": LOGS["iteration-1"]}
        (loss, _) = training_curves(log)
        assert data(loss, "alone", "player", "value") == [("iteration-0", 0.7)]
        (loss, _) = overlaid_training({"a": log, "b": {"iteration-1": [{"step": 3, "loss": 0.5}]}})
        assert data(loss, "alone", "run", "player") == [("a", "iteration-0"), ("b", "iteration-1")]
        assert "alone" not in layers(training_curves({"iteration-1": LOGS["iteration-1"]})[0])

    def test_supervised_trainings_have_a_chart_each(self) -> None:
        charts = supervised_curves({"sft": [{"step": 1, "loss": 2.0}], "control": [{"step": 1, "loss": 1.0}]})
        assert [chart.title for chart in charts] == ["Loss of sft", "Loss of control"]


class TestDistributions:
    def test_shares_in_bins_of_own_and_real(self) -> None:
        """31 values from 0 to 30: a bin for each, but for the last two, which share one."""
        values = [float(value) for value in range(31)]
        chart = distributions("Length", {"base": values, "sft": [0.0] * 3}, {"base": [30.0]})
        own, real = chart.spec["datasets"]["own"], chart.spec["datasets"]["real"]
        assert {row["player"] for row in real} == {"base"}
        tops = [row["top"] for row in own if row["player"] == "sft"]
        assert tops[0] == pytest.approx(-1 + 0.85)
        assert tops[1:] == [-1] * 30
        assert [row["foot"] for row in own if row["player"] == "sft"] == [-1] * 31
        assert [row["top"] for row in real][-2:] == pytest.approx([0.85, 0.85])
        assert chart.description == "Length: base: median 15, real 30; sft: median 0"

    def test_the_same_value_everywhere(self) -> None:
        (first, *others) = distributions("x", {"base": [5.0, 5.0]}, {}).spec["datasets"]["own"]
        assert (first["x"], first["top"]) == (5.0, 0.85)
        assert {row["top"] for row in others} == {0.0}

    def test_values_far_out_are_in_the_outermost_bin(self) -> None:
        chart = distributions("x", {"base": [*([1.0] * 500), *([2.0] * 500), 1e9]}, {})
        assert max(row["x"] for row in chart.spec["datasets"]["own"]) == 2.0

    def test_zero_is_marked_where_it_is_within(self) -> None:
        assert "zero" in layers(distributions("margin", {"iteration-0": [-1.0, 1.0]}, {}))
        assert "zero" not in layers(distributions("margin", {"iteration-0": [1.0, 2.0]}, {}))


class TestSeveralRuns:
    def test_curves(self) -> None:
        other = Summary("b", {"base": MEASURES["base"], "iteration-0": MEASURES["iteration-0"]}, "real_nll", None, {})
        nll = overlaid_curves({"a": SUMMARY, "b": other})[0]
        assert data(nll, "path", "run", "x", "value") == [
            ("a", "start", 2.0),
            ("a", "0", 1.5),
            ("a", "1", 1.25),
            ("b", "start", 3.0),
            ("b", "0", 1.5),
        ]

    def test_training(self) -> None:
        loss, margin = overlaid_training({"a": LOGS, "b": {"iteration-0": LOGS["iteration-1"]}})
        assert data(loss, "path", "run", "x", "value")[-3:] == [("a", 4, 0.4), ("b", 1, 0.6), ("b", 2, 0.4)]
        assert margin.description == "Margin: a ends at 0.1; b ends at 0.1"


def test_all_are_valid_vega_lite(tmp_path: Path) -> None:
    from spinlm.reporting.training_log import committed_log

    made = plausible(tmp_path, examples=6, iterations=2, words=5, steps=4)
    summary = summarise(made.run)
    logs = {player: committed_log(made.run, player) for player in ("iteration-0", "iteration-1")}
    values = {"base": [1.0, 2.0], "sft": [3.0]}
    charts = [
        differences_chart(summary),
        *curves(summary),
        *training_curves(logs),
        *supervised_curves({"sft": committed_log(made.run, "sft")}),
        distributions("Length", values, values),
        *overlaid_curves({"a": summary, "b": summary}),
        *overlaid_training({"a": logs, "b": logs}),
    ]
    assert len(charts) == 1 + 8 + 6 + 1 + 1 + 8 + 6
    for chart in charts:
        alt.LayerChart.from_dict(chart.spec, validate=True)

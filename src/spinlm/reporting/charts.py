"""The charts of the report page, as Vega-Lite specifications.

Colours are the page's CSS variables, so that a chart follows the page's theme. Colour never says anything alone:
series also differ by dash and mark. Charts are as wide as their place on the page.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ParamSpec, cast

import altair as alt
import numpy as np
from altair.utils.schemapi import debug_mode

from spinlm.reporting.report import COLUMNS, heading, with_interval
from spinlm.reporting.summary import Summary, Values, is_iteration
from spinlm.reporting.tables import outcome_words
from spinlm.reporting.training_log import Row

HEIGHT = 170
POINTS = 600
"""Of a training curve, over all iterations together; more are averaged in equal runs of steps."""
BINS = 30
DOTTED, DASHED, DASH_DOTTED = [1, 3], [6, 3], [8, 3, 2, 3]
DASHES = [[1, 0], DASHED, DOTTED, DASH_DOTTED, [12, 4], [3, 2], [1, 0], DASHED]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "stroke", "triangle-left"]
STYLES = 8
"""Of lines that several runs can be told apart by."""

PLACES = alt.Axis(labelAngle=0, labelSeparation=1)
"""Upright, and so close that 0 has room beside start."""

Record = dict[str, Any]
Drawing = alt.LayerChart | alt.FacetChart


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: What it shows.
        description: The same in words, for those who don't see it.
        spec: The Vega-Lite specification.
    """

    title: str
    description: str
    spec: Record


Layers = ParamSpec("Layers")


def _specification(layers: Callable[Layers, Drawing]) -> Callable[Layers, Record]:
    """A chart as JSON, without its data, made once for the same arguments.

    altair checks and copies all that it is given at each step, data too: so it isn't given any, and doesn't check.
    """

    @lru_cache(maxsize=64)
    def specification(*arguments: Layers.args, **named: Layers.kwargs) -> Record:
        with debug_mode(False):
            spec = dict(layers(*arguments, **named).properties(width="container").to_dict(validate=False))
        del spec["config"]  # the page has its own
        return spec

    return cast("Callable[Layers, Record]", specification)


def differences_chart(summary: Summary) -> Chart:
    """The best minus each other player, by the measure that chose it, beside 0."""
    rows = [
        {"player": other, **_ends(change), "says": outcome_words(summary, other), "text": with_interval(change, True)}
        for other, change in summary.differences.items()
    ]
    drawn = [row for row in rows if math.isfinite(row["value"])]
    better = "higher" if summary.higher_is_better else "lower"
    title = f"{summary.best} minus the other: {COLUMNS[summary.select_by]} ({better} is better)"
    words = "; ".join(f"{row['player']}: {row['text']}, {row['says']}" for row in rows)
    data = {"players": drawn, "zero": [{"value": 0}]}
    return _chart(title, words, _differences_layers(), data, height=36 * len(rows) + 10)


@_specification
def _differences_layers() -> Drawing:
    y = alt.Y("player:N", sort=None, title=None)
    tooltip = [_tip("player:N"), _tip("text:N", "difference"), _tip("says:N", "the best is")]
    zero = _of("zero").mark_rule(color="var(--muted)").encode(x=alt.X("value:Q"))
    bars = _of("players").mark_rule(strokeWidth=3, color="var(--series-1)")
    points = _of("players").mark_point(filled=True, size=90, opacity=1, color="var(--series-1)")
    return alt.layer(
        zero,
        bars.encode(
            x=alt.X("low:Q", title=None, axis=alt.Axis(tickCount=6), scale=alt.Scale(padding=8)),
            x2=alt.X2("high:Q"),
            y=y,
            tooltip=tooltip,
        ),
        points.encode(x=alt.X("value:Q"), y=y, tooltip=tooltip),
    )


def curves(summary: Summary) -> list[Chart]:
    """Each held-out measure over the iterations, with the base and the control as lines."""
    played = [name for name in summary.measures if is_iteration(name)]
    if not played:
        return []
    path = [*([summary.start] if summary.start else []), *played]
    return [
        _curve(summary, name, path) for name in COLUMNS if any(name in summary.measures[player] for player in played)
    ]


def _curve(summary: Summary, name: str, path: Sequence[str]) -> Chart:
    measured = {player: of_player[name] for player, of_player in summary.measures.items() if name in of_player}
    rows = {
        player: {"x": _place(player), "player": player, **_ends(values), "text": with_interval(values)}
        for player, values in measured.items()
        if math.isfinite(values["value"])
    }
    data = {
        "path": [rows[player] for player in path if player in rows],
        "best": [row for player, row in rows.items() if player == summary.best],
        "base": [row for player, row in rows.items() if player == "base" and player not in path],
        "control": [row for player, row in rows.items() if player == "control"],
    }
    words = "; ".join(f"{player}: {with_interval(values)}" for player, values in measured.items())
    return _chart(heading(name), words, _curve_layers(tuple(_place(player) for player in path)), data)


@_specification
def _curve_layers(places: tuple[str, ...]) -> Drawing:
    x = alt.X("x:N", scale=alt.Scale(domain=list(places)), title="iteration", axis=PLACES)
    y, color = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)), "var(--series-1)"
    tooltip = [_tip("player:N"), _tip("text:N", "value")]
    points = _of("path").mark_point(filled=True, opacity=1, size=70, color=color)
    best = _of("best").mark_point(filled=True, opacity=1, size=220, shape="diamond", color=color)
    return alt.layer(
        _of("base").mark_rule(strokeDash=DOTTED, strokeWidth=2.5, color="var(--base)").encode(y=y, tooltip=tooltip),
        _of("control")
        .mark_rule(strokeDash=DASH_DOTTED, strokeWidth=2, color="var(--control)")
        .encode(y=y, tooltip=tooltip),
        _of("path").mark_rule(strokeWidth=2, color=color).encode(x=x, y=alt.Y("low:Q"), y2=alt.Y2("high:Q")),
        _of("path").mark_line(strokeWidth=2, color=color).encode(x=x, y=y),
        points.encode(x=x, y=y, tooltip=tooltip),
        best.encode(x=x, y=y, tooltip=tooltip),
    )


def overlaid_curves(summaries: Mapping[str, Summary]) -> list[Chart]:
    """Each held-out measure over the iterations of several runs, by the runs' names."""
    played = {run: [s.start, *filter(is_iteration, s.measures)] for run, s in summaries.items()}
    longest = max(played.values(), key=len)
    places = ("start", *(str(t) for t in range(len(longest) - 1)))
    charts = []
    for name in COLUMNS:
        rows = [
            {"x": _place(player), "run": run, "player": player, **_ends(values), "text": with_interval(values)}
            for run, players in played.items()
            for player in players
            if player is not None and (values := summaries[run].measures[player].get(name))
            if math.isfinite(values["value"])
        ]
        if rows:
            words = "; ".join(f"{row['run']}, {row['player']}: {row['text']}" for row in rows)
            charts.append(_chart(heading(name), words, _overlaid_layers(tuple(summaries), places), {"path": rows}))
    return charts


OVERLAID = (
    ("Loss", "loss"),
    ("Margin", "margin"),
    ("Reward accuracy", "reward_accuracy"),
    ("Log-prob a token, real", "logprob_per_token_real"),
    ("Log-prob a token, synthetic", "logprob_per_token_synthetic"),
    ("Gradient norm", "grad_norm"),
)
"""The curves of several runs, and their names in the log."""


def overlaid_training(logs: Mapping[str, Mapping[str, Sequence[Row]]]) -> list[Chart]:
    """What the iterations of several runs logged, each run's one after another."""
    charts = []
    for title, name in OVERLAID:
        rows = [
            {"x": start + row["step"], "run": run, "player": player, "value": row[name]}
            for run, of_run in logs.items()
            for player, start in _starts(of_run).items()
            for row in thinned(of_run[player], name, max(1, POINTS // len(of_run)))
        ]
        if rows:
            words = "; ".join(
                f"{run} ends at {[row['value'] for row in rows if row['run'] == run][-1]:.4g}"
                for run in dict.fromkeys(row["run"] for row in rows)
            )
            data = {"path": rows, "alone": _alone(rows, "run")}
            charts.append(_chart(title, words, _overlaid_layers(tuple(logs), ()), data))
    return charts


@_specification
def _overlaid_layers(runs: tuple[str, ...], places: tuple[str, ...]) -> Drawing:
    """A line for each run: over places with a mark and an interval at each, or where there are none over steps."""
    names, colors = list(runs), [f"var(--run-{n + 1})" for n in range(STYLES)]
    color = alt.Color("run:N", legend=None, scale=alt.Scale(domain=names, range=colors))
    dash = alt.StrokeDash("run:N", legend=None, scale=alt.Scale(domain=names, range=DASHES))
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))
    shape = alt.Shape("run:N", legend=None, scale=alt.Scale(domain=names, range=SHAPES))
    lines = _of("path").mark_line(strokeWidth=2)
    if not places:
        x = alt.X("x:Q", title="optimiser step", axis=alt.Axis(tickMinStep=1, tickCount=6))
        tooltip = [_tip("run:N"), _tip("player:N"), _tip("x:Q", "step"), _tip("value:Q", format=".4g")]
        points = _of("path").mark_point(filled=True, size=60, opacity=0)
        detail = alt.Detail("player:N")
        alone = _of("alone").mark_point(filled=True, size=60, opacity=1)
        return alt.layer(
            lines.encode(x=x, y=y, color=color, strokeDash=dash, detail=detail),
            alone.encode(x=x, y=y, color=color, shape=shape),
            points.encode(x=x, y=y, tooltip=tooltip),
        )
    band = alt.Scale(domain=list(places), paddingInner=0.7, paddingOuter=0.35)
    across = alt.X("x:N", scale=band, title="iteration", axis=PLACES)
    beside = alt.XOffset("run:N", scale=alt.Scale(domain=names))
    tooltip = [_tip("run:N"), _tip("player:N"), _tip("text:N", "value")]
    bars = _of("path").mark_rule(strokeWidth=1.5)
    points = _of("path").mark_point(filled=True, size=70, opacity=1)
    return alt.layer(
        bars.encode(x=across, xOffset=beside, y=alt.Y("low:Q"), y2=alt.Y2("high:Q"), color=color),
        lines.encode(x=across, xOffset=beside, y=y, color=color, strokeDash=dash),
        points.encode(x=across, xOffset=beside, y=y, color=color, shape=shape, tooltip=tooltip),
    )


def _place(player: str) -> str:
    return player.removeprefix("iteration-") if is_iteration(player) else "start"


@dataclass(frozen=True)
class _Panel:
    """Curves of a training: their names in its log by what they are called, and a line for orientation."""

    title: str
    names: Mapping[str, str]
    line: float | None = None


_PANELS = (
    _Panel("Loss", {"loss": "loss"}),
    _Panel("Margin", {"margin": "margin"}, line=0.0),
    _Panel("Reward accuracy", {"reward accuracy": "reward_accuracy"}, line=0.5),
    _Panel("Log-prob a token", {"real": "logprob_per_token_real", "synthetic": "logprob_per_token_synthetic"}),
    _Panel("Response tokens", {"real": "length_real", "synthetic": "length_synthetic"}),
    _Panel("Gradient norm", {"gradient norm": "grad_norm"}),
)


def training_curves(logs: Mapping[str, Sequence[Row]]) -> list[Chart]:
    """What the iterations' trainings logged, one after another on one axis of steps.

    Args:
        logs: Each main player's log, in the order of play.
    """
    starts = _starts(logs)
    return [chart for panel in _PANELS if (chart := _training_chart(panel, logs, starts)) is not None]


def _starts(logs: Mapping[str, Sequence[Row]]) -> dict[str, int]:
    """The step that each training begins at, if they are counted on from one to the next."""
    starts, steps = {}, 0
    for player, log in logs.items():
        starts[player], steps = steps, steps + log[-1]["step"]
    return starts


def supervised_curves(logs: Mapping[str, Sequence[Row]]) -> list[Chart]:
    """The losses of the SFT stage and of the control, each from its own first step."""
    charts = [
        _training_chart(_Panel(f"Loss of {player}", {"loss": "loss"}), {player: log}, {player: 0})
        for player, log in logs.items()
    ]
    return [chart for chart in charts if chart is not None]


def _training_chart(panel: _Panel, logs: Mapping[str, Sequence[Row]], starts: Mapping[str, int]) -> Chart | None:
    rows = [
        {"x": starts[player] + row["step"], "player": player, "step": row["step"], "of": of, "value": row[name]}
        for player, log in logs.items()
        for of, name in panel.names.items()
        for row in thinned(log, name, max(1, POINTS // len(logs)))
    ]
    if not rows:
        return None
    words = "; ".join(
        f"{of} from {values[0]:.4g} to {values[-1]:.4g}"
        for of in panel.names
        if (values := [row["value"] for row in rows if row["of"] == of])
    )
    data = {
        "log": rows,
        "alone": _alone(rows, "of"),
        "line": [] if panel.line is None else [{"value": panel.line}],
        "starts": [{"x": start, "name": _short(player, starts)} for player, start in starts.items() if len(starts) > 1],
    }
    return _chart(panel.title, f"over {rows[-1]['x']} steps, {words}", _training_layers(tuple(panel.names)), data)


@_specification
def _training_layers(names: tuple[str, ...]) -> Drawing:
    scale = alt.Scale(domain=list(names), range=["var(--series-1)", "var(--series-2)"][: len(names)])
    dashes = alt.Scale(domain=list(names), range=[[1, 0], DASHED][: len(names)])
    legend = alt.Legend(title=None, orient="top", symbolType="stroke") if len(names) > 1 else None
    x = alt.X("x:Q", title="optimiser step", axis=alt.Axis(tickMinStep=1, tickCount=6))
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))
    tooltip = [_tip("player:N"), _tip("step:Q"), _tip("of:N", " "), _tip("value:Q", format=".4g")]
    color = alt.Color("of:N", scale=scale, legend=legend)
    shape = alt.Shape("of:N", legend=legend, scale=alt.Scale(domain=list(names), range=SHAPES[: len(names)]))
    label = _of("starts").mark_text(align="left", baseline="bottom", fontSize=11, color="var(--muted)")
    return alt.layer(
        _of("line").mark_rule(strokeDash=DOTTED, color="var(--muted)").encode(y=alt.Y("value:Q")),
        _of("starts").mark_rule(color="var(--line)").encode(x=alt.X("x:Q")),
        label.encode(x=alt.X("x:Q"), y=alt.value(-2), text=alt.Text("name:N")),
        _of("log")
        .mark_line(strokeWidth=1.75)
        .encode(
            x=x,
            y=y,
            color=color,
            strokeDash=alt.StrokeDash("of:N", scale=dashes, legend=legend),
            detail=alt.Detail("player:N"),
        ),
        _of("alone").mark_point(filled=True, size=60, opacity=1).encode(x=x, y=y, color=color, shape=shape),
        _of("log").mark_point(filled=True, size=60, opacity=0).encode(x=x, y=y, tooltip=tooltip),
    )


def _alone(rows: Sequence[Record], of: str) -> list[Record]:
    """The rows that are all there is of a player's curve: there is no line through a single one."""
    counts = Counter((row[of], row["player"]) for row in rows)
    return [row for row in rows if counts[row[of], row["player"]] == 1]


def _short(player: str, players: Collection[str]) -> str:
    """A name that there is room for."""
    return player if len(players) <= 4 else player.removeprefix("iteration-")


def thinned(log: Sequence[Row], name: str, limit: int) -> list[Row]:
    """A curve of at most `limit` rows of step and value: each the mean of as many, at the step of the last.

    What isn't finite (the gradient norm of a step that fp16 skips) is left out.
    """
    rows = [row for row in log if math.isfinite(row.get(name, math.nan))]
    if len(rows) <= limit:
        return [{"step": row["step"], name: _rounded(row[name])} for row in rows]
    return [
        {"step": rows[places[-1]]["step"], name: _rounded(np.mean([rows[place][name] for place in places]))}
        for places in np.array_split(np.arange(len(rows)), limit)
    ]


def distributions(title: str, own: Mapping[str, Sequence[float]], real: Mapping[str, Sequence[float]]) -> Chart:
    """A row for each player: how the values of its own responses are spread, and those of the real ones.

    Args:
        title: What is spread.
        own: Each player's values.
        real: The same of the real responses, for each player; may lack some or all.
    """
    players = [player for player in own if len(own[player])]
    edges = _edges([*own.values(), *real.values()])
    data: dict[str, list[Record]] = {"own": [], "real": [], "zero": [{"x": 0}] if edges[0] < 0 < edges[-1] else []}
    for place, player in enumerate(players):
        shares = {"own": _shares(own[player], edges), "real": _shares(real.get(player, ()), edges)}
        highest = max(float(values.max()) for values in shares.values())
        for of, values in shares.items():
            tops = np.append(values, values[-1]) / highest * 0.85 - place
            data[of] += [
                {"x": _rounded(x), "top": round(float(top), 4), "foot": -place, "player": player}
                for x, top in zip(edges, tops, strict=True)
                if values.any()
            ]
    words = "; ".join(
        f"{player}: median {np.median(own[player]):.4g}"
        + (f", real {np.median(real[player]):.4g}" if len(real.get(player, ())) else "")
        for player in players
    )
    ends = (float(edges[0]), float(edges[-1]))
    return _chart(title, words, _distribution_layers(tuple(players), ends), data, height=46 * len(players) + 12)


@_specification
def _distribution_layers(players: tuple[str, ...], ends: tuple[float, float]) -> Drawing:
    feet = [-place for place in range(len(players))]
    labels = f"[{', '.join(repr(player) for player in players)}][round(-datum.value)]"
    x = alt.X("x:Q", title=None, scale=alt.Scale(domain=list(ends), nice=False), axis=alt.Axis(tickCount=6))
    y = alt.Y(
        "top:Q",
        title=None,
        scale=alt.Scale(domain=[-len(players) + 0.9, 0.95]),
        axis=alt.Axis(values=feet, labelExpr=labels),
    )
    detail = alt.Detail("player:N")
    zero = _of("zero").mark_rule(strokeDash=DOTTED, color="var(--muted)").encode(x=x)
    areas = _of("own").mark_area(interpolate="step-after", opacity=0.45, color="var(--series-2)")
    lines = _of("real").mark_line(
        interpolate="step-after", strokeWidth=1.75, strokeDash=[4, 2], color="var(--series-1)"
    )
    return alt.layer(
        zero, areas.encode(x=x, y=y, y2=alt.Y2("foot:Q"), detail=detail), lines.encode(x=x, y=y, detail=detail)
    )


def _edges(values: Sequence[Sequence[float]]) -> np.ndarray:
    """Of the bins, over all but the outermost hundredth of the values."""
    low, high = np.percentile(np.concatenate([np.asarray(some, dtype=float) for some in values]), (0.5, 99.5))
    return np.linspace(low, high if high > low else low + 1, BINS + 1)


def _shares(values: Sequence[float], edges: np.ndarray) -> np.ndarray:
    """How much of the values is in each bin; those beyond the ends are in the outermost."""
    if not len(values):
        return np.zeros(len(edges) - 1)
    return np.asarray(np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values))


def _rounded(value: float) -> float:
    """To as much as can be seen."""
    return float(f"{value:.5g}")


def _ends(values: Values) -> Record:
    return {name: values[name] for name in ("value", "low", "high")}


def _tip(field: str, title: str = "", format: str = "") -> alt.Tooltip:
    return alt.Tooltip(field, title=title or field.partition(":")[0], format=format)


def _of(dataset: str) -> alt.Chart:
    return alt.Chart(alt.NamedData(name=dataset))


def _chart(
    title: str, words: str, specification: Record, data: Mapping[str, list[Record]], height: int = HEIGHT
) -> Chart:
    layers = [layer for layer in specification["layer"] if data[layer["data"]["name"]]]  # an empty one has no scale
    spec = {**specification, "layer": layers, "height": height, "datasets": data}
    return Chart(title, f"{title}: {words}", spec)

"""report.html: one self-contained page about a run, or about several. It loads nothing and opens from a file."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

import vl_convert
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from spinlm.config import Recipe
from spinlm.errors import first_line
from spinlm.evaluation.measures import HeldOutExample
from spinlm.files import digest
from spinlm.reporting.browser import browser
from spinlm.reporting.charts import Chart, curves, differences_chart, distributions, supervised_curves, training_curves
from spinlm.reporting.diagnostics import diagnostics, stopped
from spinlm.reporting.escape import json_for_script, plain, visible, with_code
from spinlm.reporting.metrics import write_metrics
from spinlm.reporting.sections import sections
from spinlm.reporting.status import besides, status
from spinlm.reporting.summary import Summary, is_iteration, read_examples, summarise
from spinlm.reporting.tables import (
    Table,
    differences_table,
    measures_table,
    numbers_table,
    quantiles_table,
    stages_table,
)
from spinlm.reporting.training_log import log_so_far, trained_players
from spinlm.reporting.verdict import State, verdict_of
from spinlm.rundir import RunDir

FILE = "report.html"
REFRESH_SECONDS = 15
"""A page of a run that is going on reloads itself so often."""
SERVED_REFRESH_SECONDS = 60
"""And a page that is served, of a run that isn't going on: it may go on again."""
PAGE_BYTES = 5_000_000
"""A page is no larger: examples get what the rest leaves."""
FRAME_BYTES = 10_000
"""Of what is around them."""
ROWS_SHOWN = 30
"""Of each training, in the table beside its curves."""


@dataclass(frozen=True)
class Figure:
    """Charts that belong together, and the tables that say the same."""

    charts: Sequence[Chart]
    tables: Sequence[Table]


def write(run: RunDir, running: bool = False) -> Path:
    """Write report.html and metrics.jsonl anew, from what is committed.

    Args:
        run: The run.
        running: Whether it is going on.

    Raises:
        UserError: There is no run, or something in it isn't what was committed.
    """
    write_metrics(run)
    return run.put(FILE, page(run, running))


def page(run: RunDir, running: bool = False, served: bool = False) -> str:
    """The page of a run; see `write`.

    Args:
        run: The run.
        running: Whether it is going on.
        served: Whether the page is made anew when it is loaded again.
    """
    recipe, summary, stages = run.recipe(), summarise(run), status(run)
    found, left = diagnostics(run, recipe), [stage.name for stage in stages if not stage.is_done]
    state: State = "running" if running else "unfinished" if left else "finished"
    examples = {player: read_examples(run, player) for player in summary.measures}
    context = {
        "title": summary.title,
        "state": state,
        "done": len(stages) - len(left),
        "total": len(stages),
        "written": None if state == "finished" else datetime.now(UTC),
        "refresh_seconds": REFRESH_SECONDS if running else SERVED_REFRESH_SECONDS if served else None,
        "summary": summary,
        "verdict": verdict_of(summary, run.path, state, left),
        "stopped": stopped(run),
        "differences": _differences(summary),
        "measures": measures_table(summary.measures, "player", summary.best) if summary.measures else None,
        "curves": Figure(curves(summary), []),
        "training": _training(run, recipe),
        "distributions": _distributions(examples),
        "diagnostics": found,
        "diagnostics_table": numbers_table("Diagnostics", {name: each.values for name, each in found.items()}),
        "sections": sections(run),
        "stages": stages_table([*stages, *besides(run)]),
        "facts": _facts(run, recipe),
        "recipe": yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        "artifacts": _artifacts(run),
    }
    template = "report.html.jinja"
    without_library = render(template, **context, browser=None, library="").encode()
    room = PAGE_BYTES - FRAME_BYTES - len(without_library) - len(plotting_library().encode())
    return render(template, **context, browser=browser(run, summary, examples, room))


class LivePage:
    """The page of a run that is going on, written anew as often as it is worth: 2 % of the time at most.

    A page that can't be written never stops a run: that is said, and the run goes on.
    """

    SECONDS_BETWEEN = 5.0
    TIMES_ITS_COST = 50.0

    def __init__(self, run: RunDir, say: Callable[[str], None], writes: bool = True) -> None:
        """
        Args:
            run: The run.
            say: Where it is said that the page can't be written.
            writes: Whether it is this process, of several, that writes it.
        """
        self._run = run
        self._say = say
        self._writes = writes
        self._due = 0.0
        self._shown = run.keys()
        self._says_running = False

    def update(self, now: bool = False) -> None:
        """Something has been committed.

        Args:
            now: Don't wait until it is worth it.
        """
        if now or time.monotonic() >= self._due:
            self._write(running=True)

    def conclude(self) -> bool:
        """All is done; says whether the page could be written."""
        return self._write(running=False)

    def end(self) -> None:
        """The run ends here, done or interrupted: the page shows all of it, and says no longer that it is going on."""
        if self._says_running or self._shown != self._run.keys():
            self._write(running=False)

    def _write(self, running: bool) -> bool:
        if not self._writes:
            return False
        started, written = time.monotonic(), False
        try:
            shown = self._run.keys()
            write(self._run, running)
            self._shown, self._says_running, written = shown, running, True
        except Exception as error:
            self._say(f"{self._run.path / FILE}: not written: {type(error).__name__}: {first_line(error)}")
        ended = time.monotonic()
        self._due = ended + max(self.SECONDS_BETWEEN, self.TIMES_ITS_COST * (ended - started))
        return written


# --- what is on it ---


def _training(run: RunDir, recipe: Recipe) -> list[Figure]:
    logs = {player: log for player in trained_players(recipe) if (log := log_so_far(run, player))}
    played = {player: log for player, log in logs.items() if is_iteration(player)}
    supervised = {player: log for player, log in logs.items() if not is_iteration(player)}
    figures = [
        Figure(training_curves(played), [_log_table(player, log) for player, log in played.items()]),
        Figure(supervised_curves(supervised), [_log_table(player, log) for player, log in supervised.items()]),
    ]
    return [figure for figure in figures if figure.charts]


def _log_table(player: str, log: Sequence[Mapping[str, Any]]) -> Table:
    """Some rows of a log, its last one among them."""
    names = [
        name
        for name in (
            "loss",
            "margin",
            "reward_accuracy",
            "logprob_per_token_real",
            "logprob_per_token_synthetic",
            "grad_norm",
            "learning_rate",
        )
        if any(name in row for row in log)
    ]
    logged = [row for row in log if "loss" in row]
    every = -(-len(logged) // ROWS_SHOWN) if logged else 1
    rows = [
        [str(row["step"]), *(f"{row[name]:.4g}" if name in row else "–" for name in names)]
        for row in reversed(logged[::-1][::every])
    ]
    return Table(f"Training of {player}", ["step", *(name.replace("_", " ") for name in names)], rows)


def _differences(summary: Summary) -> Figure | None:
    return Figure([differences_chart(summary)], [differences_table(summary)]) if summary.differences else None


def _distributions(examples: Mapping[str, Sequence[HeldOutExample]]) -> Figure | None:
    if not examples:
        return None
    each = partial(_finite_values, examples)
    lengths = each(lambda e: [float(answer.tokens) for answer in e.sampled])
    real_lengths = each(lambda e: [float(e.real_tokens)])
    own = each(lambda e: [answer.logprob / answer.tokens for answer in e.sampled if answer.tokens])
    real = each(lambda e: [e.real_logprob / e.real_tokens])
    margins = {player: values for player, values in each(lambda e: e.margins).items() if values}
    charts = [distributions("Response length, tokens", lengths, real_lengths)]
    if any(own.values()):
        charts.append(distributions("Log-prob a token, nats", own, real))
    tables = [
        quantiles_table("Response length, tokens", {"real": next(iter(real_lengths.values())), **lengths}),
        quantiles_table("Log-prob a token of a player's own responses", own),
        quantiles_table("Log-prob a token of the real responses", real),
    ]
    if margins:
        charts.append(distributions("Margin of the real response over a fresh one of the opponent", margins, {}))
        tables.append(quantiles_table("Margin", margins))
    return Figure(charts, tables)


def _finite_values(
    examples: Mapping[str, Sequence[HeldOutExample]], of: Callable[[HeldOutExample], Sequence[float]]
) -> dict[str, list[float]]:
    """Each player's; one that has diverged may have none."""
    return {
        player: [value for example in of_player for value in of(example) if isfinite(value)]
        for player, of_player in examples.items()
    }


def _facts(run: RunDir, recipe: Recipe) -> list[tuple[str, str]]:
    header = run.header()
    facts = [("base model", recipe.model.name), ("dataset", recipe.data.source), ("seed", str(recipe.seed))]
    facts += [(f"commit of the {what}", commit) for what, commit in run.origin().items()]
    if run.has_record("data"):
        made_from: Mapping[str, str] = run.record("data")["inputs"].get("files") or {}
        facts += [(f"SHA-256 of {name or 'the dataset'}", value) for name, value in made_from.items()]
    if run.has_record("layout.json"):
        layout = run.committed_json("layout.json")
        facts.append(("layout", " – ".join(filter(None, (layout["layout"], layout["reason"])))))
    if engine := run.recorded_input("engine"):
        facts.append(("generation engine", str(engine)))
    if header["forked_from"]:
        facts.append(("forked from", str(header["forked_from"])))
    return [*facts, *((f"version of {name}", str(number)) for name, number in header["versions"].items())]


def _artifacts(run: RunDir) -> Table:
    """What is committed; shards that lie together in one row, under the hash that their users record."""
    hashes: dict[str, list[str]] = defaultdict(list)
    stages: dict[str, str] = {}
    for record in run.records():
        key = re.sub(r"/\d{5}\.jsonl$", "/*.jsonl", record["key"])
        hashes[key].append(record["hash"])
        stages[key] = record["stage"]
    rows = [
        [key, stages[key], str(len(found)), digest(found) if key.endswith("*.jsonl") else found[0]]
        for key, found in hashes.items()
    ]
    return Table("Artifacts", ["artifact", "stage", "files", "SHA-256"], rows)


# --- how it is put together ---


@lru_cache(maxsize=1)
def plotting_library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script; takes about a second."""
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("\r\n", "\n")


@lru_cache(maxsize=1)
def _own_script() -> str:
    return _asset("report.js")


def content_security_policy() -> str:
    """Nothing is loaded, sent or run but the page's own two scripts, known by their hashes."""
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in (plotting_library(), _own_script()))
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def render(template: str, **context: Any) -> str:
    """A page of the package's templates, with all that it needs in it."""
    return (
        _environment()
        .get_template(template)
        .render(
            {"library": Markup(plotting_library()), **context},
            policy=content_security_policy(),
            script=Markup(_own_script()),
            style=Markup(_asset("report.css")),
        )
    )


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """Whatever a template puts out is made harmless and visible, unless it is markup of our own."""
    environment = Environment(
        loader=PackageLoader("spinlm.reporting", "page"),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = plain
    environment.filters["with_code"] = with_code
    environment.filters["on_two_lines"] = _on_two_lines
    environment.filters["json"] = lambda value: Markup(json_for_script(value))
    return environment


def _on_two_lines(cell: str) -> tuple[str, str]:
    """A cell's value, and its interval or error, where it has one."""
    at = min((found for mark in (" [", " ±") if (found := cell.find(mark)) > 0), default=len(cell))
    return cell[:at], cell[at:].strip()


def _asset(name: str) -> str:
    return (files("spinlm.reporting") / "page" / name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

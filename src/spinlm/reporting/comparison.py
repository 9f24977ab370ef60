"""Several runs on one page: whose best iteration is better, and what was done differently."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from spinlm.config import Recipe
from spinlm.errors import UserError
from spinlm.evaluation.measures import HIGHER_IS_BETTER, HeldOutExample, difference, select_best, unpaired_difference
from spinlm.files import write_text
from spinlm.reporting.charts import OVERLAID, STYLES, differences_chart, overlaid_curves, overlaid_training
from spinlm.reporting.escape import plain
from spinlm.reporting.html import Figure, render
from spinlm.reporting.report import COLUMNS, with_interval
from spinlm.reporting.summary import Outcome, Summary, Values, is_iteration, read_examples, summarise
from spinlm.reporting.tables import Table, beside_table, measures_table, outcome_words
from spinlm.reporting.training_log import Row, committed_log, trained_players
from spinlm.rundir import RunDir

FILE = "comparison.html"


@dataclass(frozen=True)
class Side:
    """One of the runs that are compared.

    Attributes:
        name: What it is called on the page.
        run: Its directory.
        summary: What it has come to.
    """

    name: str
    run: RunDir
    summary: Summary

    @cached_property
    def recipe(self) -> Recipe:
        return self.run.recipe()

    def measured(self, measure: str) -> dict[str, Mapping[str, Values]]:
        """Its iterations that have a measure."""
        return {
            name: of_player
            for name, of_player in self.summary.measures.items()
            if is_iteration(name) and measure in of_player
        }

    def best(self, measure: str) -> str:
        """Its best iteration by a measure."""
        return select_best(self.measured(measure), measure)

    def value(self, measure: str) -> Values:
        """Of that iteration."""
        return self.summary.measures[self.best(measure)][measure]

    def examples(self, measure: str) -> list[HeldOutExample]:
        """What that iteration makes of each held-out example."""
        return read_examples(self.run, self.best(measure))

    def prompts(self) -> dict[str, tuple[str, str]]:
        """The held-out prompts and their real responses by their ids."""
        return {row["id"]: (row["prompt"], row["real"]) for row in self.run.committed_rows("data", "held_out.jsonl")}

    def logs(self) -> dict[str, list[Row]]:
        """What its iterations' trainings logged."""
        players = [player for player in trained_players(self.recipe) if is_iteration(player)]
        return {player: log for player in players if (log := committed_log(self.run, player))}


@dataclass(frozen=True)
class Contest:
    """The runs' best iterations beside each other.

    Attributes:
        measure: By which.
        sides: The runs that have it, the best first.
        differences: The best run's iteration minus each other run's, by the run's name.
        notes: What to mind.
    """

    measure: str
    sides: Sequence[Side]
    differences: Mapping[str, Values]
    notes: Sequence[str]

    def outcome(self, name: str) -> Outcome:
        return Outcome.of(self.differences[name], HIGHER_IS_BETTER[self.measure])


def write_comparison(runs: Sequence[RunDir], out: Path) -> Path:
    """Write the page that compares runs.

    Raises:
        UserError: One of them is no run or isn't what was committed, or there is nothing to compare them by.
    """
    page = comparison(runs)
    try:
        write_text(out, page)
    except OSError as error:
        raise UserError(f"{out}: can't be written: {error.strerror}") from None
    return out


def comparison(runs: Sequence[RunDir]) -> str:
    """The page; see `write_comparison`."""
    if len(runs) > STYLES:
        raise UserError(f"{len(runs)} runs are too many to be told apart on one page: give {STYLES} at most")
    sides = [Side(name, run, summarise(run)) for name, run in zip(_names(runs), runs, strict=True)]
    found = contest(sides)
    tone, headline = _headline(found)
    as_summary = _as_summary(found)
    logs = {side.name: side.logs() for side in sides}
    return render(
        "comparison.html.jinja",
        title=" against ".join(side.name for side in sides),
        names=[side.name for side in sides],
        tone=tone,
        headline=headline,
        reasons=[*_reasons(found), *_gains(sides)],
        notes=found.notes,
        differences=Figure([differences_chart(as_summary)], [_differences_table(found)]),
        measures=_measures(sides, everybody=False),
        curves=Figure(overlaid_curves({side.name: side.summary for side in sides}), [_measures(sides, everybody=True)]),
        training=Figure(overlaid_training(logs), [_last_logged(logs)]),
        recipes=[(sides[0].name, side.name, sides[0].recipe.differences(side.recipe)) for side in sides[1:]],
    )


def contest(sides: Sequence[Side]) -> Contest:
    """Compare runs by the measure that chooses the first one's best.

    Raises:
        UserError: Fewer than two of them have that measure.
    """
    measure = sides[0].summary.select_by
    having = [side for side in sides if side.measured(measure)]
    if len(having) < 2:
        raise UserError(
            f"{sides[0].run.path}: its best iteration is chosen by {measure}, which "
            f"{' and '.join(side.name for side in sides if side not in having)} hasn't measured for any iteration yet: "
            "there is nothing to compare by"
        )
    sign = 1 if HIGHER_IS_BETTER[measure] else -1
    chosen = [f"{side.name} (of {count})" for side in having if (count := len(side.measured(measure))) > 1]
    having.sort(key=lambda side: -sign * side.value(measure)["value"])
    notes = [f"{side.name} has no iteration measured by {measure}." for side in sides if side not in having]
    if others := {side.summary.select_by for side in having} - {measure}:
        notes.append(
            f"Runs choose their best by different measures ({', '.join(sorted({measure, *others}))}): here all are "
            f"compared by {measure}, that of {sides[0].name}."
        )
    first, differences = having[0], {}
    for other in having[1:]:
        differences[other.name], said = _difference(first, other, measure)
        notes += said
    if chosen:
        notes.append(
            f"The best iteration of {_and(chosen)} was chosen by the same prompts, which flatters it a little: the "
            "more iterations, the more."
        )
    return Contest(measure, having, differences, list(dict.fromkeys(notes)))


def _difference(one: Side, other: Side, measure: str) -> tuple[Values, list[str]]:
    """Prompt by prompt, where both answer the same ones."""
    mine, theirs, notes = one.examples(measure), other.examples(measure), []
    if one.prompts() != other.prompts():
        note = (
            f"{one.name} and {other.name} hold out different examples: they are compared by their averages, not prompt "
            "by prompt, and the interval is wider. Some of the difference may be that of the prompts."
        )
        return asdict(unpaired_difference(mine, theirs, measure)), [note]
    by_id = {example.id: example for example in theirs}
    theirs = [by_id[example.id] for example in mine]
    if any(a.real_tokens != b.real_tokens for a, b in zip(mine, theirs, strict=True)):
        notes.append(
            f"{one.name} and {other.name} split the same responses into different tokens: what is measured a token "
            "(NLL, drift, lengths, repetition) can't be compared between them."
        )
    return asdict(difference(mine, theirs, measure)), notes


def _headline(found: Contest) -> tuple[str, str]:
    first, *others = found.sides
    beaten = [side.name for side in others if _is_beaten(found, side.name)]
    if len(beaten) == len(others):
        return "good", f"{first.name} is better than {_and(beaten)}, beyond noise."
    if beaten:
        return "unsure", f"{first.name} measures best, but only better than {_and(beaten)} beyond noise."
    return "unsure", f"{first.name} measures best, but within noise."


def _is_beaten(found: Contest, name: str) -> bool:
    outcome = found.outcome(name)
    return outcome.word == "better" and outcome.beyond_noise


def _reasons(found: Contest) -> list[str]:
    label, better = COLUMNS[found.measure], "higher" if HIGHER_IS_BETTER[found.measure] else "lower"
    first, *others = found.sides
    reasons = []
    for other in others:
        outcome = found.outcome(other.name)
        noise = "beyond" if outcome.beyond_noise else "within"
        reasons.append(
            f"{first.name}, {first.best(found.measure)}: {with_interval(first.value(found.measure))}; {other.name}, "
            f"{other.best(found.measure)}: {with_interval(other.value(found.measure))} ({label}, {better} is better). "
            f"The difference is {with_interval(found.differences[other.name], signed=True)}: {noise} noise."
        )
    return reasons


def _gains(sides: Sequence[Side]) -> list[str]:
    """Whether each run has beaten its own start, by the measure that chooses its best."""
    return [
        f"{side.name}, {best}, beside {start}, where its self-play started ({COLUMNS[side.summary.select_by]}): "
        f"{outcome_words(side.summary, start)}, by {with_interval(side.summary.differences[start], signed=True)}."
        for side in sides
        if (best := side.summary.best) is not None and (start := side.summary.start) is not None
    ]


def _as_summary(found: Contest) -> Summary:
    """For the chart: the runs as if they were players of one."""
    measures = {side.name: {found.measure: side.value(found.measure)} for side in found.sides}
    return Summary("", measures, found.measure, found.sides[0].name, found.differences)


def _differences_table(found: Contest) -> Table:
    first = found.sides[0].name
    caption = f"{first}'s best iteration minus that of each other run"
    return beside_table(_as_summary(found), caption, "run", f"{first} is")


def _measures(sides: Sequence[Side], everybody: bool) -> Table:
    """Where each run started, its best iteration and its control; or everybody in it."""
    measured = {
        f"{side.name}: {player}": side.summary.measures[player]
        for side in sides
        for player in side.summary.measures
        if everybody or player in (side.summary.start, side.summary.best, "control")
    }
    return measures_table(measured, "run and player")


def _last_logged(logs: Mapping[str, Mapping[str, Sequence[Row]]]) -> Table:
    """What each iteration's training logged last."""
    last = {f"{run}: {player}": log[-1] for run, of_run in logs.items() for player, log in of_run.items()}
    names = [name for _, name in OVERLAID if any(name in row for row in last.values())]
    rows = [[who, *(f"{row[name]:.4g}" if name in row else "–" for name in names)] for who, row in last.items()]
    return Table("Logged last", ["run and iteration", *(name.replace("_", " ") for name in names)], rows)


def _names(runs: Sequence[RunDir]) -> list[str]:
    """The directories' names; where two have the same, as much of their paths as tells them apart."""
    paths = [run.path.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise UserError("the same run is given twice: there is nothing to compare")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        common = Path(os.path.commonpath(paths))
        names = [str(path.relative_to(common)) for path in paths]
    return [plain(name) for name in names]


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

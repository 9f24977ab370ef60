"""What a run has come to: every measured player, and the best beside the others; read from the run directory alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from spinlm.config import Recipe
from spinlm.evaluation.measures import HIGHER_IS_BETTER, HeldOutExample, chosen_measure, difference, select_best
from spinlm.reporting.diagnostics import diagnostics
from spinlm.rundir import RunDir

Values = Mapping[str, float]
"""A measure's value, low, high and prompts."""


Word = Literal["better", "worse", "equal"]


@dataclass(frozen=True)
class Outcome:
    """What the difference between two players says.

    Attributes:
        word: Which way it goes.
        beyond_noise: Whether all of its interval goes there.
    """

    word: Word
    beyond_noise: bool

    @classmethod
    def of(cls, change: Values, higher_is_better: bool) -> Outcome:
        """The difference's own interval decides: the players answer the same prompts."""
        if change["value"] == 0:
            return cls("equal", beyond_noise=False)
        beyond_noise = change["low"] > 0 or change["high"] < 0
        return cls("better" if (change["value"] > 0) is higher_is_better else "worse", beyond_noise)


@dataclass(frozen=True)
class Summary:
    """The held-out measures of a run, as far as it has got.

    Attributes:
        title: The run's name.
        measures: Of each player that is measured, by name, in the order of play: measure to its values.
        select_by: The measure that names the best iteration.
        best: The best iteration's player; None where no iteration is measured.
        differences: The best minus each other player, by `select_by`, prompt by prompt. Their intervals allow for its
            having been chosen among the iterations.
        held_out: How many examples are held out; None while the data aren't prepared.
        skipped: How many steps of a player's training were skipped for a NaN or an infinity, where some were.
    """

    title: str
    measures: Mapping[str, Mapping[str, Values]]
    select_by: str
    best: str | None
    differences: Mapping[str, Values]
    held_out: int | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def higher_is_better(self) -> bool:
        return HIGHER_IS_BETTER[self.select_by]

    @property
    def start(self) -> str | None:
        """The player that self-play started from; None before it is measured."""
        return next((name for name in ("sft", "base") if name in self.measures), None)

    def outcome(self, other: str) -> Outcome:
        """What the best is beside another player."""
        return Outcome.of(self.differences[other], self.higher_is_better)


def summarise(run: RunDir) -> Summary:
    """The summary of a run.

    Raises:
        UserError: There is no run, or something in it isn't what was committed.
    """
    recipe = run.recipe()
    held_out = len(run.committed_rows("data", "held_out.jsonl")) if run.has_record("data") else None
    names = measured_players(run, recipe) if held_out else []
    measures = {name: run.committed_json(f"evaluation/{name}/measures.json") for name in names}
    select_by = chosen_measure(recipe.evaluation.select_by, next(iter(measures.values()), {}))
    iterations = {name: of_player for name, of_player in measures.items() if is_iteration(name)}
    best = select_best(iterations, select_by) if iterations else None
    differences = _differences(run, measures, best, select_by)
    found = {name: of_player.values.get("skipped_nonfinite", 0) for name, of_player in diagnostics(run, recipe).items()}
    skipped = {name: int(count) for name, count in found.items() if count}
    return Summary(run.path.resolve().name, measures, select_by, best, differences, held_out, skipped)


def beside_the_others(run: RunDir, summary: Summary, player: str) -> Summary:
    """The same summary with another player in the place of the best: the differences are that player's.

    Raises:
        UserError: Something in the run isn't what was committed.
    """
    if player not in summary.measures:
        return summary
    differences = _differences(run, summary.measures, player, summary.select_by)
    return replace(summary, best=player, differences=differences)


def player_names(recipe: Recipe) -> list[str]:
    """Everybody who is measured in a run, in the order of play."""
    names = ["base", *(["sft"] if recipe.sft is not None else [])]
    names += [f"iteration-{t}" for t in range(recipe.iterations)]
    return [*names, *(["control"] if recipe.evaluation.control else [])]


def measured_players(run: RunDir, recipe: Recipe) -> list[str]:
    """Those of them whose measures are committed."""
    return [name for name in player_names(recipe) if run.has_record(f"evaluation/{name}/measures.json")]


def is_iteration(name: str) -> bool:
    """Whether a player is an iteration's main player."""
    return name.startswith("iteration-")


def iteration_of(name: str) -> int:
    """The number of a main player's iteration."""
    return int(name.removeprefix("iteration-"))


def read_examples(run: RunDir, player: str) -> list[HeldOutExample]:
    """What a player makes of each held-out example."""
    return [HeldOutExample.of(row) for row in run.committed_rows(f"evaluation/{player}/examples.jsonl")]


def _differences(run: RunDir, names: Iterable[str], best: str | None, by: str) -> dict[str, Values]:
    if best is None:
        return {}
    mine = read_examples(run, best)
    others = {name: read_examples(run, name) for name in names if name != best}
    played = sum(map(is_iteration, names))
    return {name: asdict(difference(mine, theirs, by, choices=max(1, played))) for name, theirs in others.items()}

"""What a run has come to: every measured player, and the best beside the others; read from the run directory alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spinlm.config import Recipe
from spinlm.evaluation.measures import HIGHER_IS_BETTER, HeldOutExample, chosen_measure, difference, select_best
from spinlm.rundir import RunDir, read_json, read_jsonl

Values = Mapping[str, float]
"""A measure's value, low, high and prompts."""


@dataclass(frozen=True)
class Summary:
    """The held-out measures of a run, as far as it has got.

    Attributes:
        title: The run's name.
        measures: Of each player that is measured, by name, in the order of play: measure to its values.
        select_by: The measure that names the best iteration.
        best: The best iteration's player; None where no iteration is measured.
        differences: The best minus each other player, by `select_by`, prompt by prompt.
    """

    title: str
    measures: Mapping[str, Mapping[str, Values]]
    select_by: str
    best: str | None
    differences: Mapping[str, Values]

    @property
    def higher_is_better(self) -> bool:
        return HIGHER_IS_BETTER[self.select_by]


def summarise(run: RunDir) -> Summary:
    """The summary of a run.

    Raises:
        UserError: There is no run.
    """
    recipe = run.recipe()
    measures = {
        name: read_json(run.path / f"evaluation/{name}/measures.json")
        for name in player_names(recipe)
        if run.has_record(f"evaluation/{name}/measures.json")
    }
    measures = {name: of_player for name, of_player in measures.items() if of_player}
    select_by = chosen_measure(recipe.evaluation.select_by, next(iter(measures.values()), {}))
    iterations = {name: of_player for name, of_player in measures.items() if is_iteration(name)}
    best = select_best(iterations, select_by) if iterations else None
    return Summary(run.path.name, measures, select_by, best, _differences(run, measures, best, select_by))


def player_names(recipe: Recipe) -> list[str]:
    """Everybody who is measured in a run, in the order of play."""
    names = ["base", *(["sft"] if recipe.sft is not None else [])]
    names += [f"iteration-{t}" for t in range(recipe.iterations)]
    return [*names, *(["control"] if recipe.evaluation.control else [])]


def is_iteration(name: str) -> bool:
    """Whether a player is an iteration's main player."""
    return name.startswith("iteration-")


def iteration_of(name: str) -> int:
    """The number of a main player's iteration."""
    return int(name.removeprefix("iteration-"))


def held_out_examples(run: RunDir, player: str) -> list[HeldOutExample]:
    """What a player makes of each held-out example."""
    return [HeldOutExample.of(row) for row in read_jsonl(run.path / f"evaluation/{player}/examples.jsonl")]


def _differences(run: RunDir, names: Sequence[str] | Mapping[str, Any], best: str | None, by: str) -> dict[str, Values]:
    if best is None:
        return {}
    mine = held_out_examples(run, best)
    others = {name: held_out_examples(run, name) for name in names if name != best}
    return {name: asdict(difference(mine, theirs, by)) for name, theirs in others.items()}

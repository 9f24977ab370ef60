"""The end of a run for people: a table of held-out measures, a few responses, and what the numbers allow to say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

COLUMNS = {
    "accuracy_sampled": "accuracy, sampled",
    "accuracy_greedy": "accuracy, greedy",
    "real_nll": "real NLL a token",
    "truncation_rate": "cut at the cap",
    "repetition_rate": "repeated 4-grams",
    "length_sampled": "response tokens",
    "discriminability": "reward accuracy",
}
"""The measures shown, in order, and their headings."""


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, the real response, and each player's sampled one by name."""

    prompt: str
    real: str
    responses: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """What there is to say about a run.

    Attributes:
        title: The run's name.
        measures: Of each player, by name, in order: measure to value, low, high, prompts.
        select_by: The measure that chose.
        best: The best iteration's player; None where nothing was held out.
        samples: A few held-out prompts.
        higher_is_better: Whether more of `select_by` is better.
    """

    title: str
    measures: Mapping[str, Mapping[str, Mapping[str, float]]]
    select_by: str
    best: str | None
    samples: Sequence[Sample]
    higher_is_better: bool = True

    def table(self) -> Table:
        """For the terminal: a column for each player, the best in bold; five of them fit 80 characters."""
        table = Table(title=f"{escape(self.title)}: held-out measures, with 95 % intervals", box=SIMPLE_HEAD, padding=0)
        table.add_column("", no_wrap=True)
        for player in self.measures:
            style = "bold" if player == self.best else ""
            table.add_column(player, justify="right", no_wrap=True, style=style, header_style=style)
        for name in self._shown():
            table.add_row(COLUMNS[name], *(_on_two_lines(self.measures[player].get(name)) for player in self.measures))
        return table

    def markdown(self) -> str:
        """`report.md`."""
        shown = self._shown()
        lines = [f"# {self.title}", "", self.verdict(), "", "## Held-out measures, with 95 % intervals", ""]
        lines += [_row(["player", *(COLUMNS[name] for name in shown)]), _row(["---"] * (len(shown) + 1))]
        lines += [_row([player, *(self._cell(player, name) for name in shown)]) for player in self.measures]
        for number, sample in enumerate(self.samples, start=1):
            lines += ["", f"## Held-out prompt {number}", "", *_quoted("prompt", sample.prompt)]
            lines += _quoted("real response", sample.real)
            for player, response in sample.responses.items():
                lines += _quoted(player, response)
        return "\n".join(lines) + "\n"

    def verdict(self) -> str:
        """Which iteration, by which measure, and whether it is beyond noise."""
        if self.best is None:
            return "Nothing was held out, so nothing was measured: the latest iteration is also called the best."
        best = self.measures[self.best][self.select_by]
        lines = [f"Best iteration: {self.best}, by {self.select_by}: {_with_interval(best)}."]
        iterations = [name for name in self.measures if name.startswith("iteration-")]
        for other in self.measures:
            if other not in iterations:
                lines.append(self._compared_with(other, best))
        return "\n".join(lines)

    def _compared_with(self, other: str, best: Mapping[str, float]) -> str:
        theirs = self.measures[other][self.select_by]
        sign = 1 if self.higher_is_better else -1
        ahead = sign * (best["value"] - theirs["value"])
        apart = best["low"] > theirs["high"] or best["high"] < theirs["low"]
        word = "better than" if ahead > 0 else "worse than" if ahead < 0 else "equal to"
        noise = "the intervals are apart" if apart else "the intervals overlap, so this may be noise"
        return f"It is {word} {other} ({_with_interval(theirs)}): {noise}." if ahead else f"It is equal to {other}."

    def _shown(self) -> list[str]:
        return [name for name in COLUMNS if any(name in measures for measures in self.measures.values())]

    def _cell(self, player: str, name: str) -> str:
        measured = self.measures[player].get(name)
        return _with_interval(measured) if measured else "–"


def _on_two_lines(measured: Mapping[str, float] | None) -> str:
    if measured is None:
        return "–"
    low, high = (f"{end:.2f}" if abs(end) < 1 else f"{end:.2g}" for end in (measured["low"], measured["high"]))
    return f"{measured['value']:.3g}\n{low}–{high}"


def _with_interval(measured: Mapping[str, float]) -> str:
    digits = 1 if measured["value"] >= 10 else 2 if measured["value"] >= 1 else 3
    return f"{measured['value']:.{digits}f} [{measured['low']:.{digits}f}, {measured['high']:.{digits}f}]"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _quoted(title: str, text: str) -> list[str]:
    """Text of models and data, where nothing in it is read as Markdown."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"**{title}**", "", fence, text, fence, ""]


def model_card(name: str, report: Mapping[str, Any], base: str, merged: bool) -> str:
    """The README of an exported model.

    Args:
        name: The exported player.
        report: `recipe`, `measures` (of the player) and `versions`.
        base: The base model's name.
        merged: Whether the adapter is merged into the base.
    """
    training, kind = report["recipe"]["training"], "merged model" if merged else "adapter"
    rows = [_row([COLUMNS[key], _with_interval(value)]) for key, value in report["measures"].items() if key in COLUMNS]
    front = ["---", f"base_model: {json.dumps(base)}", "library_name: " + ("transformers" if merged else "peft")]
    return "\n".join(
        [
            *front,
            "tags: [spin, self-play, spinlm]",
            "---",
            "",
            f"# {name}",
            "",
            f"A {kind} trained from `{base}` by SPIN, Self-Play Fine-Tuning (arXiv 2401.01335), with spinlm "
            f"{report['versions'].get('spinlm', '')}.",
            "",
            f"Dataset: `{report['recipe']['data']['source']}`. Loss: {training['loss']}, beta {training['beta']}, "
            f"learning rate {training['learning_rate']}, seed {report['recipe']['seed']}.",
            "",
            "## Held-out measures, with 95 % intervals",
            "",
            _row(["measure", "value"]),
            _row(["---", "---"]),
            *rows,
            "",
            "## Limits",
            "",
            "Measured on a held-out part of the same dataset only. Self-play learns to imitate the dataset's "
            "responses, its mistakes included; nothing here makes the model safer than its base.",
            "",
        ]
    )

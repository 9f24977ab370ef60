"""The end of a run for people: a table of held-out measures, a few responses, what the numbers allow to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from spinlm.reporting.summary import Summary, Values, is_iteration

COLUMNS = {
    "accuracy_sampled": "accuracy, sampled",
    "accuracy_greedy": "accuracy, greedy",
    "real_nll": "real NLL a token",
    "truncation_rate": "cut at the cap",
    "repetition_rate": "repeated 4-grams",
    "length_sampled": "response tokens",
    "discriminability": "reward accuracy",
    "drift": "drift, nats a token",
}
"""The measures shown, in order, and their headings."""


def heading(measure: str) -> str:
    """A measure's, with a capital."""
    return COLUMNS[measure][0].upper() + COLUMNS[measure][1:]


PLAYERS_ABREAST = 6


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
        summary: Its measures.
        samples: A few held-out prompts.
    """

    summary: Summary
    samples: Sequence[Sample]

    def table(self) -> Group:
        """For the terminal: a column for each player, the best in bold; six fit 80 characters, and more go below."""
        players = list(self.summary.measures)
        title = f"{escape(self.summary.title)}: held-out measures, with 95 % intervals"
        return Group(
            *(
                self._table(players[at : at + PLAYERS_ABREAST], "" if at else title)
                for at in range(0, len(players), PLAYERS_ABREAST)
            )
        )

    def _table(self, players: Sequence[str], title: str) -> Table:
        table = Table(title=title or None, box=SIMPLE_HEAD, padding=0)
        table.add_column("")
        for player in players:
            style = "bold" if player == self.summary.best else ""
            table.add_column(player.replace("-", " "), justify="right", style=style, header_style=style)
        for name in self._shown():
            cells = [_on_two_lines(self.summary.measures[player].get(name)) for player in players]
            table.add_row(COLUMNS[name], *cells)
        return table

    def markdown(self) -> str:
        """`report.md`."""
        lines = [f"# {self.summary.title}", "", verdict(self.summary)]
        if shown := self._shown():
            lines += ["", "## Held-out measures, with 95 % intervals", ""]
            lines += [
                markdown_row(["player", *(COLUMNS[name] for name in shown)]),
                markdown_row(["---"] * (len(shown) + 1)),
            ]
            lines += [
                markdown_row([player, *(_cell(of_player.get(name)) for name in shown)])
                for player, of_player in self.summary.measures.items()
            ]
        if self.summary.skipped:
            lines += ["", "## Skipped steps", "", "Their loss or gradient was NaN or infinite:", ""]
            lines += [f"- {player}: {count}" for player, count in self.summary.skipped.items()]
        for number, sample in enumerate(self.samples, start=1):
            lines += ["", f"## Held-out prompt {number}", "", *_quoted("prompt", sample.prompt)]
            lines += _quoted("real response", sample.real)
            for player, response in sample.responses.items():
                lines += _quoted(player, response)
        return "\n".join(lines) + "\n"

    def _shown(self) -> list[str]:
        return [name for name in COLUMNS if any(name in of_player for of_player in self.summary.measures.values())]


def verdict(summary: Summary) -> str:
    """Which iteration, by which measure, and whether it is beyond noise."""
    if summary.held_out == 0:
        return "Nothing was held out, so nothing was measured: the latest iteration is also called the best."
    if summary.best is None:
        return "No iteration is measured yet."
    best = summary.measures[summary.best][summary.select_by]
    lines = [f"Best iteration: {summary.best}, by {summary.select_by}: {with_interval(best)}."]
    lines += [compared_with(other, summary) for other in summary.measures if not is_iteration(other)]
    return "\n".join(lines)


def compared_with(other: str, summary: Summary) -> str:
    """The best beside another player, by the measure that chose it, in a sentence."""
    outcome = summary.outcome(other)
    if outcome.word == "equal":
        return f"It is equal to {other}."
    noise = "beyond noise" if outcome.beyond_noise else "within noise"
    theirs = with_interval(summary.measures[other][summary.select_by])
    change = with_interval(summary.differences[other], signed=True)
    return f"It is {outcome.word} than {other} ({theirs}) by {change}: {noise}."


def _cell(measured: Values | None) -> str:
    return with_interval(measured) if measured else "–"


def _on_two_lines(measured: Values | None) -> str:
    if measured is None:
        return "–"
    low, high = (f"{end:.2f}" if abs(end) < 1 else f"{end:.2g}" for end in (measured["low"], measured["high"]))
    return f"{measured['value']:.3g}\n{low}–{high}"


def with_interval(measured: Values, signed: bool = False) -> str:
    """`0.500 [0.300, 0.700]`; a difference shows its sign."""
    size = abs(measured["value"])
    digits = 1 if size >= 10 else 2 if size >= 1 else 3
    value, low, high = (f"{measured[name]:{'+' if signed else ''}.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def markdown_row(cells: Sequence[str]) -> str:
    """A row of a table."""
    return "| " + " | ".join(cells) + " |"


def _quoted(title: str, text: str) -> list[str]:
    """Text of models and data, where nothing in it is read as Markdown."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"**{title}**", "", fence, text, fence, ""]

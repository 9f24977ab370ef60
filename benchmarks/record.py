"""Turns, ratios and their spread; results that are on the disk as soon as they are there."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from spinlm.errors import UserError


@dataclass(frozen=True)
class Turn:
    """One timing of one side.

    Attributes:
        side: Whose.
        seconds: Wall time.
        amount: What was done in it: pairs, tokens, iterations.
        detail: What else is worth keeping.
    """

    side: str
    seconds: float
    amount: float
    detail: dict[str, Any]

    @property
    def rate(self) -> float:
        return self.amount / self.seconds


class Side(Protocol):
    """Something that can be timed, again and again."""

    @property
    def name(self) -> str: ...

    def turn(self) -> Turn:
        """Do the work once more, and say how long it took."""
        ...


@dataclass(frozen=True)
class Spread:
    """The least, middle and greatest of some values, and how many they are."""

    low: float
    median: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises ValueError where there are none."""
        ordered = sorted(values)
        return cls(ordered[0], statistics.median(ordered), ordered[-1], len(ordered)) if ordered else _nothing()


def _nothing() -> Spread:
    raise ValueError("no values to take the spread of")


def alternating(ours: Side, others: Sequence[Side], rounds: int) -> list[Side]:
    """The order of turns: A B A C A B A C A, so that every turn of another side stands between two of ours."""
    return [side for _ in range(rounds) for other in others for side in (ours, other)] + [ours]


def ratios(turns: Sequence[Turn], ours: str, other: str) -> list[float]:
    """Our rate over another side's, for each two turns that follow one another."""
    return [
        (a.rate / b.rate) if a.side == ours else (b.rate / a.rate)
        for a, b in pairwise(turns)
        if {a.side, b.side} == {ours, other}
    ]


class Record:
    """One measure's results; every addition is written at once."""

    def __init__(self, name: str, entry: dict[str, Any], write: Callable[[], None], say: Callable[[str], None]) -> None:
        self.name = name
        self.turns: list[Turn] = []
        self._entry = entry
        self._write = write
        self._say = say

    def take_turns(self, ours: Side, others: Sequence[Side], rounds: int) -> None:
        """Time the sides, alternating."""
        order = alternating(ours, others, rounds)
        for place, side in enumerate(order):
            turn = side.turn()
            self.turns.append(turn)
            self._add("turns", asdict(turn) | {"rate": turn.rate})
            self.say(f"turn {place + 1}/{len(order)}: {turn.side}: {turn.seconds:.1f} s, {turn.rate:.4g} a second")

    def ratio(self, what: str, ours: Side, other: Side, at_least: float | None = None) -> None:
        """Our rate over another side's."""
        rates = {s.name: Spread.of(t.rate for t in self.turns if t.side == s.name).median for s in (ours, other)}
        spread = Spread.of(ratios(self.turns, ours.name, other.name))
        self.figure(what, other.name, spread, at_least=at_least, rates=rates)

    def figure(
        self,
        what: str,
        against: str,
        spread: Spread,
        at_least: float | None = None,
        at_most: float | None = None,
        **detail: Any,
    ) -> None:
        """A figure, its goal, and whether its median reaches it."""
        reached = None
        if at_least is not None:
            reached = spread.median >= at_least
        if at_most is not None:
            reached = spread.median <= at_most
        figure = {"what": what, "against": against, **asdict(spread), "at_least": at_least, "at_most": at_most}
        self._add("figures", figure | {"reached": reached, **detail})
        self.say(f"{what}, against {against}: {spread.median:.3g} ({spread.low:.3g} to {spread.high:.3g})")

    def check(self, what: str, value: float, tolerance: float) -> None:
        """That both sides computed the same: how far apart they are, and how far they may be."""
        same = bool(value <= tolerance)
        self._add("checks", {"what": what, "value": value, "tolerance": tolerance, "same": same})
        self.say(f"check: {what}: {value:.3g} (at most {tolerance:.3g}): {'same' if same else 'NOT THE SAME'}")

    def note(self, text: str) -> None:
        """Something a reader of the figures has to know."""
        self._add("notes", text)
        self.say(text)

    def say(self, text: str) -> None:
        """Progress."""
        self._say(f"{self.name}: {text}")

    def _add(self, kind: str, value: Any) -> None:
        self._entry.setdefault(kind, []).append(value)
        self._write()


class Results:
    """The results file: machine, versions, and each measure under its name."""

    def __init__(self, path: Path, header: dict[str, Any], keep: bool, say: Callable[[str], None]) -> None:
        """Start a file, or go on with one.

        Args:
            path: Where; its directory is made.
            header: Machine and versions.
            keep: The measures that the file has stay in it, but for those that begin anew.
            say: Shows progress.

        Raises:
            UserError: The file to go on with isn't one of ours, or was measured on another machine or with other
                versions: a table is of one.
        """
        self.path = path
        self._say = say
        self._measures: dict[str, Any] = {}
        if keep and path.exists():
            there = read_results(path)
            if _origin(there) != _origin(header):
                raise UserError(
                    f"{path}: was measured on another machine or with other versions: give another file by --out, "
                    "or measure everything anew"
                )
            self._measures = there["measures"]
        self._tree = {**header, "measures": self._measures}

    def is_finished(self, name: str, settings: dict[str, Any]) -> bool:
        """Whether a measure is there, whole, and by these settings."""
        entry = self._measures.get(name, {})
        return bool(entry.get("finished")) and entry.get("settings") == settings

    def begin(self, name: str, settings: dict[str, Any]) -> Record:
        """A measure's record; what was there of it goes."""
        entry: dict[str, Any] = {"settings": settings, "finished": False, "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._measures[name] = entry
        return Record(name, entry, self._write, self._say)

    def finish(self, name: str, seconds: float, failed: str | None = None) -> None:
        """Mark a measure as whole, or as failed and why."""
        self._measures[name] |= {"finished": failed is None, "seconds": round(seconds, 1)}
        if failed is not None:
            self._measures[name]["failed"] = failed
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.part")
        beside.write_text(json.dumps(self._tree, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path)


def _origin(results: dict[str, Any]) -> list[Any]:
    return [results["machine"]["cpu"], results["machine"]["cores"], results["versions"]]


def read_results(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        UserError: It isn't one.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read as results: {error}") from None
    if not isinstance(tree, dict) or "measures" not in tree:
        raise UserError(f"{path}: has no measures in it")
    return tree

"""The held-out examples as the page's browser shows them: every player's responses beside the real one."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, Literal

from spinlm.evaluation.measures import HeldOutExample
from spinlm.reporting.escape import json_for_script
from spinlm.reporting.summary import Summary
from spinlm.rundir import RunDir

EXAMPLES_SHOWN = 1000
TEXT_SHOWN = 20_000
"""Characters of a single text."""
PLAIN_BYTES = 1_000_000
"""More than this is packed."""

Cell = list[Any]
"""A response: text, tokens, whether it was cut at the cap, whether it is right (None without a verifier)."""


@dataclass(frozen=True)
class Browser:
    """What the page holds of the examples.

    Attributes:
        encoding: `json`, or `gzip` for JSON that is packed and in base64.
        data: In that encoding: `players`, `start` and `best` among them, whether any is `verified`, and `rows`.
        shown: How many examples are in it.
        total: How many are held out.
    """

    encoding: Literal["json", "gzip"]
    data: str
    shown: int
    total: int


def browser(run: RunDir, summary: Summary, judged: Mapping[str, Sequence[HeldOutExample]], room: int) -> Browser | None:
    """The examples of a run, as far as players are measured; None while the data aren't prepared, or none is held out.

    Where there are too many, those are shown whose outcome differs most between the start and the best.

    Args:
        run: The run.
        summary: Its summary.
        judged: What each player makes of each held-out example.
        room: Bytes that they may take on the page.

    Raises:
        UserError: Something in the run isn't what was committed.
    """
    if not summary.held_out:
        return None
    examples = run.committed_rows("data", "held_out.jsonl")
    verified = any(answer.correct is not None for of in judged.values() for e in of for answer in e.sampled)
    rows = _rows(examples, judged, {player: _texts(run, player) for player in judged}, verified)
    about = {
        "players": list(judged),
        "start": summary.start,
        "best": summary.best,
        "greedy": all("greedy" in of_player for row in rows for of_player in row["players"].values()),
        "verified": verified,
    }
    places = _most_telling(judged, summary, len(rows), verified)
    return _packed(about, rows, places, room)


def outcome(example: HeldOutExample, verified: bool) -> float | None:
    """What an example is won or lost by: the share of right sampled responses; in a run without any verifier, how
    likely the real one is, in nats a token. None for an example that has no verifier in a run that has some."""
    if not verified:
        return example.real_logprob / example.real_tokens
    judged = [answer.correct for answer in example.sampled if answer.correct is not None]
    return sum(judged) / len(judged) if judged else None


def _change(before: float | None, after: float | None) -> float:
    """How much an outcome has changed: endlessly where one isn't finite, and least where there is none."""
    if before is None or after is None:
        return -1.0
    return abs(after - before) if isfinite(after - before) else inf


def _most_telling(
    judged: Mapping[str, Sequence[HeldOutExample]], summary: Summary, count: int, verified: bool
) -> list[int]:
    """The examples' places, those first whose outcome has changed most."""
    if summary.start is None or summary.best is None:
        return list(range(count))
    before, after = judged[summary.start], judged[summary.best]
    changes = [_change(outcome(a, verified), outcome(b, verified)) for a, b in zip(before, after, strict=True)]
    return sorted(range(count), key=lambda place: -changes[place])


def _packed(about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], places: Sequence[int], room: int) -> Browser:
    """As many examples as there is room for."""
    count = min(len(rows), EXAMPLES_SHOWN)
    while True:
        content = json_for_script({**about, "rows": [rows[place] for place in sorted(places[:count])]})
        encoded = content.encode()
        if len(encoded) <= min(PLAIN_BYTES, room):
            return Browser("json", content, count, len(rows))
        packed = base64.b64encode(gzip.compress(encoded, mtime=0)).decode()
        if len(packed) <= room or count == 1:
            return Browser("gzip", packed, count, len(rows))
        count = max(1, int(count * 0.98 * room / len(packed)))


def _rows(
    examples: Sequence[Mapping[str, Any]],
    judged: Mapping[str, Sequence[HeldOutExample]],
    texts: Mapping[str, Sequence[tuple[list[str], list[Cell]]]],
    verified: bool,
) -> list[dict[str, Any]]:
    return [
        {
            "id": example["id"],
            "prompt": _short(example["prompt"]),
            "real": _short(example["real"]),
            "tokens": len(example["real_ids"]),
            "players": {
                player: _of_player(judged[player][place], *texts[player][place], verified) for player in judged
            },
        }
        for place, example in enumerate(examples)
    ]


def _of_player(
    example: HeldOutExample, sampled: Sequence[str], greedy: Sequence[Cell], verified: bool
) -> dict[str, Any]:
    cells = [
        [_short(text), answer.tokens, answer.truncated, answer.correct]
        for text, answer in zip(sampled, example.sampled, strict=True)
    ]
    found: dict[str, Any] = {
        "sampled": cells,
        "outcome": _rounded(outcome(example, verified)),
        "real": round(example.real_logprob / example.real_tokens, 4),
    }
    if greedy:
        found["greedy"] = [[*cell, example.greedy_correct] for cell in greedy]
    if example.margins:
        found["margin"] = round(sum(example.margins) / len(example.margins), 4)
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def _texts(run: RunDir, player: str) -> list[tuple[list[str], list[Cell]]]:
    """For each example a player's sampled texts, and its greedy response where it gave one."""
    sampled = [[response["text"] for response in row["responses"]] for row in _shards(run, player, "sampled")]
    greedy = [
        [[_short(r["text"]), len(r["token_ids"]), r["finish_reason"] == "length"] for r in row["responses"]]
        for row in _shards(run, player, "greedy")
    ] or [[] for _ in sampled]
    return list(zip(sampled, greedy, strict=True))


def _shards(run: RunDir, player: str, kind: str) -> list[dict[str, Any]]:
    return [row for key in run.keys(f"evaluation/{player}/{kind}/") for row in run.committed_rows(key)]


def _short(text: str) -> str:
    left_out = len(text) - TEXT_SHOWN
    return text if left_out <= 0 else f"{text[:TEXT_SHOWN]} … [{left_out:,} more characters are in the run directory]"

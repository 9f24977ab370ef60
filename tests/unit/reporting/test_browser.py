"""What the page's browser of examples is given: which examples, which numbers, and how it is packed."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from made_run import Made, MadeExample, MadeRun
from spinlm.reporting import browser as module
from spinlm.reporting.browser import Browser, browser
from spinlm.reporting.summary import read_examples, summarise


def data(found: Browser | None) -> dict[str, Any]:
    assert found is not None
    text = found.data if found.encoding == "json" else gzip.decompress(base64.b64decode(found.data)).decode()
    return dict(json.loads(text))


def made(path: Path, *examples: MadeExample) -> MadeRun:
    return MadeRun(path, {"sft": {}, "iterations": 1}).data(examples)


def shown(run: MadeRun, room: int = 1_000_000) -> Browser | None:
    summary = summarise(run.run)
    return browser(run.run, summary, {name: read_examples(run.run, name) for name in summary.measures}, room)


def test_every_number_of_an_example(tmp_path: Path) -> None:
    run = made(tmp_path, MadeExample("a", "Q", "A", tokens=4))
    run.player("sft", [Made("no", False, real_logprob=-8.0, tokens=3, truncated=True)])
    run.player("iteration-0", [Made("A", True, -6.0, 2, margin=0.5, greedy="A!", greedy_right=False)])
    found = data(shown(run))
    assert found == {
        "players": ["sft", "iteration-0"],
        "start": "sft",
        "best": "iteration-0",
        "greedy": False,  # not of both
        "verified": True,
        "rows": [
            {
                "id": "a",
                "prompt": "Q",
                "real": "A",
                "tokens": 4,
                "players": {
                    "sft": {"sampled": [["no", 3, True, False]], "outcome": 0.0, "real": -2.0},
                    "iteration-0": {
                        "sampled": [["A", 2, False, True]],
                        "greedy": [["A!", 2, False, False]],
                        "outcome": 1.0,
                        "real": -1.5,
                        "margin": 0.5,
                    },
                },
            }
        ],
    }


def test_without_a_verifier_an_outcome_is_how_likely_the_real_response_is(tmp_path: Path) -> None:
    run = made(tmp_path, MadeExample("a", tokens=4)).player("sft", [Made(real_logprob=-8.0)])
    found = data(shown(run))
    assert found["verified"] is False
    assert found["rows"][0]["players"]["sft"]["outcome"] == -2.0


def test_before_anybody_is_measured_there_are_prompts(tmp_path: Path) -> None:
    found = data(shown(made(tmp_path, MadeExample("a", "Q", "A"))))
    assert (found["players"], found["rows"][0]["prompt"]) == ([], "Q")


def test_nothing_held_out(tmp_path: Path) -> None:
    assert shown(MadeRun(tmp_path)) is None
    assert shown(made(tmp_path)) is None


def test_the_ones_that_changed_most_are_shown_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXAMPLES_SHOWN", 2)
    run = made(tmp_path, *(MadeExample(name, tokens=10) for name in "abcd"))
    run.player("sft", [Made(real_logprob=-10.0)] * 4)
    run.player("iteration-0", [Made(real_logprob=value) for value in (-12.0, -10.0, -7.0, -10.5)])
    found = shown(run)
    assert [row["id"] for row in data(found)["rows"]] == ["a", "c"]
    assert found is not None
    assert (found.shown, found.total) == (2, 4)


def test_a_long_text_is_cut_and_says_so(tmp_path: Path) -> None:
    run = made(tmp_path, MadeExample("a", "x" * 1_000_000))
    text = data(shown(run))["rows"][0]["prompt"]
    assert text == "x" * 20_000 + " … [980,000 more characters are in the run directory]"


def test_much_of_it_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLAIN_BYTES", 1_000)
    found = shown(made(tmp_path, *(MadeExample(f"e{n}", "</script>\u2028\ud800") for n in range(50))))
    assert found is not None
    assert found.encoding == "gzip"
    assert [row["prompt"] for row in data(found)["rows"]] == ["</script>\u2028\ud800"] * 50


def test_what_there_is_no_room_for_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLAIN_BYTES", 1_000)
    run = made(
        tmp_path, *(MadeExample(f"e{n}", "".join(chr(33 + (n * k * k) % 90) for k in range(400))) for n in range(90))
    )
    found = shown(run, room=4_000)
    assert found is not None
    assert 5 < found.shown < 90
    assert len(found.data) <= 4_000
    assert len(data(found)["rows"]) == found.shown


def test_an_example_without_a_verifier_among_others_with_one_has_no_outcome(tmp_path: Path) -> None:
    """It is neither gained nor lost, however much likelier its real response has become."""
    run = made(tmp_path, MadeExample("a", tokens=10), MadeExample("b", tokens=10))
    run.player("sft", [Made(right=None, real_logprob=-90.0), Made(right=False)])
    run.player("iteration-0", [Made(right=None, real_logprob=-1.0), Made(right=True)])
    first, second = data(shown(run))["rows"]
    assert [first["players"][player]["outcome"] for player in ("sft", "iteration-0")] == [None, None]
    assert [second["players"][player]["outcome"] for player in ("sft", "iteration-0")] == [0.0, 1.0]


def test_those_that_have_diverged_are_shown_first_and_those_without_an_outcome_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(tmp_path, *(MadeExample(name, tokens=10) for name in "abc"))
    run.player("sft", [Made(real_logprob=-10.0)] * 3)
    run.player("iteration-0", [Made(real_logprob=value) for value in (-10.0, -90.0, float("nan"))])
    monkeypatch.setattr(module, "EXAMPLES_SHOWN", 1)
    (row,) = data(shown(run))["rows"]
    assert (row["id"], row["players"]["iteration-0"]["outcome"]) == ("c", None)


@pytest.mark.parametrize("text", ["\U0001f642" * 400, "é" * 400])
def test_room_is_of_bytes_and_kept_by_what_is_not_packed_too(tmp_path: Path, text: str) -> None:
    found = shown(made(tmp_path, *(MadeExample(f"e{n}", text) for n in range(90))), room=60_000)
    assert found is not None
    assert len(found.data.encode()) <= 60_000
    assert found.shown == 90

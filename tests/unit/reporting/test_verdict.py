"""The verdict of hand-made runs: better beyond noise, perhaps, no, or not known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from made_run import Made, MadeExample, MadeRun
from spinlm.reporting.summary import summarise
from spinlm.reporting.verdict import State, Verdict, verdict_of

COUNT = 40


def judged(right: int) -> list[Made]:
    """A player that has the first so many of all prompts right."""
    return [Made(right=place < right) for place in range(COUNT)]


def verdict(
    path: Path, rights: dict[str, int], state: State = "finished", left: Sequence[str] = (), **sections: Any
) -> Verdict:
    made = MadeRun(path, {"sft": {}, "iterations": 3, **sections})
    made.data([MadeExample(f"e{place}") for place in range(COUNT)])
    for name, right in rights.items():
        made.player(name, judged(right))
    return verdict_of(summarise(made.run), path, state, left)


def test_better_beyond_noise(tmp_path: Path) -> None:
    found = verdict(tmp_path / "runs/my run", {"base": 2, "sft": 10, "iteration-0": 30, "iteration-1": 24})
    assert (found.tone, found.headline) == ("good", "Yes: iteration-0 is better than sft, beyond noise.")
    assert found.reasons[0].startswith(
        "Accuracy, sampled (higher is better): 0.750 [0.598, 0.858], against 0.250 [0.142, 0.402] of sft, where "
        "self-play started. The difference, prompt by prompt over 40 held-out prompts, is +0.500 [+0.3"
    )
    assert found.reasons[0].endswith(": beyond noise, since its whole interval is on one side of 0.")
    assert found.reasons[1:] == [
        "iteration-0 was chosen among 2 iterations on these prompts: the differences' intervals allow for it."
    ]
    assert found.use == "iteration-0."
    assert found.command == f"spinlm export '{tmp_path}/runs/my run' OUT --merge"


def test_perhaps_better(tmp_path: Path) -> None:
    """One prompt more of forty: some draws of prompts leave that one out."""
    found = verdict(tmp_path, {"sft": 20, "iteration-0": 21})
    assert (found.tone, found.headline) == ("unsure", "Perhaps: iteration-0 is better than sft, but within noise.")
    assert found.reasons[0].endswith(": within noise.")
    assert len(found.reasons) == 1
    assert found.use == "iteration-0, if anything: by accuracy, sampled it isn't told from sft."
    assert found.next == "Write the best iteration as a model of its own:"


def test_equal(tmp_path: Path) -> None:
    found = verdict(tmp_path, {"sft": 20, "iteration-0": 20})
    assert (found.tone, found.headline) == ("unsure", "No difference: iteration-0 measures the same as sft.")
    assert found.use == "sft, where self-play started: no iteration measures better."
    assert found.next.endswith("To write sft as a model of its own:")
    assert found.command == f"spinlm export {tmp_path} OUT --merge --iteration sft"


def test_worse_within_noise(tmp_path: Path) -> None:
    found = verdict(tmp_path, {"sft": 20, "iteration-0": 19})
    assert (found.tone, found.headline) == (
        "unsure",
        "No gain to be seen: iteration-0 is worse than sft, within noise.",
    )


def test_worse_beyond_noise(tmp_path: Path) -> None:
    found = verdict(tmp_path, {"sft": 30, "iteration-0": 10, "iteration-1": 5})
    assert found.tone == "bad"
    assert found.headline == "No: even iteration-0, the best iteration, is worse than sft, beyond noise."
    assert found.use == "sft. No iteration is as good."
    assert "a lower training.learning_rate first" in found.next
    assert found.command == f"spinlm export {tmp_path} OUT --merge --iteration sft"


def test_better_than_the_base_there_is_nothing_to_write(tmp_path: Path) -> None:
    found = verdict(tmp_path, {"base": 30, "iteration-0": 10}, sft=None)
    assert found.use == "base. No iteration is as good."
    assert found.next.endswith("The best iteration can be had all the same:")
    assert found.command == f"spinlm export {tmp_path} OUT --merge"


@pytest.mark.parametrize(("played", "word"), [(1, "Yes"), (10, "Perhaps")])
def test_the_best_of_many_may_be_so_by_chance(tmp_path: Path, played: int, word: str) -> None:
    """14 gained and 4 lost of 40, 2.4 standard errors: enough for the only iteration, but not for the best of ten."""
    made = MadeRun(tmp_path, {"iterations": played}).data([MadeExample(f"e{place}") for place in range(40)])
    made.player("base", judged(20))
    made.player("iteration-0", [Made(right=place < 16 or 20 <= place < 34) for place in range(40)])
    for t in range(1, played):
        made.player(f"iteration-{t}", judged(20))
    assert verdict_of(summarise(made.run), tmp_path, "finished", []).headline.startswith(word)


@pytest.mark.parametrize(("changed", "word"), [(5, "Perhaps"), (6, "Yes")])
def test_a_few_prompts_are_chance(tmp_path: Path, changed: int, word: str) -> None:
    """All that changed got better, which a sign test believes from six prompts on."""
    made = MadeRun(tmp_path, {"iterations": 1}).data([MadeExample(f"e{place}") for place in range(6)])
    made.player("base", [Made(right=False)] * 6)
    made.player("iteration-0", [Made(right=place < changed) for place in range(6)])
    assert verdict_of(summarise(made.run), tmp_path, "finished", []).headline.startswith(word)


@pytest.mark.parametrize(("right", "word"), [(38, "worse than"), (10, "better than")])
def test_beside_the_control(tmp_path: Path, right: int, word: str) -> None:
    rights = {"sft": 10, "iteration-0": 25, "control": right}
    found = verdict(tmp_path, rights, evaluation={"control": True})
    assert f"Did it need self-play? iteration-0 is {word} the control" in found.reasons[1]
    if word == "worse than":
        assert (found.tone, found.headline) == ("unsure", "Better than sft, but continued SFT does better still.")
        assert found.use == "the control, SFT continued, which is better than iteration-0 beyond noise."
        assert found.command == f"spinlm export {tmp_path} OUT --merge --iteration control"
    else:
        assert found.tone == "good"


def test_a_control_within_noise_takes_nothing_away(tmp_path: Path) -> None:
    found = verdict(tmp_path, {"sft": 10, "iteration-0": 25, "control": 26}, evaluation={"control": True})
    assert found.tone == "good"
    assert found.reasons[1].endswith("within noise.")


def test_without_sft_it_starts_from_the_base(tmp_path: Path) -> None:
    assert verdict(tmp_path, {"base": 5, "iteration-0": 30}, sft=None).headline.startswith(
        "Yes: iteration-0 is better than base"
    )


def test_a_measure_where_lower_is_better(tmp_path: Path) -> None:
    made = MadeRun(tmp_path).data([MadeExample(f"e{place}", tokens=10) for place in range(8)])
    made.player("base", [Made(real_logprob=-20.0)] * 8)
    made.player("iteration-0", [Made(real_logprob=-10.0)] * 8)
    found = verdict_of(summarise(made.run), tmp_path, "finished", [])
    assert found.headline == "Yes: iteration-0 is better than base, beyond noise."
    assert (
        "Real NLL a token (lower is better): 1.00 [1.00, 1.00], against 2.00 [2.00, 2.00] of base" in found.reasons[0]
    )
    assert "is -1.00 [-1.00, -1.00]: beyond noise" in found.reasons[0]


def test_nothing_measured_yet(tmp_path: Path) -> None:
    found = verdict(tmp_path, {"base": 5, "sft": 6}, "running", ["iteration 0: train", "evaluate iteration-0"])
    assert (found.tone, found.headline) == ("open", "Not known yet: no iteration is measured.")
    assert (found.next, found.command) == (
        "Wait: the run is going on; next to be finished is iteration 0: train.",
        None,
    )


def test_a_finished_run_that_is_being_benchmarked_keeps_its_advice(tmp_path: Path) -> None:
    assert verdict(tmp_path, {"sft": 10, "iteration-0": 30}, "running", []).command is not None


def test_interrupted(tmp_path: Path) -> None:
    found = verdict(tmp_path, {"sft": 10, "iteration-0": 30}, "unfinished", ["iteration 1: train"])
    assert found.tone == "good"
    assert found.next == "The run isn't finished: the command that started it goes on, at iteration 1: train."
    assert found.command is None


def test_nothing_held_out(tmp_path: Path) -> None:
    made = MadeRun(tmp_path).data([])
    found = verdict_of(summarise(made.run), tmp_path, "finished", [])
    assert (found.tone, found.headline) == ("open", "Not known: nothing was held out, so nothing was measured.")
    assert found.command is not None

"""Runs against each other: prompt by prompt where they hold out the same examples, and said so where they don't."""

from __future__ import annotations

from pathlib import Path

import pytest

from made_run import Made, MadeExample, MadeRun
from spinlm.errors import UserError
from spinlm.reporting.comparison import Side, comparison, contest, write_comparison
from spinlm.reporting.summary import summarise
from spinlm.rundir import RunDir

COUNT = 20
SAME = [MadeExample(f"e{place}", f"question {place}") for place in range(COUNT)]


def made(path: Path, *rights: int, examples: list[MadeExample] = SAME, **sections: object) -> RunDir:
    """A run whose iterations have so many of their prompts right, the first ones."""
    run = MadeRun(path, {"iterations": max(1, len(rights)), **sections}).data(examples)
    run.player("base", [Made(right=False)] * len(examples))
    for t, right in enumerate(rights):
        run.player(f"iteration-{t}", [Made(right=place < right) for place in range(len(examples))])
        run.training(f"iteration-{t}", [{"step": 1, "loss": 0.6}])
    return run.run


def sides(*runs: RunDir) -> list[Side]:
    return [Side(run.path.name, run, summarise(run)) for run in runs]


def test_the_best_of_each_prompt_by_prompt(tmp_path: Path) -> None:
    """18 against 12 of the same 20: the difference never leaves the six prompts that only one has right."""
    found = contest(sides(made(tmp_path / "a", 12, 10), made(tmp_path / "b", 5, 18)))
    assert [side.name for side in found.sides] == ["b", "a"]
    assert [side.best(found.measure) for side in found.sides] == ["iteration-1", "iteration-0"]
    change = found.differences["a"]
    assert change["value"] == pytest.approx(0.3)
    assert 0.05 <= change["low"] < change["value"] < change["high"] <= 0.55


def test_of_the_same_examples_in_another_order(tmp_path: Path) -> None:
    """Paired by id: each has the same prompts right, so there is no difference and no noise."""
    one = MadeRun(tmp_path / "a").data(SAME)
    other = MadeRun(tmp_path / "b").data(SAME[::-1])
    for run, examples in ((one, SAME), (other, SAME[::-1])):
        run.player("iteration-0", [Made(right=example.id < "e15") for example in examples])
    found = contest(sides(one.run, other.run))
    assert found.notes == []
    assert [found.differences["b"][end] for end in ("value", "low", "high")] == [0.0, 0.0, 0.0]


def test_different_examples_are_said_to_be_so_and_give_a_wider_interval(tmp_path: Path) -> None:
    others = [MadeExample(f"e{place}", f"another question {place}") for place in range(COUNT)]
    paired = contest(sides(made(tmp_path / "a", 12), made(tmp_path / "b", 16)))
    unpaired = contest(sides(made(tmp_path / "c", 12), made(tmp_path / "d", 16, examples=others)))
    assert unpaired.notes == [
        "d and c hold out different examples: they are compared by their averages, not prompt by prompt, and the "
        "interval is wider. Some of the difference may be that of the prompts."
    ]
    assert unpaired.differences["c"]["value"] == paired.differences["a"]["value"] == pytest.approx(0.2)
    widths = [change["high"] - change["low"] for change in (unpaired.differences["c"], paired.differences["a"])]
    assert widths[0] > 1.3 * widths[1]


def test_other_tokens_are_said(tmp_path: Path) -> None:
    others = [MadeExample(example.id, example.prompt, tokens=7) for example in SAME]
    found = contest(sides(made(tmp_path / "a", 12), made(tmp_path / "b", 16, examples=others)))
    assert len(found.notes) == 1
    assert "split the same responses into different tokens" in found.notes[0]


def test_runs_that_choose_by_different_measures(tmp_path: Path) -> None:
    found = contest(
        sides(made(tmp_path / "a", 12), made(tmp_path / "b", 16, evaluation={"select_by": "truncation_rate"}))
    )
    assert found.measure == "accuracy_sampled"
    assert found.notes == [
        "Runs choose their best by different measures (accuracy_sampled, truncation_rate): here all are compared by "
        "accuracy_sampled, that of a."
    ]


def test_that_the_best_was_chosen_by_the_same_prompts_is_said(tmp_path: Path) -> None:
    found = contest(sides(made(tmp_path / "a", 12, 10, 9), made(tmp_path / "b", 18)))
    assert found.notes == [
        "The best iteration of a (of 3) was chosen by the same prompts, which flatters it a little: the more "
        "iterations, the more."
    ]


def test_whether_each_has_beaten_its_own_start_is_said(tmp_path: Path) -> None:
    """b is better than a, and a no better than its base."""
    text = page(made(tmp_path / "a", 0), made(tmp_path / "b", 18))
    assert "a, iteration-0, beside base, where its self-play started (accuracy, sampled): equal, by +0.000" in text
    assert "b, iteration-0, beside base, where its self-play started (accuracy, sampled): better, beyond noise" in text


def page(*runs: RunDir) -> str:
    return comparison(runs)


def test_headlines(tmp_path: Path) -> None:
    low, middle, high = (made(tmp_path / name, right) for name, right in (("low", 2), ("middle", 15), ("high", 16)))
    assert "high is better than low, beyond noise." in page(low, high)
    assert "high measures best, but within noise." in page(middle, high)
    assert "high measures best, but only better than low beyond noise." in page(low, middle, high)


def test_recipes_are_set_against_the_first(tmp_path: Path) -> None:
    text = page(made(tmp_path / "a", 3), made(tmp_path / "b", 4, seed=5), made(tmp_path / "c", 5))
    assert "seed: 0 -&gt; 5" in text
    assert "The recipes are the same." in text


def test_one_without_a_measured_iteration_is_said_to_be_left_out(tmp_path: Path) -> None:
    text = page(made(tmp_path / "a", 3), made(tmp_path / "b", 4), made(tmp_path / "c"))
    assert "c has no iteration measured by accuracy_sampled." in text


def test_nothing_to_compare_by(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which b hasn't measured for any iteration yet"):
        page(made(tmp_path / "a", 3), made(tmp_path / "b"))


def test_the_same_run_twice(tmp_path: Path) -> None:
    run = made(tmp_path / "a", 3)
    with pytest.raises(UserError, match="the same run is given twice"):
        page(run, RunDir(tmp_path / "a" / ".." / "a"))


def test_too_many(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="9 runs are too many"):
        page(*[RunDir(tmp_path / str(n)) for n in range(9)])


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    text = page(made(tmp_path / "x/demo", 3), made(tmp_path / "y/demo", 18))
    assert "y/demo is better than x/demo, beyond noise." in text


def test_a_name_that_is_markup(tmp_path: Path) -> None:
    text = page(made(tmp_path / "<img src=x>\u202e", 3), made(tmp_path / "b", 18))
    assert "<img src=x" not in text
    assert "&lt;img src=x&gt;[U+202E]" in text


def test_it_can_not_be_written(tmp_path: Path) -> None:
    runs = [made(tmp_path / "a", 3), made(tmp_path / "b", 18)]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/c.html: can't be written"):
        write_comparison(runs, tmp_path / "file/c.html")

"""Diagnostics by numbers worked out by hand, and each warning on both sides of its limit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from spinlm.config import WarningsSection
from spinlm.evaluation.diagnostics import (
    CHECKS,
    FEATURES,
    Said,
    Values,
    distinct,
    of_held_out,
    of_pairs,
    of_training,
    telling_features,
    warnings,
)
from spinlm.evaluation.measures import HeldOutExample, SampledAnswer

MARKERS = ["### Instruction:", "### Response:"]


def said(*ids: int, truncated: bool = False, text: str = "") -> Said:
    return Said(ids, truncated, text)


class TestPairs:
    def test_by_hand(self) -> None:
        real, other = said(1, 2, 3, 9), said(1, 2, 9)
        pairs = [
            (real, said(5, 5, 5, 5, 5, truncated=True)),
            (real, said(1, 2, 9)),
            (other, said(4, 9)),
            (other, said(1, 2, 3, 4, 5, 9)),
        ]
        values = of_pairs(pairs, identical=1, markers=MARKERS)
        assert values["identical_share"] == 0.2
        assert values["truncation_rate"] == 0.25
        assert values["length_real"] == 3.5
        assert values["length_synthetic"] == 4.0
        assert values["length_ratio"] == pytest.approx(4 / 3.5)
        assert values["repetition_synthetic"] == pytest.approx((1 / 2) / 4)  # two 4-grams of one kind in one of them
        assert values["repetition_real"] == 0.0
        # one pair a prompt: real 1 2 3 9 and 1 2 9, synthetic 5 5 5 5 5 and 4 9
        assert values["distinct_1_real"] == pytest.approx(4 / 7)
        assert values["distinct_1_synthetic"] == pytest.approx(3 / 7)
        assert values["distinct_2_real"] == pytest.approx(4 / 5)  # 12 23 39 12 29
        assert values["distinct_2_synthetic"] == pytest.approx(2 / 5)

    def test_nothing_differs(self) -> None:
        assert of_pairs([], 3, MARKERS) == {"identical_share": 1.0}

    def test_distinct_by_hand(self) -> None:
        assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 0.5  # 12 21 12 12
        assert math.isnan(distinct([[1]], 2))


class TestTellingFeatures:
    def test_none_where_both_sides_are_alike(self) -> None:
        pairs = [(said(1, 2, 9), said(1, 3, 9)), (said(2, 2, 9), said(2, 3, 9))] * 4
        assert telling_features(pairs, MARKERS) == dict.fromkeys(FEATURES, 0.5)

    def test_length_in_either_direction(self) -> None:
        longer = [(said(1, 2, 3, 9), said(1, 9))] * 3 + [(said(1, 9), said(1, 2, 9))]
        assert telling_features(longer, MARKERS)["length"] == 0.75
        assert telling_features([(s, r) for r, s in longer], MARKERS)["length"] == 0.75

    def test_ties_count_half(self) -> None:
        pairs = [(said(1, 2, 9), said(1, 9)), (said(1, 9), said(2, 9))]
        assert telling_features(pairs, MARKERS)["length"] == 0.75

    def test_ending(self) -> None:
        pairs = [(said(1, 9), said(1, 2, truncated=True))] * 3 + [(said(1, 9), said(2, 9))]
        assert telling_features(pairs, MARKERS)["ending"] == (3 + 0.5) / 4

    def test_template(self) -> None:
        left_over = said(1, 2, text="Blue.\n### Instruction: And red?")
        pairs = [(said(1, 2, text="Blue."), left_over), (said(1, 2, text="Red."), said(1, 2, text="Green."))]
        assert telling_features(pairs, MARKERS)["template"] == 0.75

    def test_repetition(self) -> None:
        pairs = [(said(1, 2, 3, 4, 5), said(1, 1, 1, 1, 1))]
        assert telling_features(pairs, MARKERS)["repetition"] == 1.0

    def test_first_token(self) -> None:
        """People begin with a digit, the model with a word."""
        pairs = [(said(i % 3, 9), said(10 + i % 3, 9)) for i in range(30)]
        assert telling_features(pairs, MARKERS)["first_token"] == 1.0

    def test_first_tokens_that_are_all_different_tell_nothing(self) -> None:
        """What is counted in one half of the pairs is tried on the other: nothing is learnt by heart."""
        pairs = [(said(i, 9), said(1000 + i, 9)) for i in range(30)]
        assert telling_features(pairs, MARKERS)["first_token"] == 0.5


class TestTraining:
    ROWS = (
        {"start_loss": 0.69, "start_margin": 0.0},
        {"margin": 0.0, "reward_accuracy": 0.0, "reward_real": 0.0, "grad_norm": 9.0},  # the first step: nothing moved
        *(
            {"margin": i / 10, "reward_accuracy": 0.5 + i / 100, "reward_real": -i / 100, "grad_norm": float(i)}
            for i in range(1, 11)
        ),
    )

    def test_by_hand(self) -> None:
        assert of_training(self.ROWS) == pytest.approx(
            {
                "reward_accuracy_early": 0.515,  # of the steps after the first, the first two of ten
                "reward_accuracy_late": 0.595,
                "margin_late": 0.95,
                "reward_real_late": -0.095,
                "grad_norm_median": 5.5,
                "grad_norm_max": 10.0,
            }
        )

    def test_two_steps_are_enough_and_one_is_too_few(self) -> None:
        assert of_training(self.ROWS[:3])["margin_late"] == 0.1
        assert of_training(self.ROWS[:2]) == {}


def test_held_out_by_hand() -> None:
    sampled = [SampledAnswer(10, False, 0.0, logprob=-5.0, start_logprob=-8.0)]
    player = [HeldOutExample("0", -6.0, 2, sampled, margins=[1.0]), HeldOutExample("1", -9.0, 2, sampled, margins=[-1])]
    opponent = [HeldOutExample("0", -4.0, 2, []), HeldOutExample("1", -5.0, 2, [])]
    assert of_held_out(player, opponent) == {
        "real_nll_change": 1.5,  # (6 + 9 - 4 - 5) / 4
        "real_nll_change_low": 1.0,
        "real_nll_change_high": 2.0,
        "discriminability": 0.5,
        "drift": pytest.approx(0.3),
    }
    assert of_held_out([], []) == {}


FINE: dict[str, float] = {
    "identical_share": 0.1,
    "truncation_rate": 0.05,
    "length_real": 20.0,
    "length_synthetic": 24.0,
    "length_ratio": 1.2,
    "repetition_real": 0.02,
    "repetition_synthetic": 0.05,
    "distinct_2_real": 0.6,
    "distinct_2_synthetic": 0.5,
    "reward_accuracy_early": 0.7,
    "reward_accuracy_late": 0.8,
    "margin_late": 0.4,
    "reward_real_late": 0.1,
    "grad_norm_median": 1.0,
    "grad_norm_max": 4.0,
    "real_nll_change": -0.02,
    "real_nll_change_low": -0.05,
    "real_nll_change_high": 0.01,
    "drift": 0.05,
    **{f"told_by_{feature}": 0.6 for feature in FEATURES},
}


def _warned(values: Values, limits: WarningsSection | None = None) -> list[str]:
    return [one.name for one in warnings(values, limits or WarningsSection())]


def test_all_is_well() -> None:
    assert _warned(FINE) == []
    assert _warned({}) == []


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("real_nll_rise", {"real_nll_change": 0.05, "real_nll_change_low": 0.01}),
        ("early_reward_accuracy", {"reward_accuracy_early": 0.97}),
        ("late_reward_accuracy", {"reward_accuracy_late": 0.5}),
        ("length_ratio", {"length_ratio": 1.6}),
        ("length_ratio", {"length_ratio": 0.6}),
        ("truncation_rate", {"truncation_rate": 0.2}),
        ("repetition_excess", {"repetition_synthetic": 0.2}),
        ("diversity_ratio", {"distinct_2_synthetic": 0.3}),
        ("identical_share", {"identical_share": 0.7}),
        ("grad_norm_ratio", {"grad_norm_max": 11.0}),
        ("drift", {"drift": 0.7}),
    ],
)
def test_each_warning_and_its_limit(name: str, changes: dict[str, float]) -> None:
    assert _warned(FINE | changes) == [name]
    off = WarningsSection(**{name: None})
    assert _warned(FINE | changes, off) == []
    wider = {"real_nll_rise": 0.1, "late_reward_accuracy": 0.4, "diversity_ratio": 0.2, "grad_norm_ratio": 20.0}
    assert _warned(FINE | changes, WarningsSection(**{name: wider.get(name, 1.8 if "length" in name else 0.98)})) == []


def test_every_check_has_its_case_above_and_its_limit_in_the_recipe() -> None:
    assert set(CHECKS) == set(WarningsSection.model_fields)
    cases = test_each_warning_and_its_limit.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {name for name, _ in cases} == set(CHECKS)


class TestRealFalls:
    def test_within_noise_it_is_none(self) -> None:
        assert _warned(FINE | {"real_nll_change": 0.05, "real_nll_change_low": -0.01}) == []

    def test_without_a_growing_margin_it_is_none(self) -> None:
        assert _warned(FINE | {"real_nll_change": 0.05, "real_nll_change_low": 0.01, "margin_late": -0.1}) == []

    def test_where_nothing_is_held_out_training_says_it(self) -> None:
        values = {name: value for name, value in FINE.items() if not name.startswith("real_nll")}
        assert _warned(values) == []
        (warned,) = warnings(values | {"reward_real_late": -0.2}, WarningsSection())
        assert warned.message == "The margin grows (to 0.4), but the real responses' log-probs fall in training."


class TestShortcut:
    def test_names_the_feature_that_separates_best(self) -> None:
        changes = {"reward_accuracy_early": 0.99, "told_by_length": 0.85, "told_by_ending": 0.96}
        (warned,) = warnings(FINE | changes, WarningsSection())
        assert warned.message == (
            "Reward accuracy is 0.99 within the first fifth of the steps. The shortcut seems to be the ending (cut at "
            "the cap, so without end-of-turn token): it alone tells 96% of the pairs apart."
        )

    def test_says_so_where_no_feature_does(self) -> None:
        (warned,) = warnings(FINE | {"reward_accuracy_early": 0.99, "told_by_length": 0.79}, WarningsSection())
        assert "None of the simple features explains it (length, first token, ending" in warned.message


def test_each_warning_is_documented_with_its_cause_and_remedy() -> None:
    page = " ".join((Path(__file__).parents[3] / "docs" / "diagnostics.md").read_text("utf-8").split())
    for name, check in CHECKS.items():
        for text in (f"`warnings.{name}`", check.title, check.cause, check.remedy):
            assert text in page, f"docs/diagnostics.md doesn't say: {text}"

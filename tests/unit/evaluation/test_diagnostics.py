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
    TrainingFacts,
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
        groups = [
            (said(1, 2, 3, 9), [said(5, 5, 5, 5, 5, truncated=True), said(1, 2, 9)]),
            (said(1, 2, 9), [said(4, 9), said(1, 2, 3, 4, 5, 9)]),
            (said(7, 9), []),  # all that was said is what people say
        ]
        values = of_pairs(groups, identical=1, markers=MARKERS)
        assert values["identical_share"] == 0.2
        assert values["truncation_rate"] == 0.25
        assert values["length_real"] == 3.5
        assert values["length_synthetic"] == 4.0
        assert values["length_ratio"] == pytest.approx(4 / 3.5)
        assert values["repetition_synthetic"] == pytest.approx((1 / 2) / 4)  # two 4-grams of one kind in one of them
        assert values["repetition_real"] == 0.0
        # one response a prompt: real 1 2 3 9 and 1 2 9, synthetic 5 5 5 5 5 and 4 9
        assert values["distinct_1_real"] == pytest.approx(4 / 7)
        assert values["distinct_1_synthetic"] == pytest.approx(3 / 7)
        assert values["distinct_2_real"] == pytest.approx(4 / 5)  # 12 23 39 12 29
        assert values["distinct_2_synthetic"] == pytest.approx(2 / 5)

    def test_nothing_differs(self) -> None:
        assert of_pairs([(said(1, 9), [])], 3, MARKERS) == {"identical_share": 1.0}

    def test_distinct_by_hand(self) -> None:
        assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 0.5  # 12 21 12 12
        assert math.isnan(distinct([[1]], 2))


def told(*pairs: tuple[Said, Said]) -> dict[str, float]:
    return telling_features([(real, [synthetic]) for real, synthetic in pairs], MARKERS)


class TestTellingFeatures:
    def test_none_where_both_sides_are_alike(self) -> None:
        pairs = [(said(1, 2, 9), said(1, 3, 9)), (said(2, 2, 9), said(2, 3, 9))] * 4
        assert told(*pairs) == dict.fromkeys(FEATURES, 0.5)

    def test_length_in_either_direction(self) -> None:
        longer = [(said(1, 2, 3, 9), said(1, 9))] * 3 + [(said(1, 9), said(1, 2, 9))]
        assert told(*longer)["length"] == 0.75
        assert told(*((s, r) for r, s in longer))["length"] == 0.75

    def test_ties_count_half(self) -> None:
        assert told((said(1, 2, 9), said(1, 9)), (said(1, 9), said(2, 9)))["length"] == 0.75

    def test_ending(self) -> None:
        pairs = [(said(1, 9), said(1, 2, truncated=True))] * 3 + [(said(1, 9), said(2, 9))]
        assert told(*pairs)["ending"] == (3 + 0.5) / 4

    def test_template(self) -> None:
        left_over = said(1, 2, text="Blue.\n### Instruction: And red?")
        pairs = [(said(1, 2, text="Blue."), left_over), (said(1, 2, text="Red."), said(1, 2, text="Green."))]
        assert told(*pairs)["template"] == 0.75

    def test_repetition(self) -> None:
        assert told((said(1, 2, 3, 4, 5), said(1, 1, 1, 1, 1)))["repetition"] == 1.0

    def test_first_token(self) -> None:
        """People begin with a digit, the model with a word."""
        assert told(*((said(i % 3, 9), said(10 + i % 3, 9)) for i in range(30)))["first_token"] == 1.0

    @pytest.mark.parametrize("k", [1, 2, 4])
    def test_first_tokens_that_are_all_different_tell_nothing(self, k: int) -> None:
        """What is counted in one half of the prompts is tried on the other: nothing is learnt by heart."""
        groups = [(said(i, 9), [said(1000 + k * i + j, 9) for j in range(k)]) for i in range(30)]
        assert telling_features(groups, MARKERS)["first_token"] == 0.5


def _row(step: int, **changes: float) -> dict[str, float]:
    return {
        "step": step,
        "margin": step / 10,
        "reward_accuracy": 0.5 + step / 100,
        "reward_real": -step / 100,
        "length_real": 10.0,
        "grad_norm": float(step),
        **changes,
    }


class TestTraining:
    ROWS = ({"start_loss": 0.69, "start_margin": 0.0}, *(_row(step) for step in range(1, 11)))

    def test_by_hand(self) -> None:
        values = of_training(self.ROWS, TrainingFacts(beta=0.1, max_grad_norm=100.0))
        assert values == pytest.approx(
            {
                "reward_accuracy_early": 0.52,  # step 2: at the first nothing has moved
                "reward_accuracy_late": 0.595,  # steps 9 and 10
                "margin_late": 0.95,
                "real_log_ratio_late": -0.095 / 0.1 / 10,
                "grad_norm_median": 6.0,
                "grad_norm_max": 10.0,
                "grad_norm_jump": 1.0,
            }
        )

    def test_per_token_rewards_are_not_divided_again(self) -> None:
        values = of_training(self.ROWS, TrainingFacts(beta=0.1, length_normalised=True))
        assert values["real_log_ratio_late"] == pytest.approx(-0.95)

    def test_rows_of_many_steps_are_what_they_stand_for(self) -> None:
        """Logged every 5 steps: no row is of the first fifth alone, and the first is no fresh start."""
        values = of_training([_row(5), _row(10), _row(15), _row(20)], TrainingFacts(beta=0.1))
        assert "reward_accuracy_late" in values
        assert values["margin_late"] == 2.0
        assert "reward_accuracy_early" not in values
        fine = of_training([_row(step) for step in range(2, 21, 2)], TrainingFacts(beta=0.1))
        assert fine["reward_accuracy_early"] == pytest.approx(0.53)  # steps 2 and 4

    def test_a_single_step_says_nothing(self) -> None:
        assert of_training(self.ROWS[:2], TrainingFacts(beta=0.1)) == {}

    def test_without_a_reference_accuracy_and_ratio_mean_nothing(self) -> None:
        values = of_training(self.ROWS, TrainingFacts(beta=0.1, has_reference=False))
        assert not {"reward_accuracy_early", "reward_accuracy_late", "real_log_ratio_late"} & values.keys()

    def test_where_rounds_begin_anew_accuracy_means_nothing_and_their_first_steps_do_not_count(self) -> None:
        values = of_training(self.ROWS, TrainingFacts(beta=0.1, round_steps=3))
        assert values["margin_late"] == pytest.approx(0.85), "steps 8 and 9, since step 10 begins a round"
        assert not {"reward_accuracy_early", "reward_accuracy_late"} & values.keys()
        assert of_training(self.ROWS, TrainingFacts(beta=0.1, round_steps=1)) == {}

    def test_gradients(self) -> None:
        def jump(*norms: float) -> float:
            rows = [_row(step, grad_norm=norm) for step, norm in enumerate(norms, start=2)]
            return of_training(rows, TrainingFacts(beta=0.1))["grad_norm_jump"]

        assert jump(2.0, 2.0, 30.0, 2.0, 2.0) == 15.0
        assert jump(*(2.0 / 1.5**i for i in range(40))) < 5, "they may vanish"
        assert jump(0.01, 0.01, 0.9, 0.01) == 1.0, "what isn't clipped is no jump"
        assert jump(2.0, math.inf, 2.0) == 1.0, "float16 finds its loss scale"

    def test_skipped_steps_are_counted_where_all_were(self) -> None:
        rows = [{"step": 1, "skipped_nonfinite": 1}, {"step": 2, "skipped_nonfinite": 2}]
        assert of_training(rows, TrainingFacts(beta=0.1)) == {"skipped_nonfinite": 2}


def test_held_out_by_hand() -> None:
    sampled = [SampledAnswer(10, False, 0.0, logprob=-5.0, start_logprob=-8.0)]
    player = [HeldOutExample("0", -6.0, 2, sampled, margins=[1.0]), HeldOutExample("1", -9.0, 2, sampled, margins=[-1])]
    opponent = [HeldOutExample("0", -4.0, 2, []), HeldOutExample("1", -5.0, 2, [])]
    assert of_held_out(player, opponent) == {
        "real_nll_change": 1.5,  # (6 + 9 - 4 - 5) / 4
        "real_nll_change_low": 0.0,  # two prompts are too few
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
    "real_log_ratio_late": 0.1,
    "grad_norm_median": 1.0,
    "grad_norm_max": 4.0,
    "grad_norm_jump": 3.0,
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
        ("grad_norm_ratio", {"grad_norm_jump": 11.0}),
        ("drift", {"drift": 0.7}),
        ("skipped_nonfinite", {"skipped_nonfinite": 2}),
    ],
)
def test_each_warning_and_its_limit(name: str, changes: dict[str, float]) -> None:
    assert _warned(FINE | changes) == [name]
    off = WarningsSection(**{name: None})
    assert _warned(FINE | changes, off) == []
    wider = {"real_nll_rise": 0.1, "late_reward_accuracy": 0.4, "diversity_ratio": 0.2, "grad_norm_ratio": 20.0}
    wider |= {"skipped_nonfinite": 2}
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
        (warned,) = warnings(values | {"real_log_ratio_late": -0.2}, WarningsSection())
        assert warned.message == (
            "The margin grows (to 0.4), but the real responses' log-probs fall by 0.200 nats a token in training."
        )
        assert _warned(values | {"real_log_ratio_late": -0.2}, WarningsSection(real_nll_rise=0.3)) == []
        assert _warned(values | {"real_log_ratio_late": -0.2, "margin_late": 2e-7}) == [], "a margin of rounding"


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

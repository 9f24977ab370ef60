"""The model card: what it is, what it measures beside the others, and what to mind."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from made_run import WARNING
from spinlm.evaluation.diagnostics import Warned
from spinlm.reporting.card import model_card
from spinlm.reporting.summary import Summary


def measured(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "prompts": 10}


MEASURES = {
    "base": {"real_nll": measured(2.5, 2.0, 3.0)},
    "iteration-0": {"real_nll": measured(1.25, 1.0, 1.5), "discriminability": measured(0.75, 0.5, 1.0)},
    "iteration-1": {"real_nll": measured(1.5, 1.2, 1.8)},
    "control": {"real_nll": measured(1.0, 0.8, 1.2)},
}
DIFFERENCES = {"base": measured(-1.25, -1.5, -1.0), "control": measured(0.25, -0.1, 0.5)}


def card(base: str = "org/base", merged: bool = False, *warnings: Warned, **changes: Any) -> str:
    recipe = {
        "model": {"name": base},
        "training": {"loss": "hinge", "beta": [0.1, 5.0], "learning_rate": 5e-7},
        "seed": 3,
        "data": {"source": "d"},
    }
    values = {"title": "t", "measures": MEASURES, "select_by": "real_nll", "best": "iteration-0", "held_out": 10}
    summary = Summary(**{**values, "differences": DIFFERENCES, **changes})
    return model_card("iteration-0", {"recipe": recipe, "versions": {"spinlm": "9.9"}}, merged, summary, warnings)


@pytest.mark.parametrize(
    ("merged", "library", "kind"), [(False, "peft", "An adapter"), (True, "transformers", "A merged model")]
)
def test_what_it_is(merged: bool, library: str, kind: str) -> None:
    _, front, text = card(merged=merged).split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "org/base",
        "library_name": library,
        "tags": ["spin", "self-play", "spinlm"],
    }
    assert f"\n# iteration-0\n\n{kind} trained from `org/base` by SPIN" in text
    assert "with spinlm 9.9." in text
    assert "Dataset: `d`. Loss: hinge, beta [0.1, 5.0], learning rate 5e-07, seed 3." in text


def test_what_it_measures_beside_those_that_are_no_iterations() -> None:
    assert (
        "| measure | iteration-0 | base | control |\n"
        "| --- | --- | --- | --- |\n"
        "| real NLL a token | 1.25 [1.00, 1.50] | 2.50 [2.00, 3.00] | 1.00 [0.80, 1.20] |\n"
        "| reward accuracy | 0.750 [0.500, 1.000] | – | – |\n"
        "\n"
        "By real NLL a token, prompt by prompt:\n"
        "\n"
        "- It is better than base (2.50 [2.00, 3.00]) by -1.25 [-1.50, -1.00]: beyond noise.\n"
        "- It is worse than control (1.00 [0.80, 1.20]) by +0.250 [-0.100, +0.500]: within noise.\n"
    ) in card()


def test_warnings_and_limits() -> None:
    text = card("b", False, Warned(**WARNING))
    assert f"- **{WARNING['title']}.** {WARNING['message']} {WARNING['cause']} {WARNING['remedy']}\n" in text
    assert "(10 prompts). The best of 2 iterations was chosen by them too" in text
    assert "## Warnings" not in card()


def test_one_that_is_not_measured() -> None:
    text = card(measures={}, differences={}, best=None, held_out=0)
    assert "None: this player isn't measured." in text
    assert "(0 prompts). Self-play" in text


@pytest.mark.parametrize("base", ["models/a: b", "@models/a", "models/a #2"])
def test_a_base_with_a_name_that_is_not_plain_yaml(base: str) -> None:
    assert yaml.safe_load(card(base).split("---\n")[1])["base_model"] == base

"""The README of an exported model: what it is, what it measures beside the others, and what to mind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from spinlm.evaluation.diagnostics import Warned
from spinlm.reporting.report import COLUMNS, compared_with, markdown_row, with_interval
from spinlm.reporting.summary import Summary, is_iteration


def model_card(
    name: str,
    header: Mapping[str, Any],
    merged: bool,
    summary: Summary,
    warnings: Sequence[Warned],
    origin: Mapping[str, str] | None = None,
) -> str:
    """The README of an exported model.

    Args:
        name: The exported player.
        header: The run's: `recipe` and `versions`.
        merged: Whether it is a whole model, not an adapter.
        summary: The run's, with the differences between this player and the others.
        warnings: Of its iteration.
        origin: The commits of `model` and `dataset`, where they are from the hub.
    """
    commits = {what: f" at commit {commit}" for what, commit in (origin or {}).items()}
    at, data_at = commits.get("model", ""), commits.get("dataset", "")
    recipe = header["recipe"]
    training, base, kind = recipe["training"], recipe["model"]["name"], "A merged model" if merged else "An adapter"
    return "\n".join(
        [
            "---",
            f"base_model: {json.dumps(base)}",
            "library_name: " + ("transformers" if merged else "peft"),
            "tags: [spin, self-play, spinlm]",
            "---",
            "",
            f"# {name}",
            "",
            f"{kind} trained from `{base}`{at} by {_method(name)}, with spinlm {header['versions'].get('spinlm', '')}.",
            "",
            f"Dataset: `{recipe['data']['source']}`{data_at}. Loss: {training['loss']}, beta {training['beta']}, "
            f"learning rate {training['learning_rate']}, seed {recipe['seed']}.",
            "",
            *_measures(name, summary),
            *_warnings(warnings),
            *_limits(summary),
        ]
    )


def _method(name: str) -> str:
    if is_iteration(name):
        return "SPIN, Self-Play Fine-Tuning (arXiv 2401.01335)"
    return f"supervised fine-tuning (`{name}` of a run of SPIN, Self-Play Fine-Tuning, arXiv 2401.01335)"


def _measures(name: str, summary: Summary) -> list[str]:
    if name not in summary.measures:
        return ["## Held-out measures", "", "None: this player isn't measured.", ""]
    others = [other for other in summary.measures if other != name and not is_iteration(other)]
    measured = {player: summary.measures[player] for player in (name, *others)}
    rows = [
        [COLUMNS[key], *(with_interval(values[key]) if key in values else "–" for values in measured.values())]
        for key in COLUMNS
        if key in measured[name]
    ]
    return [
        "## Held-out measures, with 95 % intervals",
        "",
        markdown_row(["measure", *measured]),
        markdown_row(["---"] * (len(measured) + 1)),
        *map(markdown_row, rows),
        "",
        f"By {COLUMNS[summary.select_by]}, prompt by prompt:",
        "",
        *(f"- {compared_with(other, summary)}" for other in others),
        "",
    ]


def _warnings(warnings: Sequence[Warned]) -> list[str]:
    if not warnings:
        return []
    lines = [f"- **{warning.title}.** {warning.message} {warning.cause} {warning.remedy}" for warning in warnings]
    return ["## Warnings of its training", "", *lines, ""]


def _limits(summary: Summary) -> list[str]:
    played = sum(map(is_iteration, summary.measures))
    chosen = (
        f" The best of {played} iterations was chosen by them too, which the differences' intervals allow for."
        if played > 1
        else ""
    )
    return [
        "## Limits",
        "",
        f"Measured on a held-out part of the same dataset only ({summary.held_out or 0} prompts).{chosen} Self-play "
        "learns to imitate the dataset's responses, its mistakes included; nothing here makes the model safer than its "
        "base.",
        "",
    ]

"""What stands at the head of the page: did it get better, by how much, is that beyond noise, and what to do now."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spinlm.reporting.diagnostics import diagnostics
from spinlm.reporting.report import COLUMNS, heading, with_interval
from spinlm.reporting.status import status
from spinlm.reporting.summary import Summary, is_iteration
from spinlm.rundir import RunDir

State = Literal["running", "unfinished", "finished"]
Tone = Literal["good", "unsure", "bad", "open"]


@dataclass(frozen=True)
class Verdict:
    """The answers, from the first question to the last.

    Attributes:
        tone: How the page shows it.
        headline: Did it get better?
        reasons: By how much, over what, and whether that is beyond noise.
        use: Which model to use.
        next: What to do now, in words.
        command: And as a command, where there is one.
    """

    tone: Tone
    headline: str
    reasons: Sequence[str]
    use: str
    next: str
    command: str | None = None


def verdict_of(summary: Summary, path: Path, state: State, left: Sequence[str]) -> Verdict:
    """The answers that a run's numbers allow.

    Args:
        summary: The numbers.
        path: The run, for the command.
        state: How far it is.
        left: The stages that are left.
    """
    following, command = _next(summary, path, state, left)
    if summary.held_out == 0:
        return Verdict(
            "open",
            "Not known: nothing was held out, so nothing was measured.",
            ["Set data.held_out to a number of examples, or to a share, to find out."],
            "The latest iteration, for want of a measure.",
            following,
            command,
        )
    if summary.best is None or summary.start is None:
        return Verdict("open", "Not known yet: no iteration is measured.", [], "Nothing yet.", following, command)
    tone, headline = _headline(summary, summary.best, summary.start)
    reasons = _reasons(summary, summary.best, summary.start)
    return Verdict(tone, headline, reasons, _use(summary, summary.best, summary.start), following, command)


def _headline(summary: Summary, best: str, start: str) -> tuple[Tone, str]:
    outcome = summary.outcome(start)
    control = " Continued SFT does better." if _control_is_better(summary) else ""
    if outcome.word == "better" and outcome.beyond_noise:
        if control:
            return "unsure", f"Better than {start}, but continued SFT does better still."
        return "good", f"Yes: {best} is better than {start}, beyond noise."
    if outcome.word == "better":
        return "unsure", f"Perhaps: {best} is better than {start}, but within noise.{control}"
    if outcome.word == "equal":
        return "unsure", f"No difference: {best} measures the same as {start}.{control}"
    if outcome.beyond_noise:
        return "bad", f"No: even {best}, the best iteration, is worse than {start}, beyond noise.{control}"
    return "unsure", f"No gain to be seen: {best} is worse than {start}, within noise.{control}"


def _reasons(summary: Summary, best: str, start: str) -> list[str]:
    better = "higher" if summary.higher_is_better else "lower"
    mine, theirs = summary.measures[best][summary.select_by], summary.measures[start][summary.select_by]
    change = summary.differences[start]
    reasons = [
        f"{heading(summary.select_by)} ({better} is better): {with_interval(mine)}, against {with_interval(theirs)} of "
        f"{start}, where self-play started. The difference, prompt by prompt over {change['prompts']:.0f} held-out "
        f"prompts, is {with_interval(change, signed=True)}: {_noise(summary.outcome(start).beyond_noise)}."
    ]
    if "control" in summary.differences:
        outcome = summary.outcome("control")
        word = "equal to" if outcome.word == "equal" else f"{outcome.word} than"
        reasons.append(
            f"Did it need self-play? {best} is {word} the control, SFT continued for as many steps, by "
            f"{with_interval(summary.differences['control'], signed=True)}: {_noise(outcome.beyond_noise)}."
        )
    played = sum(is_iteration(name) for name in summary.measures)
    if played > 1:
        reasons.append(
            f"{best} was chosen among {played} iterations on these prompts: the differences' intervals allow for it."
        )
    return reasons


def _noise(beyond: bool) -> str:
    return "beyond noise, since its whole interval is on one side of 0" if beyond else "within noise"


def recommended(summary: Summary, best: str, start: str) -> str:
    """The player to use: the best iteration where it measures better than the start, unless the control is better."""
    better = best if summary.outcome(start).word == "better" else start
    return "control" if _control_is_better(summary) and _is_ahead(summary, "control", better) else better


def _is_ahead(summary: Summary, one: str, other: str) -> bool:
    """By value, within noise or not."""
    ahead = summary.measures[one][summary.select_by]["value"] - summary.measures[other][summary.select_by]["value"]
    return ahead > 0 if summary.higher_is_better else ahead < 0


def _use(summary: Summary, best: str, start: str) -> str:
    player, outcome = recommended(summary, best, start), summary.outcome(start)
    if player == "control":
        return f"the control, SFT continued, which is better than {best} beyond noise."
    if player == best:
        if outcome.beyond_noise:
            return f"{best}."
        return f"{best}, if anything: by {COLUMNS[summary.select_by]} it isn't told from {start}."
    if outcome.word == "worse" and outcome.beyond_noise:
        return f"{start}. No iteration is as good."
    return f"{start}, where self-play started: no iteration measures better."


def _control_is_better(summary: Summary) -> bool:
    """Beyond noise."""
    if "control" not in summary.differences:
        return False
    outcome = summary.outcome("control")
    return outcome.word == "worse" and outcome.beyond_noise


def _next(summary: Summary, path: Path, state: State, left: Sequence[str]) -> tuple[str, str | None]:
    if state == "running" and left:
        return f"Wait: the run is going on; next to be finished is {left[0]}.", None
    if state == "unfinished":
        return f"The run isn't finished: the command that started it goes on, at {left[0]}.", None
    export = f"spinlm export {shlex.quote(str(path))} OUT --merge"
    if summary.best is None or summary.start is None:
        return "Write the latest iteration as a model of its own:", export
    player = recommended(summary, summary.best, summary.start)
    if player == summary.best:
        return "Write the best iteration as a model of its own:", export
    again = (
        "For a gain by self-play, read the warnings, or try other settings from what still holds (spinlm run RECIPE "
        "--fork NEW_RUN), a lower training.learning_rate first."
    )
    if player == "base":
        return f"{again} The best iteration can be had all the same:", export
    return f"{again} To write {player} as a model of its own:", f"{export} --iteration {player}"


def closing_words(run: RunDir, summary: Summary, running: bool = False) -> str:
    """For the terminal: what to mind, which model to use, what to do next.

    Raises:
        UserError: Something in the run isn't what was committed.
    """
    left = [stage.name for stage in status(run) if not stage.is_done]
    state: State = "running" if running else "unfinished" if left else "finished"
    found = verdict_of(summary, run.path, state, left)
    warned = [f"{player}: {one.title}" for player, of in diagnostics(run, run.recipe()).items() for one in of.warnings]
    mind = [f"warnings, to be read before using a model: {'; '.join(warned)}"] if warned else []
    return "\n".join([*mind, f"use: {found.use}", f"next: {found.next} {found.command or ''}".rstrip()])

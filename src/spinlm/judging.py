"""The benchmarks that a model judges: `arena`, two contestants side by side, and `mt-bench`, grades from 1 to 10.

Answers and results are committed artifacts. What the judge said is kept beside them by the content of each
request, so that an interrupted judging goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any

from spinlm.contestants import (
    MT_BENCH,
    PlayerOfRun,
    QuestionSet,
    Sheet,
    opposing,
    slug,
)
from spinlm.errors import UserError
from spinlm.evaluation.judge import LONGEST_QUOTE, Judge, JudgeSettings
from spinlm.evaluation.measures import mean
from spinlm.evaluation.verdicts import (
    PROMPTS,
    Preferred,
    grading_prompt,
    pairwise_prompt,
    read_grade,
    read_preference,
)
from spinlm.evaluation.winrate import (
    Comparison,
    first_preferred,
    grades_by,
    length_controlled_win_rate,
    mean_grade,
    position_bias,
    win_rate,
)
from spinlm.files import digest, write_json, write_jsonl
from spinlm.stages import Stages

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Judging:
    """What is to be judged.

    Attributes:
        suites: `arena`, `mt-bench` or both.
        players: The names of the run's players to judge.
        against: Whom they are held against; see `opposing`.
        questions: A file or a dataset on the hub. None: the held-out prompts for arena, MT-bench's for mt-bench.
        limit: Only this many of them, the first ones.
        repair: Ask the judge again where what it said is kept no longer as it was.
    """

    suites: Sequence[str]
    players: Sequence[str]
    against: str | None = None
    questions: str | None = None
    limit: int | None = None
    repair: bool = False


def judge_run(stages: Stages, judging: Judging, settings: JudgeSettings) -> list[str]:
    """Judge players of a run; what is committed already isn't judged again.

    Returns:
        The keys of the results, in the order of suites and players; none in processes other than the main one.

    Raises:
        UserError: A player, a model, the questions or the judge can't be had, or it gives no verdict.
    """
    judge = Judge(settings, stages.run.path / "benchmarks/verdicts", judging.repair)
    players = [PlayerOfRun(stages, stages.player(name)) for name in judging.players]
    other = opposing(stages, judging.against)
    if [player.name for player in players] == [other.name]:
        raise UserError(f"--against: {other.name} can't be held against itself: name another player")
    sets = {suite: _questions(stages, suite, judging.questions).limited(judging.limit) for suite in judging.suites}
    if stages.processes.is_main_process:
        judge.check()
    stages.processes.wait_for_everyone()
    keys = []
    for suite, questions in sets.items():
        others = other.answer(questions)  # first, since what isn't the run's may have no answer
        sheets = [player.answer(questions) for player in players if player.name != other.name]
        if stages.processes.is_main_process:
            if suite == "arena":
                keys += [_arena(stages, judge, questions, sheet, others) for sheet in sheets]
            else:
                keys += [_mt_bench(stages, judge, questions, sheet) for sheet in [*sheets, others]]
        stages.processes.wait_for_everyone()
    return keys


def _questions(stages: Stages, suite: str, source: str | None) -> QuestionSet:
    if source is None and suite == "arena":
        return QuestionSet.of_run(stages)
    try:
        return QuestionSet.read(source or MT_BENCH)
    except UserError as error:
        hint = "; give them by --questions FILE" if source is None else ""
        raise UserError(f"{suite}: {error}{hint}") from None


def _arena(stages: Stages, judge: Judge, questions: QuestionSet, sheet: Sheet, other: Sheet) -> str:
    about = {"player": sheet.name, "other": other.name, "cut": sheet.cut, "other_cut": other.cut}
    folder = f"benchmarks/arena/{slug(sheet.name)}-vs-{slug(other.name)}"

    def make() -> tuple[dict[str, Any], Rows]:
        rows = _compare(stages, judge, questions, sheet, other)
        return about | _arena_result(rows), rows

    return _committed(stages, judge, questions, [sheet, other], folder, make)


def _mt_bench(stages: Stages, judge: Judge, questions: QuestionSet, sheet: Sheet) -> str:
    def make() -> tuple[dict[str, Any], Rows]:
        rows = _grade(stages, judge, questions, sheet)
        return {"player": sheet.name, "cut": sheet.cut} | _mt_bench_result(rows), rows

    return _committed(stages, judge, questions, [sheet], f"benchmarks/mt-bench/{slug(sheet.name)}", make)


def _committed(
    stages: Stages,
    judge: Judge,
    questions: QuestionSet,
    sheets: Sequence[Sheet],
    folder: str,
    make: Callable[[], tuple[dict[str, Any], Rows]],
) -> str:
    """The key of a result, which is named by all that it is made from; the endpoint's URL isn't among that."""
    read_at = {"questions": questions.commit} | {sheet.name: sheet.commit for sheet in sheets}
    inputs = {
        "commits": {what: commit for what, commit in read_at.items() if commit},
        "questions": questions.hash,
        "players": {sheet.name: sheet.player for sheet in sheets},
        "answers": {sheet.name: sheet.hash for sheet in sheets},
        "judge": judge.model,
        "sampling": judge.sampling,
        "prompts": PROMPTS,
    }
    artifact = stages.run.artifact(f"{folder}/{slug(judge.model)}-{digest(inputs)[:8]}", "benchmark", inputs)
    if not artifact.is_committed():
        with stages.timed(artifact.key):
            result, rows = make()
        about = {"judge": judge.model, "sampling": judge.sampling, "questions": questions.name}
        with artifact.staging() as place:
            place.mkdir()
            write_json(place / "result.json", about | result)
            write_jsonl(place / "questions.jsonl", rows)
    return artifact.key


# --- two contestants side by side ---


def _compare(stages: Stages, judge: Judge, questions: QuestionSet, sheet: Sheet, other: Sheet) -> Rows:
    """A row for each question, asked in both orders; two equal answers are a tie, and nobody is asked."""
    contests = list(zip(questions.questions, sheet.texts, other.texts, strict=True))
    prompts = [
        [] if mine == theirs else [pairwise_prompt(question, mine, theirs), pairwise_prompt(question, theirs, mine)]
        for question, mine, theirs in contests
    ]
    said = _ask(stages, judge, f"arena: {sheet.name} against {other.name}", prompts, read_preference)
    rows = []
    for (question, mine, theirs), words in zip(contests, said, strict=True):
        shown_first, shown_second = _preferences(words) if words else (0.5, 0.5)
        rows.append(
            {
                "id": question.id,
                "category": question.category,
                "shown_first": shown_first,
                "shown_second": shown_second,
                "length": sum(map(len, mine)),
                "other_length": sum(map(len, theirs)),
                "judge": words,
            }
        )
    if not any(_is_judged(row) for row in rows):
        raise _no_verdict(judge, list(chain.from_iterable(said)))
    return rows


def _arena_result(rows: Rows) -> dict[str, Any]:
    """What the rows come to; those without a verdict in both orders are left out, and counted."""
    judged = [row for row in rows if _is_judged(row)]
    both_orders = [_comparison(row) for row in judged if row["judge"]]
    comparisons = [_comparison(row) for row in judged]
    preferred = [comparison.preference for comparison in comparisons]
    return {
        "win_rate": asdict(win_rate(comparisons)),
        "length_controlled_win_rate": asdict(length_controlled_win_rate(comparisons)),
        "wins": preferred.count(1.0),
        "ties": preferred.count(0.5),
        "losses": preferred.count(0.0),
        "no_verdict": len(rows) - len(judged),
        "equal_answers": len(judged) - len(both_orders),
        "position_bias": asdict(position_bias(both_orders)) if both_orders else None,
        "first_preferred": asdict(first_preferred(both_orders)) if both_orders else None,
        "length": asdict(mean([comparison.length for comparison in comparisons])),
        "other_length": asdict(mean([comparison.other_length for comparison in comparisons])),
    }


def _is_judged(row: dict[str, Any]) -> bool:
    return row["shown_first"] is not None and row["shown_second"] is not None


def _comparison(row: dict[str, Any]) -> Comparison:
    return Comparison(row["shown_first"], row["shown_second"], row["length"], row["other_length"])


def _preferences(words: Sequence[str]) -> tuple[float | None, float | None]:
    """For the player: where it is shown first, and where it is shown second."""
    worth: dict[Preferred | None, float | None] = {"A": 1.0, "tie": 0.5, "B": 0.0, None: None}
    first, second = (worth[read_preference(text)] for text in words)
    return first, None if second is None else 1 - second


# --- grades ---


def _grade(stages: Stages, judge: Judge, questions: QuestionSet, sheet: Sheet) -> Rows:
    """A row for each question, with a grade for each of its turns."""
    answered = list(zip(questions.questions, sheet.texts, strict=True))
    prompts = [
        [grading_prompt(question, texts[: turn + 1]) for turn in range(len(texts))] for question, texts in answered
    ]
    said = _ask(stages, judge, f"mt-bench: {sheet.name}", prompts, read_grade)
    return [
        {
            "id": question.id,
            "category": question.category,
            "grades": [read_grade(text) for text in words],
            "lengths": [len(text) for text in texts],
            "judge": words,
        }
        for (question, texts), words in zip(answered, said, strict=True)
    ]


def _mt_bench_result(rows: Rows) -> dict[str, Any]:
    """What the rows come to; a turn without a grade is left out, and counted."""
    grades = [[float(grade) for grade in row["grades"] if grade is not None] for row in rows]
    turns = range(max(len(row["grades"]) for row in rows))
    by_turn = {str(turn + 1): [_grade_of(row, turn) for row in rows] for turn in turns}
    categories = grades_by([row["category"] for row in rows], grades)
    return {
        "grade": asdict(mean_grade(grades)),
        "turns": {turn: asdict(mean_grade(given)) for turn, given in by_turn.items() if any(given)},
        "categories": {name: asdict(measured) for name, measured in categories.items() if name},
        "no_verdict": sum(grade is None for row in rows for grade in row["grades"]),
    }


def _grade_of(row: dict[str, Any], turn: int) -> list[float]:
    """That of one turn, where there is one."""
    return [float(grade) for grade in row["grades"][turn : turn + 1] if grade is not None]


# --- what both share ---


def _ask(
    stages: Stages, judge: Judge, title: str, prompts: Sequence[Sequence[str]], read: Callable[[str], object | None]
) -> list[list[str]]:
    """What the judge says to each question's prompts.

    Raises:
        UserError: It says nothing that can be read to any of them.
    """
    flat = list(chain.from_iterable(prompts))
    with stages.progress.task(title, judge.missing(flat), "verdicts") as task:
        said = judge.ask(flat, lambda text: read(text) is not None, lambda: task.advance(items=1))
    if said and all(read(text) is None for text in said):
        raise _no_verdict(judge, said)
    words = iter(said)
    return [list(islice(words, len(of_question))) for of_question in prompts]


def _no_verdict(judge: Judge, said: Sequence[str]) -> UserError:
    return UserError(
        f"the judge {judge.model} gives no verdict that can be read on any question. It says, for example: "
        f"{said[-1][-LONGEST_QUOTE:]!r}. Take a model that follows instructions better"
    )

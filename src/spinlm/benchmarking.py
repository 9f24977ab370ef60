"""Benchmarks of a run's players: each task is put to each player once, and its scores are committed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from spinlm.errors import UserError
from spinlm.evaluation.harness import Catalogue, TaskResult, evaluate_task, language_model, lm_eval_version
from spinlm.evaluation.suites import Suite, SuiteTask
from spinlm.files import digest, write_json
from spinlm.hardware import enough_memory
from spinlm.players.models import Player
from spinlm.reporting.benchmarks import FOLDER, SUITE_FILE
from spinlm.rundir import Artifact, CorruptArtifact, RunDir
from spinlm.stages import Stages

STAGE = "benchmark"


@dataclass(frozen=True)
class Settings:
    """How benchmarks are run.

    Attributes:
        iterations: Whose main players are measured.
        limit: Only this many examples of each task, the first ones; None: all.
        batch_size: Requests in a forward pass; None: the device decides. Scores depend on it in the last digits only.
        repair: Measure anew what was measured differently, or isn't what was committed.
    """

    iterations: Sequence[int]
    limit: int | None = None
    batch_size: int | None = None
    repair: bool = False


def run_suites(stages: Stages, suites: Mapping[str, Suite], catalogue: Catalogue, settings: Settings) -> None:
    """Put every suite's tasks to every player; what is committed already isn't done again.

    One player after the other is seated on the one base in memory. Of several processes, the main one works.

    Args:
        stages: Of the run; nothing is made but benchmarks.
        suites: By name; see `find_suite`.
        catalogue: lm-eval's tasks.
        settings: Who is measured, and how.

    Raises:
        UserError: A player isn't there, a task can't be had, or something was measured differently before.
    """
    if stages.processes.is_main_process:
        stages.close()
        for name, suite in suites.items():
            _describe(stages.run, name, suite, settings.limit, settings.repair)
        definitions = {task.task: digest(catalogue.definition(task.task)) for task in _tasks(suites)}
        for player in committed_players(stages, settings.iterations):
            for name, suite in suites.items():
                for task in suite.tasks:
                    artifact = _artifact(stages, name, suite, task, definitions[task.task], player, settings.limit)
                    if not _is_measured(artifact, settings.repair):
                        _measure(stages, artifact, suite, task, player, catalogue, settings)
    stages.processes.wait_for_everyone()


def committed_players(stages: Stages, iterations: Sequence[int]) -> list[Player]:
    """The base and the SFT model, the main players of some iterations, and the control where there is one.

    Raises:
        UserError: One of them isn't there, or isn't what was committed.
    """
    names = ["base", *(["sft"] if stages.recipe.sft is not None else []), *(f"iteration-{t}" for t in iterations)]
    return [stages.player(name) for name in (*names, *(["control"] if stages.has_control() else []))]


def folder_of(suite: str, limit: int | None) -> str:
    """Where a suite's results are kept; those of a try with fewer examples have a place of their own."""
    return f"{FOLDER}/{suite}" if limit is None else f"{FOLDER}/{suite}.limit-{limit}"


def _describe(run: RunDir, name: str, suite: Suite, limit: int | None, repair: bool = False) -> None:
    """Beside the results, what the suite is by now, so that they can be shown wherever the run directory is."""
    description = suite.model_dump(mode="json") | {
        "name": name,
        "limit": limit,
        "tasks": [{"name": task.name, **task.model_dump(mode="json")} for task in suite.tasks],
        "paper": suite.paper and {"source": suite.paper.source, "rows": suite.paper.in_order()},
    }
    artifact = run.artifact(f"{folder_of(name, limit)}/{SUITE_FILE}", STAGE, description)
    if not _is_whole(artifact, repair):
        with artifact.staging() as place:
            write_json(place, description)


def _tasks(suites: Mapping[str, Suite]) -> Iterator[SuiteTask]:
    for suite in suites.values():
        yield from suite.tasks


def _artifact(
    stages: Stages, name: str, suite: Suite, task: SuiteTask, definition: str, player: Player, limit: int | None
) -> Artifact:
    inputs = {
        "player": player.hash,
        "definition": definition,
        "num_fewshot": task.num_fewshot,
        "chat_template": digest(stages.renderer.tokenizer.chat_template) if suite.apply_chat_template else None,
        "limit": limit,
        "precision": stages.recipe.training.precision,
        "lm_eval": lm_eval_version(),
    }
    return stages.run.artifact(f"{folder_of(name, limit)}/{player.name}/{task.name}.json", STAGE, inputs)


def _is_whole(artifact: Artifact, repair: bool) -> bool:
    try:
        return artifact.is_committed()
    except CorruptArtifact:
        if not repair:
            raise
        artifact.run.forget(artifact.key)
        return False


def _is_measured(artifact: Artifact, repair: bool) -> bool:
    if _is_whole(artifact, repair):
        return True
    if (changed := artifact.changed_inputs()) and not repair:
        raise UserError(
            f"{artifact.path}: was measured differently ({', '.join(changed)} changed since): --repair measures anew, "
            "or give the suite's file another name"
        )
    return False


def _measure(
    stages: Stages,
    artifact: Artifact,
    suite: Suite,
    task: SuiteTask,
    player: Player,
    catalogue: Catalogue,
    settings: Settings,
) -> None:
    title, chat = f"{player.name}: {task.title}", suite.apply_chat_template
    memory = enough_memory(title, "", f"Lower --batch-size (now {settings.batch_size or 'as many as seemed to fit'})")
    with memory, stages.timed(artifact.key), stages.players.as_exported(player) as model:
        lm = language_model(
            model,
            stages.renderer.tokenizer,
            settings.batch_size,
            stages.recipe.training.precision,
            lambda total: stages.progress.task(title, total, "requests"),
        )
        result = evaluate_task(lm, catalogue, task.task, task.num_fewshot, chat, settings.limit)
    _check_metric(task, result)
    with artifact.staging() as place:
        write_json(place, {**asdict(result), "batch_size": settings.batch_size or "default"})
    if result.truncated:
        stages.progress.say(f"{title}: some prompts are longer than the model takes, and lost their beginning")


def _check_metric(task: SuiteTask, result: TaskResult) -> None:
    if task.metric is not None and task.metric not in result.scores:
        raise UserError(f"{task.task}: metric {task.metric}: was measured, but gave {'; '.join(result.scores)}")

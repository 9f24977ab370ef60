"""Benchmark suites: files that name lm-eval's tasks, with shots and metrics.

Those that come with spinlm are in `suites/`; any other file of that kind, any task of lm-eval's and any task
file for lm-eval is a suite too.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator, model_validator

from spinlm.config import Section, read_yaml, validated
from spinlm.errors import UserError, nearest
from spinlm.evaluation.harness import Catalogue, is_task_file
from spinlm.paths import expanded


class SuiteTask(Section):
    """One task of a suite.

    Attributes:
        task: lm-eval's name of a task or of a group that has a score; or a task file, seen from the suite's file.
        title: Its column's heading; default: the task's name.
        num_fewshot: Solved examples before each question; default: as the task says.
        metric: The one that is shown, where the task has several: `acc_norm`, or with its filter
            `exact_match,strict-match`. Default: all.
    """

    task: str
    title: str = ""
    num_fewshot: int | None = Field(None, ge=0)
    metric: str | None = None

    @property
    def name(self) -> str:
        """For file names and tables."""
        return slug(Path(self.task).stem if is_task_file(self.task) else self.task)


class Published(Section):
    """Scores from a paper, to be shown beneath a run's.

    Attributes:
        source: Where they are from.
        rows: By model and task, in the unit that is shown.
    """

    source: str
    rows: dict[str, dict[str, float]]

    def in_order(self) -> list[dict[str, Any]]:
        """The rows for a file whose keys are sorted."""
        return [{"model": model, "scores": scores} for model, scores in self.rows.items()]


class Suite(Section):
    """What a suite's file holds.

    Attributes:
        description: For people.
        tasks: In the order in which they are run and shown.
        apply_chat_template: Put the tokenizer's chat template around each request.
        percent: Show shares as percent.
        paper: Scores of a paper for the same tasks.
    """

    description: str = ""
    tasks: list[SuiteTask] = Field(min_length=1)
    apply_chat_template: bool = False
    percent: bool = False
    paper: Published | None = None

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, tasks: list[SuiteTask]) -> list[SuiteTask]:
        names = [task.name for task in tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"each task once, but there are several {', '.join(twice)}: make suites of their own")
        return tasks

    @model_validator(mode="after")
    def _rows_of_these_tasks(self) -> Suite:
        names = {task.name for task in self.tasks}
        for label, row in self.paper.rows.items() if self.paper else []:
            if others := sorted(row.keys() - names):
                raise ValueError(
                    f"paper.rows: {label}: has scores for {', '.join(others)}, which aren't among the tasks"
                )
        return self


def suite_names() -> list[str]:
    """Of the suites that come with spinlm."""
    return sorted(Path(one.name).stem for one in _SHIPPED.iterdir() if is_task_file(one.name))


def find_suite(name: str, catalogue: Catalogue) -> tuple[str, Suite]:
    """A suite and what its results are filed under.

    Args:
        name: Of a suite that comes with spinlm, of a suite's file, of a task of lm-eval's, or of its file.
        catalogue: lm-eval's tasks.

    Raises:
        UserError: There is no such thing, or it isn't what it should be; with the nearest names.
    """
    if is_task_file(name):
        path = expanded(name)
        suite = _read_suite(path) if _is_suite(path) else Suite(tasks=[SuiteTask(task=str(path))])
        name = slug(path.stem)
    elif name in suite_names():
        suite = _read_suite(Path(str(_SHIPPED / f"{name}.yaml")))
    elif name in catalogue.names:
        suite, name = Suite(tasks=[SuiteTask(task=task) for task in catalogue.scored(name)]), slug(name)
    else:
        near = nearest(name, [*suite_names(), *catalogue.names], count=3) or "."
        raise UserError(
            f"--suite {name}: no such suite, nor a task of lm-eval's{near} Suites: {', '.join(suite_names())}, or a "
            "file of your own; tasks: what lm-eval ls tasks lists, or a task file"
        )
    return name, suite.model_copy(update={"tasks": [_checked(task, catalogue) for task in suite.tasks]})


def slug(name: str) -> str:
    """A name as a part of a file's name."""
    words = re.sub(r"-{2,}", "-", re.sub(r"[^\w.-]+", "-", name)).strip("-.")
    return words.encode()[:80].decode(errors="ignore").strip("-.") or "suite"  # a file's name has 255 bytes


_SHIPPED = files("spinlm") / "suites"


def _is_suite(path: Path) -> bool:
    """Whether a YAML file has `tasks`; lm-eval's have `task`, and tags of their own that aren't understood here."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return False  # the reader of task files says what is wrong
    keys = [key.value for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []
    return "tasks" in keys


def _read_suite(path: Path) -> Suite:
    suite = validated(Suite, read_yaml(path, "suite"), where=str(path))
    return suite.model_copy(update={"tasks": [_beside(path, task) for task in suite.tasks]})


def _beside(path: Path, task: SuiteTask) -> SuiteTask:
    """Task files are named as seen from the suite's file."""
    return task.model_copy(update={"task": str(path.parent / task.task)}) if is_task_file(task.task) else task


def _checked(task: SuiteTask, catalogue: Catalogue) -> SuiteTask:
    """Refused now, not when other tasks have been run for hours; with the metric's name in full."""
    members = catalogue.scored(task.task)
    if members != [task.task]:
        raise UserError(f"{task.task}: has no score of its own: name its tasks: {', '.join(members)}")
    catalogue.check(task.task, task.num_fewshot)
    metric = task.metric and find_metric(task.metric, catalogue.metrics(task.task), task.task)
    return task.model_copy(update={"metric": metric, "title": task.title or task.name})


def find_metric(metric: str, known: list[str], task: str) -> str:
    """A metric with its filter, as lm-eval's results have it.

    Args:
        metric: With or without filter.
        known: What the task declares; nothing where only its code says so.
        task: For the message.

    Raises:
        UserError: The task has no such metric, or several.
    """
    fitting = [pair for pair in known if metric in (pair, pair.partition(",")[0])]
    if len(fitting) == 1:
        return fitting[0]
    if not known:
        return metric if "," in metric else f"{metric},none"
    raise UserError(f"{task}: metric {metric}: give one of {'; '.join(known)}")

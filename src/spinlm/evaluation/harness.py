"""lm-evaluation-harness: its tasks, and a player's scores on one of them. The only place that imports lm_eval.

Scores are those of lm-eval's own command on the exported player: the same requests, seeds and arithmetic.
"""

from __future__ import annotations

import copy
import glob
import importlib.util
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from jinja2.sandbox import SandboxedEnvironment

from spinlm.errors import UserError, first_line, nearest
from spinlm.files import file_hash, file_hashes
from spinlm.paths import expanded

TASK_FILES = (".yaml", ".yml")
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
"""The precision of a recipe's training, in lm-eval's words."""

PYTHON_TAG = "tag:yaml.org,2002:python/"
"""What YAML tags begin with by which a loader that isn't a safe one makes anything."""

DEEPEST = 100
"""Collections within collections, in a task file."""

MOST_IN_A_BATCH = 64
"""Where lm-eval itself looks how many requests fit into a GPU's memory."""


class Counter(Protocol):
    """Counts what is done of what was announced."""

    def advance(self, tokens: int = 0, items: int = 0) -> None: ...


Announce = Callable[[int], AbstractContextManager[Counter]]
"""Takes how many requests there are, and gives who counts them."""


@dataclass(frozen=True)
class TaskResult:
    """A player's scores on a task.

    Attributes:
        scores: By `metric,filter`, in lm-eval's unit (shares from 0 to 1): `value`, and `stderr` where there is one.
        parts: The same of a group's tasks, by name.
        higher_is_better: By metric; None where a group's tasks don't agree.
        num_fewshot: Solved examples before each question; None where a group's tasks have different numbers.
        examples: How many were asked.
        truncated: Whether some prompt was longer than the model takes, and lost its beginning.
    """

    scores: dict[str, dict[str, float | None]]
    parts: dict[str, dict[str, dict[str, float | None]]]
    higher_is_better: dict[str, bool | None]
    num_fewshot: int | None
    examples: int
    truncated: bool


def lm_eval_version() -> str:
    """Of the lm-eval that is installed.

    Raises:
        UserError: None is.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("benchmarks need lm-evaluation-harness: pip install 'spinlm[eval]'")
    return version("lm_eval")


class Catalogue:
    """The tasks that lm-eval has by name, and those of local YAML files."""

    def __init__(self) -> None:
        """Nothing is read yet.

        Raises:
            UserError: lm-eval isn't installed.
        """
        lm_eval_version()

    @property
    def names(self) -> list[str]:
        """Of all tasks, groups and tags."""
        return list(_index().all_tasks)

    def scored(self, task: str) -> list[str]:
        """The task itself, where it has a score; of a tag, or of a group without a score of its own, its members.

        Raises:
            UserError: They are more than names, so that they aren't the tasks that go by these names.
        """
        config = self.config(task)
        members = _members(config)
        if not members or config.get("aggregate_metric_list"):
            return [task]
        if any(not isinstance(one, str) for one in config["task"]):
            raise UserError(
                f"{task}: a group without a score of its own, whose members have settings of their own: write a suite "
                f"file with those that you want: {', '.join(members)}"
            )
        return [name for member in members for name in self.scored(member)]

    def config(self, task: str) -> dict[str, Any]:
        """What a task's YAML says, the files that it includes read in; of a tag, its members.

        Raises:
            UserError: There is no such task, or its file can't be read.
        """
        if is_task_file(task):
            return _read_task_file(Path(task))
        entry = _index().task_index.get(task)
        if entry is None:
            raise UserError(f"{task}: lm-eval {lm_eval_version()} has no such task{nearest(task, self.names, count=3)}")
        return dict(entry.cfg or {"tag": task, "task": sorted(entry.tags)})

    def definition(self, task: str) -> Any:
        """A JSON value that changes when the task does: its YAML, its Python functions' files, its local data.

        Of a dataset on the hub it holds the name alone.
        """
        config = self.config(task)
        members = [self.definition(name) for name in self._known_members(config)]
        return {"config": _portable(config), "data": _local_data(config), "members": members}

    def metrics(self, task: str) -> list[str]:
        """The `metric,filter` pairs that a task, or a group for its tasks, declares; none where only code says so."""
        aggregated = self.config(task).get("aggregate_metric_list")
        pairs = dict.fromkeys(pair for config in self._tasks_of(task) for pair in _declared_metrics(config))
        names = {pair.partition(",")[0] for pair in pairs} if aggregated is None else {a["metric"] for a in aggregated}
        return [pair for pair in pairs if pair.partition(",")[0] in names]

    def check(self, task: str, num_fewshot: int | None) -> None:
        """Refuse what can't be measured here, before any dataset is fetched.

        Raises:
            UserError: It runs a model's programs or code of a task file's, has images in it, or keeps to another
                number of examples.
        """
        if is_task_file(task):
            _refuse_code(Path(task))
        for config in self._tasks_of(task):
            name = config.get("task")
            if config.get("unsafe_code"):
                raise UserError(
                    f"{name}: runs programs that the model writes, which isn't done here: export the player, and use "
                    "lm-eval's own command where that does no harm"
                )
            if config.get("doc_to_image") or config.get("doc_to_audio"):
                raise UserError(f"{name}: has images or sound in its questions; these are models of text")
            if num_fewshot and config.get("num_fewshot") == 0:
                raise UserError(f"{name}: is asked without examples, as the task itself says; take num_fewshot out")

    def _tasks_of(self, task: str) -> Iterator[dict[str, Any]]:
        """What the YAML says of a task; of a group or a tag, of all its tasks that have a file."""
        config = self.config(task)
        if not _members(config):
            yield config
        for name in self._known_members(config):
            yield from self._tasks_of(name)

    def _known_members(self, config: Mapping[str, Any]) -> list[str]:
        """A group's members that have a file; the others are in the group's own."""
        return [name for name in _members(config) if name in _index().task_index]

    def load(self, task: str) -> Any:
        """The task, or a group's tasks, with their datasets, as lm-eval's `evaluate` takes them.

        Raises:
            UserError: A dataset can't be had, or something that the task needs isn't installed.
        """
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_defaults=False) if is_task_file(task) else _index()
        if is_task_file(task):
            _refuse_code(Path(task))
        _render_in_a_sandbox()
        try:
            with listening():
                return manager.load([task])
        except Exception as error:  # a network, a login, a broken file, a missing package, a task's own code
            raise UserError(f"{task}: can't be loaded: {_reason(error)}; what is measured already is kept") from None


@cache
def _index() -> Any:
    """lm-eval's own tasks; finding them all takes some seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def is_task_file(task: str) -> bool:
    """Or a name."""
    return task.endswith(TASK_FILES)


def evaluate_task(
    lm: Any, catalogue: Catalogue, task: str, num_fewshot: int | None, chat_template: bool, limit: int | None
) -> TaskResult:
    """A player's scores on a task, as lm-eval's own command would have them.

    Args:
        lm: The player; see `language_model`.
        catalogue: Where the task is found.
        task: Its name, or its file.
        num_fewshot: Solved examples before each question; None: as the task says.
        chat_template: Whether requests are conversations.
        limit: Ask only this many examples of each task, the first ones; None: all.

    Raises:
        UserError: The task can't be loaded, or this model can't be asked it.
    """
    import lm_eval
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    loaded = catalogue.load(task)
    for one in loaded["tasks"].values():
        _prepare(one, num_fewshot, DEFAULT_OTHER_SEED)
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    try:
        with listening() as heard:
            results = lm_eval.evaluate(
                lm,
                loaded,
                limit=limit,
                log_samples=False,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
            )
    except Exception as error:
        of_the_task = isinstance(error, (RecursionError, NotImplementedError))  # though they are RuntimeErrors
        if isinstance(error, (RuntimeError, OSError, MemoryError)) and not of_the_task:
            raise  # the machine's; else the task's: its templates, its filters, its own code
        raise UserError(f"{task}: lm-eval can't ask this model that: {_reason(error)}") from error
    names = list(loaded["groups"]) or list(loaded["tasks"])
    return _result(results, names[0], "truncat" in " ".join(heard).lower())


def language_model(model: Any, tokenizer: Any, batch_size: int | None, precision: str, announce: Announce) -> Any:
    """A player that is loaded already, as lm-eval's Hugging Face model.

    Args:
        model: In evaluation mode, on its device.
        tokenizer: The run's; it isn't changed.
        batch_size: Requests in a forward pass; None: as many as fit into the GPU's memory, 4 on a CPU.
        precision: `bf16` or `fp16` autocast, or empty.
        announce: Shows how far each kind of request is.
    """
    from lm_eval.models.huggingface import HFLM

    class SeatedPlayer(HFLM):  # type: ignore[misc]
        def loglikelihood(self, requests: list[Any], **options: Any) -> Any:
            return self._counted(super().loglikelihood, requests, options)

        def loglikelihood_rolling(self, requests: list[Any], **options: Any) -> Any:
            return self._counted(super().loglikelihood_rolling, requests, options)

        def generate_until(self, requests: list[Any], **options: Any) -> Any:
            return self._counted(super().generate_until, requests, options)

        def _counted(self, answer: Callable[..., Any], requests: list[Any], options: dict[str, Any]) -> Any:
            with announce(len(requests)) as counter:
                self.set_cache_hook(_CountingHook(counter))
                return answer(requests, **{**options, "disable_tqdm": True})

    default = 4 if model.device.type == "cpu" else "auto"
    with listening():
        return SeatedPlayer(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size or default,
            max_batch_size=MOST_IN_A_BATCH,
            mixed_precision_dtype=DTYPES.get(precision),
        )


@dataclass(frozen=True)
class _CountingHook:
    """Where lm-eval would keep answers, one by one, they are counted."""

    counter: Counter

    def add_partial(self, _kind: str, _request: Any, _answer: Any) -> None:
        self.counter.advance(0, 1)


@contextmanager
def listening() -> Iterator[list[str]]:
    """lm-eval's warnings are kept from the terminal, and handed over."""
    logger, heard = logging.getLogger("lm_eval"), list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield heard
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _prepare(task: Any, num_fewshot: int | None, seed: int) -> None:
    """As lm-eval's command does it."""
    default = task.get_config("num_fewshot")
    if default != 0 and num_fewshot is not None:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif default is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=seed)


def _result(results: Mapping[str, Any], name: str, truncated: bool) -> TaskResult:
    scores = {one: _scores(row) for one, row in results["results"].items()}
    members = results["group_subtasks"].get(name, [])
    of_tasks = [results["n-samples"][one]["effective"] for one in results["n-samples"]]
    return TaskResult(
        scores=scores[name],
        parts={one: of_one for one, of_one in scores.items() if one != name} if members else {},
        higher_is_better=dict(results["higher_is_better"].get(name, {})),
        num_fewshot=results["n-shot"].get(name),
        examples=sum(of_tasks),
        truncated=truncated,
    )


def _scores(row: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """`{"acc,none": 0.5, "acc_stderr,none": 0.1, …}` as value and standard error of each metric."""
    scores = {}
    for key, value in row.items():
        metric, comma, by = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            scores[key] = {"value": _number(value), "stderr": _number(row.get(f"{metric}_stderr,{by}"))}
    return scores


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float, np.number)) and math.isfinite(value)
    return float(value) if is_number else None


def _declared_metrics(config: Mapping[str, Any]) -> list[str]:
    filters = [one["name"] for one in config.get("filter_list") or [{"name": "none"}]]
    metrics = [str(one["metric"]).rpartition(".")[2] for one in config.get("metric_list") or []]
    return [f"{metric},{by}" for by in filters for metric in metrics]


def _members(config: Mapping[str, Any]) -> list[str]:
    """A group's or tag's tasks and groups, by name."""
    task = config.get("task")
    if not isinstance(task, list):
        return []
    return [one if isinstance(one, str) else one.get("task") or one.get("group") for one in task]


def _read_task_file(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config = load_yaml(path, resolve_func=False)
    except FileNotFoundError:
        near = nearest(path.name, [one.name for one in path.parent.glob("*")])
        raise UserError(f"{path}: no such file{near}") from None
    except Exception as error:  # whatever YAML can be wrong in
        raise UserError(f"{path}: not a task file of lm-eval's: {_reason(error)}") from None
    if "group" in config:
        raise UserError(f"{path}: a group of lm-eval's: give a suite file with its tasks instead")
    if "task" not in config:
        raise UserError(f"{path}: neither a suite (it has no tasks) nor a task file of lm-eval's (it has no task)")
    return dict(config)


def _refuse_code(path: Path) -> None:
    """Refuse a task file that has lm-eval run Python of its own choice: functions, or metrics that lm-eval hasn't.

    Those that come with lm-eval may, also where a task file includes them.

    Raises:
        UserError: With the line.
    """
    import lm_eval
    from lm_eval.api import metrics  # noqa: F401 (registers them)
    from lm_eval.api.registry import metric_registry

    what_to_do = "which isn't done here: export the player, and use lm-eval's own command where that does no harm"
    left, seen = [expanded(path)], set[Path]()
    while left:
        file = left.pop().resolve()
        if file in seen or file.is_relative_to(Path(lm_eval.__file__).parent):
            continue
        seen.add(file)
        for node in _nodes(file):
            if node.tag.startswith(("!", PYTHON_TAG)):
                raise UserError(f"{file}: line {node.start_mark.line + 1}: runs Python ({node.tag}), {what_to_do}")
        left += [file.parent / included for included in _included(file)]
    for one in _read_task_file(path).get("metric_list") or []:
        name = one.get("metric") if isinstance(one, dict) else one
        if name not in metric_registry or one.get("hf_evaluate"):
            raise UserError(
                f"{path}: lm-eval has no metric {name!r}, and would fetch code that computes it, {what_to_do}"
            )


def _nodes(file: Path) -> Iterator[yaml.Node]:
    """All of a YAML file's, by the parser that lm-eval reads it with.

    Raises:
        UserError: It can't be read so.
    """
    from lm_eval.tasks._yaml_loader import _Base

    try:
        content = file.read_bytes()
        _check_depth(yaml.parse(content, Loader=_Base))
        left = [yaml.compose(content, Loader=_Base)]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not a task file of lm-eval's: {_reason(error)}") from None
    seen = set[int]()
    while left:
        node = left.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            left += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            left += node.value


def _check_depth(events: Iterator[yaml.Event]) -> None:
    """Whoever reads a file that is nested too deeply may come to the end of the stack."""
    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")


def _included(file: Path) -> list[str]:
    """The names after `include`, wherever that stands."""
    pairs = [pair for node in _nodes(file) if isinstance(node, yaml.MappingNode) for pair in node.value]
    values = [value for key, value in pairs if key.value == "include"]
    nodes = [one for value in values for one in (value.value if isinstance(value, yaml.SequenceNode) else [value])]
    return [node.value for node in nodes if isinstance(node, yaml.ScalarNode)]


def _render_in_a_sandbox() -> None:
    """The templates of tasks, which lm-eval renders with all of Python within their reach."""
    from lm_eval import utils

    if not isinstance(utils.env, SandboxedEnvironment):
        sandbox = SandboxedEnvironment(
            loader=utils.env.loader,
            undefined=utils.env.undefined,
            keep_trailing_newline=utils.env.keep_trailing_newline,
        )
        sandbox.filters.update(utils.env.filters)
        utils.env = sandbox


def _portable(value: Any) -> Any:
    """A task's settings, where a Python function's place on the disk gives way to its file's hash."""
    if isinstance(value, dict):
        return {str(key): _portable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_portable(one) for one in value]
    if isinstance(value, str) and value.startswith("/") and "\n" not in value:
        place, _, function = value.rpartition(".")
        file = Path(place).parent / (Path(place).name.replace(".", "/") + ".py")
        return [function, file_hash(file)] if file.is_file() else value
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _local_data(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The hashes of those files of a task's dataset that are on this machine, by the pattern that names them."""
    patterns = _strings([config.get("dataset_path"), config.get("dataset_kwargs")])
    found = {one: sorted(glob.glob(one, recursive=True)) for one in patterns}  # noqa: PTH207 (absolute or not)
    return {
        pattern: {str(Path(path, name)): value for path in paths for name, value in file_hashes(Path(path)).items()}
        for pattern, paths in found.items()
        if paths
    }


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for part in parts for text in _strings(part)]


def _reason(error: Exception) -> str:
    """The first line, with the error's name where that says more than the words, as a KeyError's."""
    line = first_line(error)
    return line if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: {line}"

"""Task files from somebody else: they run nothing, by no way that lm-eval has to run something."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import lm_eval
import pytest

from integration import tasks
from integration.command import refused, rows, spinlm
from spinlm.errors import UserError
from spinlm.evaluation.harness import Catalogue


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    """A finished run, and tasks beside it; `code.py` would make a file."""
    shutil.copytree(finished, tmp_path / "place", symlinks=True)
    folder = tasks.write(tmp_path / "place/tasks")
    (folder / "code.py").write_text("open('owned', 'w')\ndef text(doc):\n    return 'x'\n")
    return tmp_path / "place"


FUNCTION = "doc_to_text: !function code.text"
CODE = {
    "a function": ("pick.yaml", FUNCTION, "pick.yaml: line 14: runs Python (!function)"),
    "a function that is included": ("pick.yaml", "include: other.yaml", "other.yaml: line 1: runs Python"),
    "a function deep inside": ("pick.yaml", "metadata: [{a: [!function code.text]}]", "runs Python"),
    "another tag": ("pick.yaml", "metadata: !!python/name:os.system", "not a task file"),
    "a metric of its own": ("pick.yaml", "metric_list: [{metric: ./metric}]", "lm-eval has no metric './metric'"),
    "a metric from the hub": ("pick.yaml", "metric_list: [{metric: acc, hf_evaluate: true}]", "no metric 'acc'"),
}


@pytest.mark.parametrize("name", CODE)
def test_a_task_file_that_runs_code_is_refused(place: Path, name: str) -> None:
    file, line, words = CODE[name]
    path = place / "tasks" / file
    lines = [old for old in path.read_text().splitlines() if old.partition(":")[0] != line.partition(":")[0]]
    if line.startswith("metric_list"):
        lines = [old for old in lines if not old.startswith("  - {metric")]
    path.write_text("\n".join([*lines, line]) + "\n")
    (place / "tasks/other.yaml").write_text(FUNCTION + "\n")
    for suite in ("tasks/pick.yaml", "tasks/mine.yaml"):
        refused(spinlm("evaluate", "runs/recipe", "--suite", suite, cwd=place), "tasks/", words)
    assert not list(place.rglob("owned"))


def _in_utf_16(path: Path) -> None:
    path.write_bytes(path.read_text().encode("utf-16"))


def _deep(path: Path) -> None:
    path.write_text(path.read_text() + f"metadata: {{x: {'[' * 3000}{']' * 3000}}}\n")


def _in_another_encoding(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"# caf\xe9\n")


def _with_a_python_tag(path: Path) -> None:
    path.write_text(path.read_text().replace("!function code.text", "!!python/name:code.text"))


def _with_a_tag_of_its_own(path: Path) -> None:
    path.write_text(f"%TAG !x! !func\n---\n{path.read_text().replace('!function', '!x!tion')}")


@pytest.mark.parametrize("hide", [_in_utf_16, _deep, _in_another_encoding, _with_a_python_tag, _with_a_tag_of_its_own])
@pytest.mark.parametrize("included", [False, True])
def test_code_that_only_another_reader_would_find(place: Path, hide: Callable[[Path], None], included: bool) -> None:
    path = place / "tasks/pick.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("doc_to_text")]
    code = path.with_name("other.yaml") if included else path
    path.write_text("\n".join([*lines, "include: other.yaml" if included else FUNCTION]) + "\n")
    if included:
        code.write_text(FUNCTION + "\n")
    hide(code)
    refused(spinlm("evaluate", "runs/recipe", "--suite", "tasks/pick.yaml", cwd=place), "tasks/")
    with pytest.raises(UserError, match="tasks/"):
        Catalogue().load(str(path))
    assert not list(place.rglob("owned"))


def test_code_that_is_included_by_a_way_through_lm_evals_own_files(place: Path) -> None:
    path = place / "tasks/pick.yaml"
    (place / "tasks/other.yaml").write_text(FUNCTION + "\n")
    inside = Path(lm_eval.__file__).parent
    way = inside / os.path.relpath(place.resolve() / "tasks/other.yaml", inside)
    lines = [line for line in path.read_text().splitlines() if not line.startswith("doc_to_text")]
    path.write_text("\n".join([*lines, f"include: {way}"]) + "\n")
    refused(spinlm("evaluate", "runs/recipe", "--suite", "tasks/pick.yaml", cwd=place), "other.yaml: line 1: runs")
    assert not list(place.rglob("owned"))


TEMPLATES = {
    "{{ cycler.__init__.__globals__.os.popen('touch owned').read() }}": "is unsafe",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() if question != 'FIRST' }}": "ask this model that: RecursionError",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_task_files_templates_are_rendered_in_a_sandbox(place: Path, template: str) -> None:
    path = place / "tasks/say.yaml"
    escape = template.replace("FIRST", rows(place / "tasks/say.jsonl")[0]["question"])  # on which it is tried at once
    text = path.read_text().replace('doc_to_text: "{{question}}\\n"', f'doc_to_text: "{escape}"')
    assert escape in text
    path.write_text(text)
    arguments = ("evaluate", "runs/recipe", "--suite", "tasks/say.yaml", "--iterations", "best", "--limit", "2")
    refused(spinlm(*arguments, cwd=place), "say.yaml", TEMPLATES[template])
    assert not list(place.rglob("owned"))

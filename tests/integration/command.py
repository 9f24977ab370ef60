"""The command line as people use it, and what it leaves behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

import tiny
from spinlm.cli import main
from spinlm.rundir import RunDir

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "spinlm")
"""What starts the command in two processes."""

KILL_AT = Path(__file__).with_name("kill_at.py")

RECIPE: dict[str, Any] = {
    "iterations": 2,
    "model": {"name": "./model"},
    "data": {"source": "data.jsonl", "held_out": 3, "max_prompt_tokens": 60, "max_length": 100},
    "adapter": {"r": 4},
    "sft": {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "save_steps": 1,
    },
    "generation": {"max_new_tokens": 12, "shard_size": 4, "batch_size": 4},
    "training": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_steps": 1,
    },
}
"""12 examples to train on in 3 shards, 3 held out; 3 steps of SFT, 3 of iteration 0, 6 of iteration 1."""

ROWS = 15

NOT_REPEATED = ("lock", "timings.jsonl", "report.html")
"""The files in which two equal runs may differ."""


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    code: int
    out: str
    err: str


def spinlm(*arguments: str, cwd: Path) -> Outcome:
    """`spinlm ARGUMENTS` in this process: where it is the command that matters, not the process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        _inside(cwd),
        mock.patch.object(sys, "argv", ["spinlm", *arguments]),
        mock.patch.dict(os.environ),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Outcome(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _inside(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def spinlm_process(*arguments: str, cwd: Path, launcher: tuple[str, ...] = ("-m", "spinlm"), **env: str) -> Outcome:
    """`python -m spinlm ARGUMENTS`, a process of its own."""
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def succeeded(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, f"{outcome.out}\n{outcome.err}"
    return outcome


def refused(outcome: Outcome, *words: str) -> str:
    """The one message of a command that was refused, which has these words in it."""
    assert outcome.code == 2, f"{outcome.code}\n{outcome.out}\n{outcome.err}"
    assert "Traceback" not in outcome.out + outcome.err
    assert outcome.err.count("spinlm: ") == 1
    assert outcome.err.startswith("spinlm: ")
    for word in words:
        assert word in outcome.err
    return outcome.err


def new_place(directory: Path, model: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """A directory with a model, a dataset and a recipe in it, as somebody would start from."""
    directory.mkdir(exist_ok=True)
    shutil.copytree(model, directory / "model")
    tiny.write_dataset(directory / "data.jsonl", rows=ROWS)
    write_recipe(directory / "recipe.yaml", changes)
    return directory


def write_recipe(path: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """The recipe above; a change replaces a whole section's keys one by one, or the section by None."""
    recipe = json.loads(json.dumps(RECIPE))
    for key, value in (changes or {}).items():
        old = recipe.get(key)
        recipe[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def contents(run: Path, without: tuple[str, ...] = NOT_REPEATED) -> dict[str, bytes | str]:
    """Every file of a run by its name, byte for byte, empty directories and the targets of links included."""
    found: dict[str, bytes | str] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if name in without:
            continue
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_file():
            found[name] = path.read_bytes()
        elif not any(path.iterdir()):
            found[name] = "empty directory"
    return found


def differing(one: Path, other: Path) -> list[str]:
    """The names of the files that differ between two runs, or that only one of them has."""
    mine, theirs = contents(one), contents(other)
    return sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def killed_at(*plan: dict[str, str] | None, arguments: tuple[str, ...], cwd: Path) -> None:
    """Start the command once for each item of a plan: it is killed at a place, or ends by itself at None."""
    outcome = spinlm_process(json.dumps(plan), *arguments, cwd=cwd, launcher=(str(KILL_AT),))
    codes = json.loads(outcome.out.splitlines()[-1])
    assert codes == [0 if place is None else -signal.SIGKILL for place in plan], f"{codes}\n{outcome.err}"


@dataclass(frozen=True)
class Waiting:
    """A command that has stopped somewhere.

    Attributes:
        pid: The command's own.
        said: What it had said by then.
    """

    _parent: subprocess.Popen[str]
    pid: int
    said: str

    def next_error_line(self) -> str:
        assert self._parent.stderr is not None
        return self._parent.stderr.readline()

    def go_on(self) -> Outcome:
        """Let it go on to its end. Its code is minus the signal, where one ended it."""
        out, err = self._parent.communicate("\n")
        *lines, codes = out.splitlines()
        return Outcome(json.loads(codes)[0], self.said + "\n".join(lines), err)

    def kill(self) -> None:
        """End it, if it is still there."""
        if self._parent.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self._parent.communicate()


def waiting_at(
    matching: str, arguments: tuple[str, ...], cwd: Path, call: str = "spinlm.rundir:Artifact._commit"
) -> Waiting:
    """The command as a process that has stopped before it commits there, or before another call."""
    where = {"call": call, "matching": matching, "moment": "wait"}
    process = subprocess.Popen(
        [sys.executable, str(KILL_AT), json.dumps([where]), *arguments],
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        if line.startswith("waiting "):
            return Waiting(process, int(line.split()[1]), said)
        said += line
    raise AssertionError(f"never came to {matching}: {said}\n{process.communicate()[1]}")


def before(call: str, matching: str) -> dict[str, str]:
    """A place to be killed at."""
    return {"call": call, "matching": matching, "moment": "before"}


def after(call: str, matching: str) -> dict[str, str]:
    """A place to be killed at."""
    return {"call": call, "matching": matching, "moment": "after"}


def forget(run: Path, *beginnings: str) -> None:
    """Undo the artifacts whose keys begin so."""
    directory = RunDir(run)
    for record in directory.records():
        if record["key"].startswith(beginnings):
            directory.forget(record["key"])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


RECORDED = "spinlm.rundir:write_json"
SHOWN = "spinlm.workshop:Workshop._show_training"
"""Called when a step of a training is logged."""
CHECKPOINTED = "spinlm.training.checkpoints:write_json"

KILLED_IN_EVERY_STAGE = (
    after(CHECKPOINTED, "checkpoints/sft/.*/checkpoint-1.json"),
    after(RECORDED, "commits/sft--training.jsonl.json"),  # its log is committed, its adapter isn't
    after(RECORDED, "commits/iterations--0--synthetic--00001"),  # between two shards
    before(RECORDED, "commits/evaluation--base--greedy"),  # renamed to its place, but not recorded
    before(RECORDED, "commits/iterations--0--opponent_logprobs--00001"),
    before(CHECKPOINTED, "checkpoints/iterations/0/.*/checkpoint-2.json"),  # written, but not yet known as whole
    before(RECORDED, "commits/iterations--0--adapter.json"),
    before("spinlm.rundir:Artifact._commit", "iterations/1/synthetic/00002"),  # still in staging
    after(RECORDED, "commits/iterations--1--opponent_logprobs--00000"),
    after(CHECKPOINTED, "checkpoints/iterations/1/.*/checkpoint-3.json"),  # the one before is still there
    after(RECORDED, "commits/iterations--1--training.jsonl.json"),
    before("spinlm.rundir:RunDir.remove_checkpoints", "iterations/1"),
    after(RECORDED, "commits/evaluation--iteration-1--measures"),
    after(CHECKPOINTED, "checkpoints/control/.*/checkpoint-4.json"),
    before("spinlm.rundir:RunDir.point", "best"),
)

"""Run directories in which anything has been changed, records that fit the change among them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import made_run
from fuzz.cases import accepted_or_refused, cases
from integration.command import contents, spinlm, succeeded
from spinlm.errors import UserError
from spinlm.files import digest, file_hashes, read_json, sealed, unsealed, write_json
from spinlm.training.checkpoints import mark

COMMANDS = {
    "status": ("status", "run"),
    "report": ("report", "run"),
    "compare": ("report", "run", "whole"),
    "export": ("export", "run", "out"),
    "export a number": ("export", "run", "out", "--iteration", "1"),
    "export sft": ("export", "run", "out", "--iteration", "sft"),
}

PLAYING = {
    "run": ("run", "recipe.yaml", "evaluation.control=true", "run_dir=run"),
    "evaluate": ("evaluate", "run"),
}
"""What reads a finished run whole, and by a model, and does nothing where nothing is changed."""

scalars = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars | st.sampled_from(["../../x", "/etc/passwd", "\0", "\ud800", "x" * 300, "", "."]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A run that looks finished and can be exported, and what isn't its own beside it."""
    place = tmp_path_factory.mktemp("fuzzed")
    made = made_run.plausible(place / "whole", examples=4, iterations=2, steps=3)
    for key in ("sft", "iterations/0", "iterations/1", "control"):
        with made.run.artifact(f"{key}/adapter", "train", {}).staging() as staged:
            staged.mkdir()
            (staged / "adapter_config.json").write_text("{}")
            (staged / "adapter_model.safetensors").write_bytes(b"weights")
    made.run.point("best", "iterations/1/adapter")
    made.run.point("latest", "iterations/1/adapter")
    header = unsealed(read_json(made.path / "run.json"))
    header["recipe"]["model"]["name"] = str(tiny_llama)
    write_json(made.path / "run.json", sealed(header))
    checkpoint = made.path / "checkpoints/iterations/1/abc/checkpoint-2"
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / "trainer_state.json", {"log_history": [{"step": 1, "loss": 0.5}]})
    mark(checkpoint)
    (place / "elsewhere").mkdir()
    (place / "elsewhere/thesis.tex").write_text("keep")
    return place


def _change_json(value: Any, draw: st.DrawFn) -> Any:
    """Something in it, or all of it, is something else now."""
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value)))
        if not draw(st.integers(0, 4)):
            return {name: one for name, one in value.items() if name != key}
        return {**value, key: _change_json(value[key], draw)}
    if isinstance(value, list) and value and draw(st.integers(0, 5)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], _change_json(value[at], draw), *value[at + 1 :]]
    return draw(anything)


def _change(path: Path, draw: st.DrawFn) -> None:
    content = path.read_bytes() if path.is_file() else b""
    kind = draw(
        st.sampled_from(["json", "json", "json", "rows", "flip", "cut", "bytes", "gone", "dir", "link", "pipe"])
    )
    if kind in ("json", "rows"):
        try:
            parts = [content] if kind == "json" else content.splitlines()
            changed = [json.dumps(_change_json(json.loads(part), draw)).encode() for part in parts]
            path.write_bytes(b"\n".join(changed) + b"\n")
            return
        except (ValueError, RecursionError):
            kind = "flip"
    if kind == "flip" and content:
        at = draw(st.integers(0, len(content) - 1))
        path.write_bytes(content[:at] + draw(st.binary(min_size=1, max_size=2)) + content[at + 1 :])
    elif kind == "cut" and content:
        path.write_bytes(content[: draw(st.integers(0, len(content) - 1))])
    elif kind in ("bytes", "flip", "cut"):
        path.write_bytes(draw(st.binary(max_size=30)))
    else:
        path.unlink()
        if kind == "dir":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(
                draw(st.sampled_from(["/etc/passwd", "../elsewhere", path.name, "nowhere", "run.json", "."]))
            )
        elif kind == "pipe":
            os.mkfifo(path)


def _forge(run: Path) -> None:
    """Let every record, the header and every mark fit what is there now, as far as that is possible."""
    for path in (run / "run.json", *(run / "commits").glob("*.json"), *run.glob("checkpoints/**/checkpoint-*.json")):
        try:
            content = json.loads(path.read_text())
            content.pop("own_hash", None)
            if path.parent.name == "commits" and (run / content["key"]).exists() and not path.is_symlink():
                content["files"] = file_hashes(run / content["key"])
                content["hash"] = digest(content["files"])
            if path.match("checkpoint-*.json"):
                content = file_hashes(path.with_suffix(""))
            path.write_text(json.dumps(sealed(content)))
        except (ValueError, TypeError, KeyError, OSError, AttributeError):
            continue


def _spinlm(*arguments: str, cwd: Path) -> None:
    outcome = spinlm(*arguments, cwd=cwd)
    (outcome.out + outcome.err).encode()
    assert "Traceback" not in outcome.out + outcome.err
    if outcome.code:
        assert outcome.code == 2, outcome
        assert outcome.err.count("spinlm: ") == 1, outcome
        raise UserError(outcome.err)


def _copy(whole: Path) -> Path:
    """The run, to be changed, and nothing of what an earlier command has left."""
    for name in ("run", "out", "report", "comparison.html"):
        shutil.rmtree(whole / name, ignore_errors=True)
        (whole / name).unlink(missing_ok=True)
    return shutil.copytree(whole / "whole", whole / "run", symlinks=True)


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_not_changed_is_accepted(whole: Path, command: str, forged: bool) -> None:
    run = _copy(whole)
    if forged:
        _forge(run)
    succeeded(spinlm(*COMMANDS[command], cwd=whole))


def test_a_forged_change_is_read(whole: Path) -> None:
    run = _copy(whole)
    header = read_json(run / "run.json")
    header["recipe"]["iterations"] = 7
    (run / "run.json").write_text(json.dumps(header))
    _forge(run)
    assert "iteration 6" in succeeded(spinlm("status", "run", cwd=whole)).out


@cases(0.05)
@given(data=st.data(), command=st.sampled_from(sorted(COMMANDS)), forged=st.booleans(), count=st.integers(1, 3))
def test_run_directories(whole: Path, data: st.DataObject, command: str, forged: bool, count: int) -> None:
    _changed(whole, data, forged, count)
    accepted_or_refused(f"run directories: {command}", lambda: _spinlm(*COMMANDS[command], cwd=whole))
    assert contents(whole / "elsewhere") == {"thesis.tex": b"keep"}


@pytest.fixture(scope="module")
def played(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has been played, and what isn't its own beside it."""
    place = shutil.copytree(finished, tmp_path_factory.mktemp("fuzzed") / "played", symlinks=True)
    (place / "runs/recipe").rename(place / "whole")
    (place / "elsewhere").mkdir()
    (place / "elsewhere/thesis.tex").write_text("keep")
    return place


@pytest.mark.parametrize("command", PLAYING)
def test_what_is_played_and_not_changed_is_accepted(played: Path, command: str) -> None:
    _forge(_copy(played))
    succeeded(spinlm(*PLAYING[command], cwd=played))


@cases(0.01)
@given(data=st.data(), command=st.sampled_from(sorted(PLAYING)), count=st.integers(1, 2))
def test_run_directories_that_are_played(played: Path, data: st.DataObject, command: str, count: int) -> None:
    _changed(played, data, forged=True, count=count)
    accepted_or_refused(f"run directories: {command}", lambda: _spinlm(*PLAYING[command], cwd=played))
    assert contents(played / "elsewhere") == {"thesis.tex": b"keep"}


def _changed(whole: Path, data: st.DataObject, forged: bool, count: int) -> None:
    """A copy of the run, in which some files are something else."""
    run = _copy(whole)
    files = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file() or path.is_symlink())
    for name in data.draw(st.lists(st.sampled_from(files), min_size=count, max_size=count, unique=True)):
        if (run / name).parent.is_dir() and not (run / name).is_dir():
            _change(run / name, data.draw)
    if forged and not any(path.is_fifo() for path in run.rglob("*")):
        _forge(run)

"""Keys are in the environment and nowhere else: all that a run leaves, says and starts is searched for them."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from pydantic import ValidationError

from integration import tasks
from integration.command import SHOWN, Outcome, refused, spinlm_process, succeeded, waiting_at
from integration.command import spinlm as command
from judge_server import JudgeServer, error
from spinlm.api import run
from spinlm.config import DataSection, ModelSection, Recipe, TrainingSection
from spinlm.errors import UserError

KEYS = {
    "SPINLM_JUDGE_KEY": "sk-canary/judge+0123456789=",
    "OPENAI_API_KEY": "sk-canary/openai+0123456789=",
    "HF_TOKEN": "hf_CanaryCanaryCanaryCanaryCanary01",
    "HUGGING_FACE_HUB_TOKEN": "hf_CanaryCanaryCanaryCanaryCanary02",
    "WANDB_API_KEY": "c0ffee0123456789c0ffee0123456789c0ffee01",
    "AWS_SECRET_ACCESS_KEY": "canary/secret/access/key/0123456789",
}
PASSWORD = "canary-hunter22"
"""In the address of the repository that the run is started in."""

RUN = ("run", "recipe.yaml", "iterations=1", "training.report_to=[tensorboard,wandb]", "evaluation.control=true")


def forms(secret: str) -> dict[str, bytes]:
    """A secret as it is, and as it may have been written."""
    of = {"as it is": secret.encode(), "hex": secret.encode().hex().encode()}
    of |= {"URL": quote(secret).encode(), "in a URL": quote(secret, safe="").encode()}
    of["JSON"] = json.dumps(secret)[1:-1].replace("/", "\\/").encode()
    for shift in range(3):  # in the midst of something longer, base64 has it in one of three ways
        encoded = base64.b64encode(b"\0" * shift + secret.encode())
        of[f"base64 {shift}"] = encoded[4 if shift else 0 : len(encoded) // 4 * 4 - 4]
    return of


def found(content: bytes) -> list[str]:
    secrets = {**KEYS, "password": PASSWORD}
    return [
        f"{name} ({form})"
        for name, secret in secrets.items()
        for form, text in forms(secret).items()
        if text in content
    ]


def assert_none_in(contents: Mapping[str, bytes]) -> None:
    assert {name: there for name, content in contents.items() if (there := found(content))} == {}


def files_of(place: Path, *aside: str) -> dict[str, bytes]:
    """Every file, by its name, and the names themselves."""
    paths = [path for path in place.rglob("*") if path.relative_to(place).parts[0] not in aside]
    contents = {str(path): path.read_bytes() for path in paths if path.is_file()}
    return contents | {"names": "\n".join(map(str, paths)).encode()}


def said(*outcomes: Outcome) -> dict[str, bytes]:
    return {f"{n} {name}": getattr(o, name).encode() for n, o in enumerate(outcomes) for name in ("out", "err")}


def arguments_of(processes: Iterable[psutil.Process]) -> dict[str, bytes]:
    return {f"arguments of {process.pid}": "\0".join(process.cmdline()).encode() for process in processes}


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def secretive(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where to start a run, with a home and a place for temporary files to search."""
    for name in ("home", "tmp"):
        (place / name).mkdir()
    monkeypatch.setenv("HOME", str(place / "home"))
    monkeypatch.setenv("TMPDIR", str(place / "tmp"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "home/datasets"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in [
        name for name in os.environ if name.startswith(("XDG_", "WANDB_")) and name not in (*KEYS, "WANDB_MODE")
    ]:
        monkeypatch.delenv(name)
    remote = f"https://me:{PASSWORD}@example.com/repository.git"
    for words in (["init", "--quiet"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *words], cwd=place, check=True)
    return place


@pytest.mark.slow
def test_a_run_and_all_that_follows(secretive: Path) -> None:
    place = secretive
    interrupted = interrupt_in_training(place)
    assert list((place / "runs/recipe/checkpoints").rglob("training_args.bin"))
    assert list((place / "runs/recipe/trackers").rglob("*.wandb"))
    assert_none_in(files_of(place, ".git") | interrupted)

    assert_none_in(said(succeeded(spinlm_process(*RUN, cwd=place))))
    tasks.write(place / "tasks")
    benchmarked = spinlm_process("evaluate", "runs/recipe", "--suite", "tasks/mine.yaml", "--limit", "2", cwd=place)
    exported = [
        spinlm_process("export", "runs/recipe", "adapter", cwd=place),
        spinlm_process("export", "runs/recipe", "merged", "--merge", cwd=place),
        spinlm_process("report", "runs/recipe", cwd=place),
        spinlm_process("status", "runs/recipe", cwd=place),
    ]
    assert_none_in(said(*map(succeeded, (benchmarked, *exported))))
    assert (place / "adapter/README.md").exists()
    assert_none_in(files_of(place, ".git"))


def interrupt_in_training(place: Path) -> dict[str, bytes]:
    """What was said until then, and the arguments of all processes at that time."""
    waiting = waiting_at("iteration 0: train 1 3", RUN, place, call=SHOWN)
    command_itself = psutil.Process(waiting.pid)
    arguments = arguments_of([command_itself.parent(), command_itself, *command_itself.children(recursive=True)])
    assert any(b"wandb" in words for words in arguments.values())
    os.kill(waiting.pid, signal.SIGINT)
    outcome = waiting.go_on()
    assert outcome.code == 130
    return arguments | said(outcome)


def test_what_a_judge_repeats(copied: Path) -> None:
    """In a verdict, in the refusal of one request, and in what ends the command."""
    key = KEYS["SPINLM_JUDGE_KEY"]
    questions = [{"question_id": n, "turns": [f"say {letter}"]} for n, letter in enumerate("abcd")]
    (copied / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    who = ("--iterations", "1", "--against", "base", "--questions", "questions.jsonl")
    judge = ("--judge-model", "judge", "--judge-concurrency", "1")
    arena = ("evaluate", "runs/recipe", "--suite", "arena", *who, *judge)
    with JudgeServer(lambda _: f"Thank you, Bearer {key}.\nVerdict: A", [error(400, f"not with {key}")]) as server:
        judged = succeeded(command(*arena, "--judge-url", server.url, cwd=copied))
        assert server.authorization == [f"Bearer {key}"] * len(server.authorization)
        server.hello = error(401, f"Incorrect API key provided: {key}; Authorization: Bearer {key}")
        failed = command(*arena, "--judge-url", server.url, cwd=copied)
        in_the_url = command(*arena, "--judge-url", server.url.replace("//", f"//me:{PASSWORD}@"), cwd=copied)
    refused(failed, "Incorrect API key provided: [key]; Authorization: Bearer [key]")
    refused(in_the_url, "--judge-url", "SPINLM_JUDGE_KEY")
    files = files_of(copied)
    assert any(b"Bearer [key]" in content for content in files.values())
    assert any(b"not with [key]" in content for content in files.values())
    assert_none_in(files | said(judged, failed, in_the_url))


def test_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a bug, which is shown as it is but for keys."""

    def refuse(*_: object) -> None:
        raise RuntimeError(f"Illegal header value b'Bearer {KEYS['HF_TOKEN']}'")

    monkeypatch.setattr("spinlm.reporting.status.status", refuse)
    shown = command("status", "run", cwd=tmp_path)
    assert shown.code == 1
    assert "Traceback" in shown.err
    assert shown.err.endswith("RuntimeError: Illegal header value b'Bearer [key]'\n")
    assert_none_in(said(shown))


def test_a_secret_in_a_recipe(place: Path) -> None:
    """It is refused before anything is written."""
    source = f"data.source=https://me:{PASSWORD}@example.com/data.jsonl"
    for override in (f"training.hub_token={KEYS['HF_TOKEN']}", source):
        outcome = command("run", "recipe.yaml", override, cwd=place)
        refused(outcome, override.partition("=")[0], "holds a secret")
        assert_none_in(said(outcome))
    assert not (place / "runs").exists()


def test_a_secret_in_a_recipe_of_a_program(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    url = f"https://me:{PASSWORD}@example.com/data.jsonl"
    recipe = Recipe(run_dir="run", model=ModelSection(name="./model"), data=DataSection(source="data.jsonl"))
    made = Recipe(run_dir="run", model=recipe.model, data=DataSection(source=url))
    changed = recipe.model_copy(update={"data": made.data})
    extra = {"deepspeed": {"comet": {"api_key": PASSWORD}}}
    nested = Recipe(run_dir="run", model=recipe.model, data=recipe.data, training=TrainingSection(**extra))
    for secretive, key in ((made, "data.source"), (changed, "data.source"), (nested, "comet.api_key")):
        with pytest.raises(UserError, match=f"{key}: holds a secret") as refusal:
            run(secretive)
        assert PASSWORD not in "".join(traceback.format_exception(refusal.value))
    assert not (place / "run").exists()


def test_what_does_not_fit_is_not_repeated() -> None:
    with pytest.raises(ValidationError) as refusal:
        DataSection(source=[f"https://me:{PASSWORD}@example.com"])  # type: ignore[arg-type]
    assert PASSWORD not in str(refusal.value)


@pytest.mark.parametrize("before", ["", "x", "xx"])
def test_the_search_finds_them(before: str) -> None:
    for secret in (*KEYS.values(), PASSWORD):
        text = f"{before}{secret}xyz"
        for content in (
            text,
            quote(text),
            quote(text, safe=""),
            json.dumps(text),
            base64.b64encode(text.encode()).decode(),
        ):
            assert found(content.encode()), content

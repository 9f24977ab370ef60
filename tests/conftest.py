from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # as the command does, before tqdm is imported
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import tiny
from integration import command

PlayedOnce = Callable[[str, Callable[[Path], object]], Path]

# What was started in the background has Ctrl-C ignored, and so would have the commands that are tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kill-runs", type=int, default=1, help="How many runs are killed at random moments.")
    parser.addoption("--faults-log", default=None, help="A file for what happened in each of them.")


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the datasets library makes of our files is kept apart, here and in the processes that are started."""
    cache = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    if "datasets" in sys.modules:  # which has read its settings
        sys.modules["datasets"].config.HF_DATASETS_CACHE = cache


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return tiny.write_dataset(tmp_path / "data.jsonl")


@pytest.fixture
def place(tmp_path: Path, tiny_llama: Path) -> Path:
    """Where nothing has run yet."""
    return command.new_place(tmp_path / "place", tiny_llama)


@pytest.fixture(scope="session")
def played_once(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> PlayedOnce:
    """Gives a place by its name, in which whichever of the tests' processes asks for it first has played."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def play_once(name: str, play: Callable[[Path], object]) -> Path:
        place, done = shared / name, shared / f"{name}.done"
        with FileLock(f"{place}.lock"):
            if not done.exists():
                shutil.rmtree(place, ignore_errors=True)  # where another one has failed
                play(command.new_place(place, tiny_llama))
                done.touch()
        return place

    return play_once


@pytest.fixture(scope="session")
def finished(played_once: PlayedOnce) -> Path:
    """Where the recipe with SFT, two iterations and the control has run to its end; only to be read."""
    arguments = ("run", "recipe.yaml", "evaluation.control=true")
    return played_once("finished", lambda place: command.succeeded(command.spinlm_process(*arguments, cwd=place)))


@pytest.fixture(scope="session")
def finished_full(played_once: PlayedOnce) -> Path:
    """The same in full fine-tuning, without the control; only to be read."""

    def play(place: Path) -> None:
        command.write_recipe(place / "recipe.yaml", {"adapter": None})
        command.succeeded(command.spinlm("run", "recipe.yaml", cwd=place))

    return played_once("finished-full", play)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The finished run, to be changed."""
    shutil.copytree(finished, tmp_path / "copied", symlinks=True)
    return tmp_path / "copied"


@pytest.fixture
def half_finished(copied: Path) -> Path:
    """The same, interrupted in iteration 1 between two shards of responses."""
    shards = ("iterations/1/synthetic/00001.jsonl", "iterations/1/synthetic/00002.jsonl")
    rest = ("opponent_logprobs", "training", "adapter", "diagnostics")
    later = (*(f"iterations/1/{name}" for name in rest), "evaluation/iteration-1", "control", "evaluation/control")
    command.forget(copied / "runs/recipe", *shards, *later)
    return copied


@pytest.fixture(scope="session")
def resumed(played_once: PlayedOnce) -> Path:
    """The run of `finished`, killed in every stage on its way; only to be read."""
    arguments = ("run", "recipe.yaml", "evaluation.control=true")
    plan = (*command.KILLED_IN_EVERY_STAGE, None)
    return played_once("resumed", lambda place: command.killed_at(*plan, arguments=arguments, cwd=place))


@pytest.fixture(scope="session")
def without_sft(played_once: PlayedOnce) -> Path:
    """Where self-play has started from the base model itself; only to be read."""

    def play(place: Path) -> None:
        command.write_recipe(place / "recipe.yaml", {"sft": None, "iterations": 1})
        command.succeeded(command.spinlm("run", "recipe.yaml", cwd=place))

    return played_once("without-sft", play)

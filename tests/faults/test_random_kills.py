"""The command, shot at random moments and started again until it is done, ends as if nothing had happened.

`make test-faults` plays 100 runs with SIGKILL and 20 with each of the orderly signals; the seed of each is in its
name, and `--faults-log FILE` keeps what happened in each.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from faults.starting import LONGEST, ForkServer, play_afresh
from integration.command import differing, new_place, rows
from spinlm.rundir import RunDir

RUN = ("run", "recipe.yaml")

VARIANTS: tuple[dict[str, Any], ...] = (
    {"evaluation": {"control": True}},
    {"keep": "best", "training": {"save_steps": 2, "logging_steps": 2}, "generation": {"responses_per_prompt": 2}},
    {"adapter": None, "training": {"save_steps": 3, "logging_steps": 3}},
    {"training": {"regenerate_every": 2, "logging_steps": 3, "save_steps": 3}, "evaluation": {"samples_per_prompt": 2}},
    {"iterations": 3, "training": {"mixture": "uniform", "replay": 2}, "stop": {"patience": 2}},
    {"adapter": {"lora_dropout": 0.2}, "training": {"loss": "triplet", "logging_steps": 2, "save_steps": 2}},
)
"""Recipes that differ in what they write and when, played in turn."""

AFRESH = 10
"""Every so many runs each start is a new process, imports and all."""


@dataclass(frozen=True)
class Uninterrupted:
    """A run that was left alone."""

    place: Path
    seconds: float


class Baselines:
    """An uninterrupted run of each variant, played when it is first asked for."""

    def __init__(self, directory: Path, model: Path, server: ForkServer) -> None:
        self._directory = directory
        self._model = model
        self._server = server
        self._played: dict[int, Uninterrupted] = {}

    def fresh(self, place: Path, variant: int) -> Path:
        """A place where nothing has run."""
        return new_place(place, self._model, VARIANTS[variant])

    def __getitem__(self, variant: int) -> Uninterrupted:
        if variant not in self._played:
            place = self.fresh(self._directory / str(variant), variant)
            begun = time.monotonic()
            assert self._server.play(RUN, place, place / "output", LONGEST, signal.SIGKILL) == 0
            self._played[variant] = Uninterrupted(place, time.monotonic() - begun)
        return self._played[variant]


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="module")
def baselines(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, server: ForkServer) -> Baselines:
    return Baselines(tmp_path_factory.mktemp("uninterrupted"), tiny_llama, server)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    runs = metafunc.config.getoption("--kill-runs")
    seeds = {"SIGKILL": runs, "SIGTERM": runs // 5, "SIGINT": runs // 5}
    shots = [(name, seed) for name, count in seeds.items() for seed in range(count)]
    metafunc.parametrize(("name", "seed"), shots)


def test_shot_at_random(
    name: str, seed: int, baselines: Baselines, server: ForkServer, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    variant = seed % len(VARIANTS)
    whole, number = baselines[variant], signal.Signals[name]
    play = play_afresh if seed % AFRESH == AFRESH - 1 else server.play
    place = baselines.fresh(tmp_path / "place", variant)
    output, delays, codes = place / "output", [], []
    for delay in drawn_delays(f"{name}/{seed}", whole.seconds):
        delays.append(delay)
        codes.append(play(RUN, place, output, delay, number))
        if codes[-1] == 0:  # it was done before
            break
    if codes[-1] != 0:
        codes.append(play(RUN, place, output, LONGEST, signal.SIGKILL))
    note(pytestconfig, signal=name, seed=seed, variant=variant, delays=delays, codes=codes)
    stopped = -number if number == signal.SIGKILL else 128 + number
    assert codes == [stopped] * (len(codes) - 1) + [0], output.read_text()
    assert "Traceback" not in output.read_text()
    check_finished(whole.place / "runs/recipe", place / "runs/recipe")


def drawn_delays(seed: str, seconds: float) -> list[float]:
    """Of one to five shots, the first before the end of the run."""
    drawn = random.Random(seed)
    shots = drawn.randint(1, 5)
    first = drawn.uniform(0, 0.9 * seconds / shots**0.5)
    return [first, *(drawn.uniform(0, 1.6 * seconds / shots) for _ in range(shots - 1))]


def note(config: pytest.Config, **happened: Any) -> None:
    """Keep what happened in a run, where that is wanted."""
    log = config.getoption("--faults-log")
    if log is not None:
        with Path(log).open("a") as file:
            file.write(json.dumps(happened) + "\n")


def check_finished(whole: Path, run: Path) -> None:
    """Not a byte, a file or an example more or less than in the uninterrupted run, and nobody holds it."""
    assert differing(whole, run) == []
    assert not [path for path in run.rglob(".*") if path.name != ".staging" or any(path.iterdir())]
    train = [row["id"] for row in rows(run / "data/train.jsonl")]
    for folder in [*run.glob("iterations/*/synthetic"), *run.glob("iterations/*/opponent_logprobs")]:
        assert [row["id"] for shard in sorted(folder.iterdir()) for row in rows(shard)] == train
    assert not RunDir(run).is_running()
    assert (run / "lock").read_text() == ""

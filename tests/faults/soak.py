"""A run of many iterations, watched from outside: do its memory, its file descriptors or its threads grow?

    python -m faults.soak --hours 2 --out soak.json

Plays `spinlm run` on a tiny model, with SFT, generation, scoring, training, evaluation and the report of each
iteration, and reads from /proc every few seconds what the process holds. What is written at the end (and every
minute until then): iterations played, the medians of the first and the last quarter after the warm-up, and the slope
of a straight line through all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import tiny
from integration.command import write_recipe

EVERY = 10.0
"""Seconds between two readings."""

WARM_UP = 0.1
"""Share of the readings that is left out: libraries are still being loaded, the allocator finds its level."""

RECIPE: dict[str, Any] = {
    "iterations": 100_000,
    "data": {"held_out": 20},
    "sft": {"per_device_train_batch_size": 8},
    "generation": {"max_new_tokens": 48, "shard_size": 64, "batch_size": 16},
    "training": {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "save_steps": 20,
    },
}

ROWS = 320


@dataclass(frozen=True)
class Reading:
    """What the process held at one moment; memory in bytes."""

    seconds: float
    memory: int
    descriptors: int
    threads: int
    iterations: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        tiny.save_model(place / "model")
        tiny.write_dataset(place / "data.jsonl", ROWS)
        write_recipe(place / "recipe.yaml", RECIPE)
        watch(place, options.hours * 3600, options.out)


def watch(place: Path, seconds: float, out: Path) -> None:
    """Play until the time is over, and write what was read."""
    readings: list[Reading] = []
    with (place / "output").open("w") as output:
        command = [sys.executable, "-m", "spinlm", "run", "recipe.yaml"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, cwd=place, env=environment, stdout=output, stderr=subprocess.STDOUT)
    begun = time.monotonic()
    while (now := time.monotonic() - begun) < seconds:
        try:
            process.wait(EVERY)
        except subprocess.TimeoutExpired:
            readings.append(_reading(process.pid, now, place / "runs/recipe/evaluation"))
            if len(readings) % 6 == 0:
                out.write_text(json.dumps(summary(readings), indent=2) + "\n")
        else:
            raise SystemExit(f"the run ended with {process.returncode}: {(place / 'output').read_text()[-2000:]}")
    process.terminate()
    process.wait()
    out.write_text(json.dumps(summary(readings), indent=2) + "\n")


def _reading(pid: int, seconds: float, evaluated: Path) -> Reading:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return Reading(
        seconds=seconds,
        memory=int(status["VmRSS"].split()[0]) * 1024,
        descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        threads=int(status["Threads"]),
        iterations=len(list(evaluated.glob("iteration-*/measures.json"))),
    )


def summary(readings: Sequence[Reading]) -> dict[str, Any]:
    """Medians at both ends and the slope in between."""
    kept = readings[int(WARM_UP * len(readings)) :]
    quarter = max(1, len(kept) // 4)
    hours = [reading.seconds / 3600 for reading in kept]
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "hours": round(readings[-1].seconds / 3600, 3),
        "iterations": readings[-1].iterations,
        "readings": len(readings),
    }
    for name in ("memory", "descriptors", "threads"):
        values = [float(getattr(reading, name)) for reading in kept]
        found[name] = {
            "first_quarter": median(values[:quarter]),
            "last_quarter": median(values[-quarter:]),
            "highest": max(values),
            "slope_per_hour": round(linear_regression(hours, values).slope, 3) if len(values) > 1 else 0.0,
        }
    return found


if __name__ == "__main__":
    main()

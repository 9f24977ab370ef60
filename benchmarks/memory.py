"""Peak memory above the weights, each side in a process of its own: pages that malloc keeps would blur it."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spinlm.errors import UserError


@dataclass(frozen=True)
class Job:
    """A training whose memory is asked for.

    Attributes:
        side: `spinlm` or `trl`.
        model: One of models'.
        pair_set: One of inputs'.
        pairs: How many of it.
        copies: Of these pairs, each with other tokens.
        stretched: Its responses are this many times as long.
        optimiser_batch: Pairs in a step of the optimiser.
        settings: SPINConfig's, or DPOConfig's, that differ from the defaults.
    """

    side: str
    model: str
    pair_set: str
    pairs: int
    copies: int
    stretched: int
    optimiser_batch: int
    settings: dict[str, Any]


def measured(job: Job) -> dict[str, float]:
    """Peak and baseline of a job, in bytes, from a new process.

    Raises:
        UserError: It failed, with what it said.
    """
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the memory of {job} can't be measured:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _measure(job: Job) -> dict[str, float]:
    from benchmarks.inputs import SETS
    from benchmarks.models import load_model
    from benchmarks.sides.training import Training, dpo_training, spin_training

    sides: dict[str, Callable[..., Training]] = {"spinlm": spin_training, "trl": dpo_training}
    pairs = SETS[job.pair_set].stretched(job.stretched).pairs(job.pairs, copies=job.copies)
    model = load_model(job.model)
    reset_peak()
    baseline = resident("VmRSS")
    training = sides[job.side](model, pairs, job.optimiser_batch, **job.settings)
    training.turn()
    return {"baseline": baseline, "peak": resident("VmHWM"), "above": resident("VmHWM") - baseline}


def reset_peak() -> None:
    """Give freed pages back, then start the peak anew at what is resident now."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident(kind: str) -> int:
    """VmRSS, what is resident now, or VmHWM, its peak, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == kind:
            return int(value.split()[0]) * 1024
    raise UserError(f"/proc/self/status has no {kind}: memory can be measured on Linux only")


if __name__ == "__main__":
    print(json.dumps(_measure(Job(**json.loads(sys.argv[1])))))

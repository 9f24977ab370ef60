"""What is measured, by name, in the order of the table in docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.bench import Bench
from benchmarks.measures import generation, growth, iteration, memory, training
from benchmarks.record import Record

MEASURES: dict[str, Callable[[Bench, Record], None]] = {
    "train-short": partial(training.train, set_name="short"),
    "train-balanced": partial(training.train, set_name="balanced"),
    "train-long": partial(training.train, set_name="long"),
    "train-gpt-neo": training.train_gpt_neo,
    "memory-short": partial(memory.peak, set_name="short"),
    "memory-balanced": partial(memory.peak, set_name="balanced"),
    "memory-long": partial(memory.peak, set_name="long"),
    "generation": generation.against_transformers,
    "generation-paged": generation.against_paged,
    "generation-forward": generation.against_forward_pass,
    "generation-vllm": generation.against_vllm,
    "iteration": iteration.whole,
    "growth": growth.growth,
}
QUICK = (
    "train-short",
    "memory-short",
    "generation",
    "generation-paged",
    "generation-forward",
    "generation-vllm",
    "iteration",
    "growth",
)
"""Those that end in some minutes, at their quick sizes."""

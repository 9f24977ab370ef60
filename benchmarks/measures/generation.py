"""Generated tokens a second."""

from __future__ import annotations

from benchmarks import models
from benchmarks.bench import Bench, Skipped
from benchmarks.inputs import prompts
from benchmarks.record import Record, Spread
from benchmarks.sides.generation import (
    OFFICIAL_BATCH,
    ForwardPass,
    Generation,
    PagedGeneration,
    Prompts,
    SpinlmGeneration,
    TransformersGeneration,
    unlike,
)
from benchmarks.sides.vllm import vllm_generation
from spinlm.data.render import Renderer
from spinlm.generation.engine import Sampling

BATCHES = (32, 64, 128)
AGAINST_OFFICIAL, AGAINST_BEST, AGAINST_VLLM, AGAINST_FORWARD = 5.0, 2.5, 1.5, 0.6
SAME_LENGTH = 0.15
"""Sampled answers' mean lengths differ by chance."""


def against_transformers(bench: Bench, record: Record) -> None:
    """`generate` in the official script's batches, and in its best ones."""
    model, renderer, asked, ours = _ours(bench, slots=None)
    new = bench.sizes.max_new_tokens
    official = TransformersGeneration(model, renderer, asked, new, OFFICIAL_BATCH)
    best = TransformersGeneration(model, renderer, asked, new, _best_batch(bench, record), by_length=True)
    _check_greedy(bench, record, asked, ours, official)
    record.take_turns(ours, [official, best], bench.sizes.rounds)
    _check_lengths(record, ours, official, best)
    record.ratio("generated tokens/s", ours, official, at_least=AGAINST_OFFICIAL)
    record.ratio("generated tokens/s", ours, best, at_least=AGAINST_BEST)


def against_paged(bench: Bench, record: Record) -> None:
    """transformers' own continuous batching, on fewer prompts: it is slow on a CPU."""
    model, renderer, asked, _ = _ours(bench, slots=None)
    asked, new = asked[: bench.sizes.paged_prompts], bench.sizes.max_new_tokens
    ours = SpinlmGeneration(model, renderer, asked, new)
    paged = PagedGeneration(model, renderer, asked, new)
    _check_greedy(bench, record, asked, ours, paged)
    record.take_turns(ours, [paged], bench.sizes.rounds)
    _check_lengths(record, ours, paged)
    record.ratio("generated tokens/s", ours, paged)


def against_forward_pass(bench: Bench, record: Record) -> None:
    """The same prompts and answers in plain forward passes, as if all tokens were known."""
    model, _, asked, ours = _ours(bench, bench.sizes.slots)
    ours.turn()
    forward = ForwardPass(model, asked, ours.answers)
    forward.turn()
    record.take_turns(ours, [forward], bench.sizes.rounds)
    record.ratio("generated tokens/s", ours, forward, at_least=AGAINST_FORWARD)


def against_vllm(bench: Bench, record: Record) -> None:
    """vLLM on the same prompts, in an environment of its own."""
    if not bench.vllm_python.exists():
        raise Skipped(f"there is no {bench.vllm_python}: give an interpreter that has vLLM by --vllm-python")
    sizes = bench.sizes
    _, renderer, asked, ours = _ours(bench, sizes.slots)
    length = max(map(len, asked)) + sizes.max_new_tokens
    with vllm_generation(
        bench.vllm_python, models.smollm2(), renderer.stop_ids, asked, sizes.max_new_tokens, sizes.slots, length
    ) as vllm:
        record.note(f"vLLM {vllm.version}")
        _check_greedy(bench, record, asked, ours, vllm)
        record.take_turns(ours, [vllm], sizes.rounds)
        _check_lengths(record, ours, vllm)
        record.ratio("generated tokens/s", ours, vllm, at_least=AGAINST_VLLM)


def _ours(bench: Bench, slots: int | None) -> tuple[object, Renderer, list[list[int]], Generation]:
    """The model, its renderer, the prompts, and our side."""
    sizes = bench.sizes
    model = models.load_model(models.SMOLLM2)
    renderer = models.renderer(model)
    asked = prompts(renderer, sizes.prompts)
    return model, renderer, asked, SpinlmGeneration(model, renderer, asked, sizes.max_new_tokens, slots)


def _best_batch(bench: Bench, record: Record) -> int:
    """transformers' fastest batch, on the first prompts and with short answers: larger ones as long as faster."""
    model = models.load_model(models.SMOLLM2)
    renderer = models.renderer(model)
    asked = prompts(renderer, bench.sizes.search_prompts)
    best, fastest = OFFICIAL_BATCH, 0.0
    for batch in BATCHES:
        if batch > len(asked):
            break
        side = TransformersGeneration(model, renderer, asked, bench.sizes.search_tokens, batch, by_length=True)
        rate = side.turn().rate
        record.say(f"transformers, batch {batch}: {rate:.4g} tokens a second")
        if rate < fastest:
            break
        best, fastest = batch, rate
    record.note(f"transformers' best batch: {best}")
    return best


def _check_greedy(bench: Bench, record: Record, asked: Prompts, ours: Generation, other: Generation) -> None:
    """Both sides' greedy answers to the first prompts; this also warms them up."""
    asked = asked[: bench.sizes.greedy_prompts]
    greedy = Sampling(min(32, bench.sizes.max_new_tokens), temperature=0.0)
    apart = unlike(ours.answered(asked, greedy), other.answered(asked, greedy))
    record.check(f"share of greedy answers unlike those of {other.name}", apart, 0.0)


def _check_lengths(record: Record, ours: Generation, *others: Generation) -> None:
    """Sampled answers can't be the same, but they are about as long."""

    def length(side: Generation) -> float:
        return Spread.of(t.detail["tokens_an_answer"] for t in record.turns if t.side == side.name).median

    for other in others:
        apart = abs(length(ours) / length(other) - 1)
        record.check(f"mean length of sampled answers, apart from {other.name}'s", apart, SAME_LENGTH)

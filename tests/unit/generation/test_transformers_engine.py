"""The engine against transformers' own generate, and what it promises of each response."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers

import tiny
from spinlm.config import GenerationSection, PromptSection
from spinlm.data.pairs import Group
from spinlm.data.render import Renderer
from spinlm.errors import OutOfMemory, UserError
from spinlm.generation.engine import Request, Response, Sampling, request_seed
from spinlm.generation.slot_cache import SlotCache
from spinlm.generation.transformers_engine import TransformersEngine
from spinlm.players import layouts
from spinlm.players.linear import rows_to_spare
from spinlm.players.logprobs import Method, all_scores
from unit.players.families import build_model

FAMILIES = tuple(tiny.FAMILIES)
STOPS = {tiny.END_OF_TEXT, tiny.IM_END}
GREEDY, FREE = Sampling(24, temperature=0.0), Sampling(24)


def _renderer() -> Renderer:
    return Renderer(tiny.build_tokenizer(), PromptSection(), model_stop_ids=STOPS)


def _requests(count: int = 18) -> list[Request]:
    """Prompts of 1 to 52 tokens, in no order."""
    generator = torch.Generator().manual_seed(3)
    lengths = [(i * 23) % 52 + 1 for i in range(count)]
    assert len(set(lengths)) == count
    prompts = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]
    return [Request(prompt, request_seed("test", i)) for i, prompt in enumerate(prompts)]


def _eager_to_stop(family: str, by: float = 1.5) -> Any:
    """A model that ends about half of its responses before the cap."""
    model = build_model(family)
    raised = torch.zeros(tiny.VOCABULARY)
    raised[list(STOPS)] = by

    def raise_stops(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + raised

    model.get_output_embeddings().register_forward_hook(raise_stops)
    return model


def _generate(
    model: Any, requests: Sequence[Request], sampling: Sampling, batch_size: int | None = 5
) -> list[Response]:
    return TransformersEngine(model, _renderer(), batch_size).generate(requests, sampling)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_mamba_is_decoded_in_whole_batches(family: str) -> None:
    engine = TransformersEngine(tiny.build_model(family), _renderer())
    assert engine.batching == ("whole" if family == "mamba" else "continuous")
    assert engine.packs_weights == (family != "mamba")


def test_a_model_without_any_cache_is_decoded_in_whole_batches() -> None:
    config = transformers.OpenAIGPTConfig(vocab_size=tiny.VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    model = transformers.OpenAIGPTLMHeadModel(config).eval()
    assert TransformersEngine(model, _renderer()).batching == "whole"
    assert len(_generate(model, _requests(3), Sampling(4))) == 3


@pytest.mark.parametrize("batch_size", [3, None])
def test_the_cache_is_given_back_at_once(batch_size: int | None) -> None:
    model = build_model("llama")
    gc.collect()
    gc.disable()
    try:
        _generate(model, _requests(4), FREE, batch_size)
        assert not [thing for thing in gc.get_objects() if type(thing) is SlotCache]
    finally:
        gc.enable()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [FREE, Sampling(24, temperature=0.7, top_p=0.9, top_k=20), GREEDY])
def test_logprob_is_the_models_own_untempered_one(family: str, sampling: Sampling) -> None:
    model, requests = _eager_to_stop(family), _requests()
    responses = _generate(model, requests, sampling)
    answered = zip(requests, responses, strict=True)
    groups = [Group(request.prompt_ids, [response.token_ids]) for request, response in answered]
    expected = [logprob for (logprob,) in all_scores(model, groups, Method("plain"), 512, pad_id=0)]
    assert [response.logprob for response in responses] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_idle_rows_change_nothing(family: str) -> None:
    """13 rows are filled up to 16, and so are the fewer ones that are left at the end."""
    model, requests = _eager_to_stop(family), _requests()
    alone, together = (_generate(model, requests, FREE, batch_size) for batch_size in (1, 13))
    assert [response.token_ids for response in together] == [response.token_ids for response in alone]
    for ours, expected in zip(together, alone, strict=True):
        assert ours.logprob == pytest.approx(expected.logprob, abs=1e-4)


@pytest.mark.parametrize("sampling", [FREE, Sampling(8, top_p=0.9), GREEDY])
@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_a_model_that_gives_no_numbers_is_refused(family: str, sampling: Sampling) -> None:
    model = build_model(family)
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        _generate(model, _requests(9), sampling)


def test_the_seed_alone_decides_between_responses_to_one_prompt() -> None:
    model, prompt = build_model("llama"), list(b"one prompt")
    seeds = [request_seed("a"), request_seed("b"), request_seed("a")]
    first, other, again = _generate(model, [Request(prompt, seed) for seed in seeds], FREE)
    assert first == again
    assert first.token_ids != other.token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_is_cut_at_the_cap_or_ends_with_one_stop_token(family: str) -> None:
    responses = _generate(_eager_to_stop(family), _requests(), FREE)
    reasons = Counter(response.finish_reason for response in responses)
    assert reasons["stop"] >= 2 and reasons["length"] >= 2, reasons
    for response in responses:
        stops = [place for place, token in enumerate(response.token_ids) if token in STOPS]
        if response.finish_reason == "length":
            assert stops == []
            assert len(response.token_ids) == FREE.max_new_tokens
        else:
            assert stops == [len(response.token_ids) - 1]
        assert response.text == bytes(token for token in response.token_ids if token < 256).decode(errors="replace")


@pytest.mark.parametrize("batch_size", [1, 3, 100, None])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_requests_may_be_fewer_than_rows_or_none(count: int, batch_size: int | None) -> None:
    requests = _requests(count)
    responses = _generate(_eager_to_stop("llama"), requests, GREEDY, batch_size)
    alone = [_generate(_eager_to_stop("llama"), [request], GREEDY, 1)[0] for request in requests]
    assert [response.token_ids for response in responses] == [response.token_ids for response in alone]


def test_every_response_may_end_at_its_first_token() -> None:
    responses = _generate(_eager_to_stop("llama", by=100.0), _requests(), FREE, batch_size=3)
    assert {(len(response.token_ids), response.finish_reason) for response in responses} == {(1, "stop")}


def test_a_stop_token_at_the_cap_is_a_stop() -> None:
    model = _eager_to_stop("llama", by=100.0)
    (response,) = _generate(model, _requests(1), Sampling(1))
    assert response.finish_reason == "stop"
    assert len(response.token_ids) == 1 and response.token_ids[0] in STOPS


def test_progress_counts_every_token_and_every_response_once() -> None:
    counted: list[tuple[int, int]] = []
    engine = TransformersEngine(_eager_to_stop("llama"), _renderer(), batch_size=7)
    responses = engine.generate(_requests(), FREE, lambda tokens, finished: counted.append((tokens, finished)))
    tokens, finished = (sum(numbers) for numbers in zip(*counted, strict=True))
    assert tokens == sum(len(response.token_ids) for response in responses)
    assert finished == len(responses)


class _FullAbove:
    """A model that finds memory full, once it has decoded a little, wherever more rows than these are in a pass."""

    def __init__(self, model: Any, rows: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        self._rows, self._error, self._passes = rows, error, 0
        model.get_input_embeddings().register_forward_pre_hook(self._look)

    def _look(self, module: Any, inputs: Any) -> None:
        self._passes += 1
        if len(inputs[0]) > self._rows and self._passes > 3:
            raise self._error("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_where_memory_runs_out_the_batch_is_halved_and_remembered(family: str) -> None:
    model, requests = _eager_to_stop(family), _requests()[:13]
    plain = TransformersEngine(_eager_to_stop(family), _renderer(), 3).generate(requests, FREE)
    _FullAbove(model, rows=8 if family == "llama" else 3)  # six rows are filled up to eight in the slots
    halved: list[int] = []
    counted: list[tuple[int, int]] = []
    engine = TransformersEngine(model, _renderer(), len(requests), halved.append)
    responses = engine.generate(requests, FREE, lambda *numbers: counted.append(numbers))
    assert halved == ([6] if family == "llama" else [6, 3])
    assert [response.token_ids for response in responses] == [response.token_ids for response in plain]
    tokens, finished = (sum(numbers) for numbers in zip(*counted, strict=True))
    assert (tokens, finished) == (sum(len(response.token_ids) for response in responses), len(responses))
    assert any(tokens < 0 for tokens, _ in counted), "something was made in vain, and taken back"
    assert engine.generate(requests, FREE) == responses
    assert len(halved) == (1 if family == "llama" else 2), "the next call begins with what fitted"


def test_where_not_even_one_response_fits_it_is_said() -> None:
    model = build_model("llama")
    _FullAbove(model, rows=0)
    with pytest.raises(OutOfMemory, match=r"one response at a time .*CUDA out of memory.*Lower generation.max_new_tok"):
        _generate(model, _requests(4), FREE)
    broken = build_model("llama")
    _FullAbove(broken, rows=0, error=KeyError)
    with pytest.raises(KeyError):
        _generate(broken, _requests(4), FREE)


def test_a_prompt_is_run_once_however_many_responses_it_is_to_have() -> None:
    model, seen = build_model("llama"), []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    prompts = [list(b"three answers to this"), list(b"and three to that one")]
    requests = [Request(prompt, request_seed("k", i, k)) for i, prompt in enumerate(prompts) for k in range(3)]
    responses = _generate(model, requests, Sampling(5), batch_size=6)
    assert seen == [(2, 21)] + [(6, 1)] * 4
    assert len({tuple(response.token_ids) for response in responses}) == 6


def test_rows_that_have_ended_are_not_computed() -> None:
    model, seen = _eager_to_stop("llama"), []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    requests = _requests()
    responses = _generate(model, requests, FREE, batch_size=len(requests))
    lengths = [len(response.token_ids) for response in responses]
    going_on = [sum(n > step for n in lengths) for step in range(1, max(lengths))]
    assert [rows for rows, width in seen[1:]] == [rows + rows_to_spare(rows) for rows in going_on]
    assert going_on[0] > going_on[-1]


def test_the_models_own_sampling_advice_is_not_taken() -> None:
    """`generation_config` of a chat model asks for sampling settings: the recipe's count, not those."""
    plain, advised = build_model("llama"), build_model("llama")
    advised.generation_config.update(do_sample=True, temperature=0.1, top_k=1, top_p=0.1)
    assert _generate(plain, _requests(4), FREE) == _generate(advised, _requests(4), FREE)


def test_sampling_takes_the_recipes_settings() -> None:
    section = GenerationSection(max_new_tokens=9, temperature=0.5, top_p=0.8, top_k=7)
    assert Sampling.of(section) == Sampling(9, 0.5, 0.8, 7)
    assert Sampling.of(section, greedy=True) == Sampling(9, temperature=0.0)


def test_request_seeds_differ_by_every_part_and_are_the_same_tomorrow() -> None:
    seeds = [request_seed(*parts) for parts in ((0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a"))]
    assert len(set(seeds)) == len(seeds)
    assert request_seed(0, "iterations/0/synthetic", "row-7", 2) == 46_901_903_369_711_973


def _with_prefix(requests: Sequence[Request], prefix: str = "<system>Be brief.</system>") -> list[Request]:
    return [Request([*prefix.encode(), *request.prompt_ids], request.seed) for request in requests]


def _tokens_run(model: Any, run: Callable[[], object]) -> int:
    """Tokens that the model is given while something runs, but for one a row: those are steps, or padding."""
    sizes: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape))
    try:
        run()
    finally:
        hook.remove()
    return sum(rows * columns for rows, columns in sizes if columns > 1)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mamba"])
@pytest.mark.parametrize("batch_size", [1, 5, 13, None])
def test_what_all_prompts_begin_with_changes_nothing(
    family: str, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, requests = _eager_to_stop(family), _with_prefix(_requests())
    shared = {sampling: _generate(model, requests, sampling, batch_size) for sampling in (GREEDY, FREE)}
    monkeypatch.setattr(layouts, "LEAST_IN_COMMON", 10**9)
    for sampling, responses in shared.items():
        for ours, plain in zip(responses, _generate(model, requests, sampling, batch_size), strict=True):
            assert ours.token_ids == plain.token_ids
            assert ours.logprob == pytest.approx(plain.logprob, abs=1e-4)


def test_what_all_prompts_begin_with_is_run_once() -> None:
    """Twelve prompts of 11 tokens, of which 10 are the same, in rows of 4."""
    model = build_model("llama")
    requests = [Request(list(bytes([*range(40, 50), 60 + i])), i) for i in range(12)]
    once = Sampling(1)
    alone = _tokens_run(model, lambda: _generate(model, requests[:1], once, 4))
    assert alone == 11
    assert _tokens_run(model, lambda: _generate(model, requests, once, 4)) == 10  # the prefix; then a token a prompt
    same = [Request(requests[0].prompt_ids, i) for i in range(12)]
    assert _tokens_run(model, lambda: _generate(model, same, once, 12)) == 11

"""The engine against transformers' own generate, and against distributions that are known exactly."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import tiny
from spinlm.config import GenerationSection, PromptSection
from spinlm.data.pairs import collate_responses
from spinlm.data.render import Renderer
from spinlm.generation.engine import Request, Response, Sampling, request_seed
from spinlm.generation.transformers_engine import TransformersEngine
from spinlm.players.logprobs import response_logprobs
from unit.generation import enumerable
from unit.players.families import build_model

FAMILIES = ("llama", "gpt2", "gpt_neo", "mamba")
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
    model: Any, requests: Sequence[Request], sampling: Sampling, batch_size: int = 16, renderer: Renderer | None = None
) -> list[Response]:
    return TransformersEngine(model, renderer or _renderer(), batch_size).generate(requests, sampling)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_transformers_generates_one_prompt_at_a_time(family: str) -> None:
    model, requests = _eager_to_stop(family), _requests()
    responses = _generate(model, requests, GREEDY)
    for request, response in zip(requests, responses, strict=True):
        alone = model.generate(
            torch.tensor([request.prompt_ids]),
            attention_mask=torch.ones(1, len(request.prompt_ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=sorted(STOPS),
            pad_token_id=tiny.END_OF_TEXT,
        )
        assert response.token_ids == alone[0, len(request.prompt_ids) :].tolist()
    assert len({tuple(response.token_ids) for response in responses}) > 8, "prompts matter"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [FREE, Sampling(24, temperature=0.7, top_p=0.9, top_k=20), GREEDY])
def test_logprob_is_the_models_own_untempered_one(family: str, sampling: Sampling) -> None:
    model, requests = _eager_to_stop(family), _requests()
    responses = _generate(model, requests, sampling)
    couples = [(request.prompt_ids, response.token_ids) for request, response in zip(requests, responses, strict=True)]
    with torch.no_grad():
        scored = response_logprobs(model, collate_responses(couples, pad_id=0))
    assert [response.logprob for response in responses] == pytest.approx(scored.tolist(), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_depends_on_nothing_decoded_beside_it(family: str) -> None:
    model, requests = _eager_to_stop(family), _requests()
    together = [response.token_ids for response in _generate(model, requests, FREE, batch_size=16)]
    alone = [response.token_ids for response in _generate(model, requests, FREE, batch_size=1)]
    backwards = [response.token_ids for response in _generate(model, requests[::-1], FREE, batch_size=5)][::-1]
    assert len({tuple(ids) for ids in together}) > len(requests) // 2
    for others in (alone, backwards):
        pairs = [(a, b) for ours, theirs in zip(together, others, strict=True) for a, b in _aligned(ours, theirs)]
        assert sum(a == b for a, b in pairs) >= 0.999 * len(pairs)


def _aligned(ours: list[int], theirs: list[int]) -> list[tuple[int | None, int | None]]:
    width = max(len(ours), len(theirs))
    return list(zip(ours + [None] * (width - len(ours)), theirs + [None] * (width - len(theirs)), strict=True))


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


def test_the_models_own_sampling_advice_is_not_taken() -> None:
    """`generation_config` of a chat model asks for sampling settings: the recipe's count, not those."""
    plain, advised = build_model("llama"), build_model("llama")
    advised.generation_config.update(do_sample=True, temperature=0.1, top_k=1, top_p=0.1)
    assert _generate(plain, _requests(4), FREE) == _generate(advised, _requests(4), FREE)


PROMPT = [0, 3, 1]
SAMPLES = 20_000


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 3},
        {"top_p": 0.7},
        {"temperature": 1.3, "top_k": 4, "top_p": 0.8},
    ],
    ids=str,
)
def test_samples_have_the_exact_distribution(how: dict[str, Any]) -> None:
    model = enumerable.build_model()
    expected = {
        response: SAMPLES * share
        for response, share in enumerable.response_distribution(model, PROMPT, **how).items()
        if share > 0
    }
    assert sum(expected.values()) == pytest.approx(SAMPLES)
    requests = [Request(PROMPT, request_seed(str(how), i)) for i in range(SAMPLES)]
    renderer = enumerable.build_renderer()
    responses = _generate(model, requests, Sampling(enumerable.DEPTH, **how), batch_size=4000, renderer=renderer)
    counts = Counter(tuple(response.token_ids) for response in responses)
    assert counts.keys() <= expected.keys(), "nothing impossible is sampled"
    assert _chi_square_p_value(counts, expected) > 0.001
    if how:
        untouched = enumerable.response_distribution(model, PROMPT)
        wrong = {response: SAMPLES * share for response, share in untouched.items()}
        assert _chi_square_p_value(counts, wrong) < 1e-6, "the settings make a difference that the test can see"


def _chi_square_p_value(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Of the counts under the expectation; responses expected less than five times count as one."""
    rare = [response for response, number in expected.items() if number < 5]
    cells = [(counts[response], number) for response, number in expected.items() if number >= 5]
    if rare:
        cells.append((sum(counts[response] for response in rare), sum(expected[response] for response in rare)))
    statistic = sum((seen - due) ** 2 / due for seen, due in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def test_the_chi_square_p_value_is_right() -> None:
    """A coin's 60 heads of 100: the statistic is 4, and its p-value with one degree of freedom 0.0455."""
    counts, expected = Counter({(0,): 60, (1,): 40}), {(0,): 50.0, (1,): 50.0}
    assert _chi_square_p_value(counts, expected) == pytest.approx(math.erfc(math.sqrt(2)), rel=1e-9)


def test_sampling_takes_the_recipes_settings() -> None:
    section = GenerationSection(max_new_tokens=9, temperature=0.5, top_p=0.8, top_k=7)
    assert Sampling.of(section) == Sampling(9, 0.5, 0.8, 7)
    assert Sampling.of(section, greedy=True) == Sampling(9, temperature=0.0)


def test_request_seeds_differ_by_every_part_and_are_the_same_tomorrow() -> None:
    seeds = [request_seed(*parts) for parts in ((0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a"))]
    assert len(set(seeds)) == len(seeds)
    assert request_seed(0, "iterations/0/synthetic", "row-7", 2) == 46_901_903_369_711_973

"""Decoding with rows refilled all the time has the right distribution: transformers' own, exactly the model's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import tiny
from spinlm.config import PromptSection
from spinlm.data.render import Renderer
from spinlm.generation.engine import Request, Response, Sampling, request_seed
from spinlm.generation.transformers_engine import TransformersEngine
from unit.generation import enumerable
from unit.generation.adapters import with_adapter
from unit.players.families import build_model

STOPS = {tiny.END_OF_TEXT, tiny.IM_END}
CAP = 12
COUNT = 64


def _requests() -> list[Request]:
    """Prompts of 1 to 107 tokens in no order: longer than GPT-Neo's window of 32 and Gemma 3's of 16."""
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(0, 256, (i * 29 % 107 + 1,), generator=generator).tolist() for i in range(COUNT)]
    return [Request(prompt, request_seed("distribution", i)) for i, prompt in enumerate(prompts)]


def _model(family: str, adapted: bool = False) -> Any:
    """It ends about half of its responses before the cap."""
    model = build_model(family)
    raised = torch.zeros(tiny.VOCABULARY)
    raised[list(STOPS)] = 1.5
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output + raised)
    return with_adapter(model) if adapted else model


def _generate(model: Any, requests: Sequence[Request], sampling: Sampling, rows: int | None = 6) -> list[Response]:
    renderer = Renderer(tiny.build_tokenizer(), PromptSection(), model_stop_ids=STOPS)
    return TransformersEngine(model, renderer, rows).generate(requests, sampling)


GREEDY_CASES = [*((family, False) for family in tiny.FAMILIES), ("llama", True), ("gpt2", True), ("gpt_neo", True)]


@pytest.mark.parametrize(("family", "adapted"), GREEDY_CASES)
def test_greedy_is_what_transformers_generates_one_prompt_at_a_time(family: str, adapted: bool) -> None:
    model, requests = _model(family, adapted), _requests()
    responses = _generate(model, requests, Sampling(CAP, temperature=0.0))
    for request, response in zip(requests, responses, strict=True):
        alone = model.generate(
            input_ids=torch.tensor([request.prompt_ids]),
            attention_mask=torch.ones(1, len(request.prompt_ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=CAP,
            eos_token_id=sorted(STOPS),
            pad_token_id=tiny.END_OF_TEXT,
        )
        assert response.token_ids == alone[0, len(request.prompt_ids) :].tolist()
    assert len({tuple(response.token_ids) for response in responses}) > COUNT // 2, "prompts matter"
    assert {response.finish_reason for response in responses} == {"stop", "length"}


@pytest.mark.parametrize("family", ["llama", "gpt_neo", "mamba"])
def test_a_response_depends_on_nothing_decoded_beside_it(family: str) -> None:
    model, requests, sampling = _model(family), _requests(), Sampling(CAP)
    together = _generate(model, requests, sampling, rows=64)
    alone = _generate(model, requests, sampling, rows=1)
    backwards = _generate(model, requests[::-1], sampling, rows=5)[::-1]
    half = _generate(model, requests[::2], sampling, rows=64)
    assert len({tuple(response.token_ids) for response in together}) > COUNT // 2
    for ours, others in ((together, alone), (together, backwards), (together[::2], half)):
        pairs = [pair for a, b in zip(ours, others, strict=True) for pair in _aligned(a.token_ids, b.token_ids)]
        assert sum(a == b for a, b in pairs) >= 0.999 * len(pairs)


def _aligned(ours: list[int], theirs: list[int]) -> list[tuple[int | None, int | None]]:
    width = max(len(ours), len(theirs))
    return list(zip(ours + [None] * (width - len(ours)), theirs + [None] * (width - len(theirs)), strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt_neo", "mamba"])
@pytest.mark.parametrize("rows", [6, None])
def test_asked_again_it_gives_the_same_to_the_last_bit(family: str, rows: int | None) -> None:
    model, requests = _model(family, adapted=family == "llama"), _requests()
    first, again = (_generate(model, requests, Sampling(CAP, top_p=0.95), rows) for _ in range(2))
    assert first == again


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
    responses = TransformersEngine(model, renderer, 3000).generate(requests, Sampling(enumerable.DEPTH, **how))
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

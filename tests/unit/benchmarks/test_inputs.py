"""Pairs and prompts: of the lengths they are said to have, and always the same."""

from __future__ import annotations

import statistics

import pytest

import tiny
from benchmarks.inputs import SETS, answer_tokens, instructions, prompts
from benchmarks.settings import QUICK, Sizes, with_sizes
from spinlm.config import PromptSection
from spinlm.data.render import Renderer
from spinlm.errors import UserError


@pytest.mark.parametrize(
    ("name", "prompt", "shortest", "longest"),
    [("short", 48, 8, 32), ("balanced", 128, 64, 256), ("long", 512, 64, 128)],
)
def test_pairs_have_the_lengths_of_their_set(name: str, prompt: int, shortest: int, longest: int) -> None:
    pairs = SETS[name].pairs(1000)
    assert statistics.mean(len(p.prompt_ids) for p in pairs) == pytest.approx(prompt, rel=0.05)
    responses = [len(ids) for p in pairs for ids in (p.real_ids, p.synthetic_ids)]
    assert (min(responses), max(responses)) == (shortest, longest)
    assert len(set(responses)) > 20, "uneven"
    assert max(len(p.prompt_ids) for p in pairs) + longest <= 1024, "TRL would cut them"


def test_pairs_are_seeded_and_a_longer_list_begins_with_a_shorter_one() -> None:
    ids = [[p.real_ids for p in SETS["short"].pairs(n)] for n in (4, 8)]
    assert ids[0] == ids[1][:4]
    assert SETS["short"].pairs(4, seed=1)[0].real_ids != ids[0][0]


def test_copies_have_the_same_lengths_and_other_tokens() -> None:
    once, twice = (SETS["short"].pairs(4, copies=copies) for copies in (1, 2))
    assert twice[:4] == once
    for first, second in zip(once, twice[4:], strict=True):
        assert second.prompt_ids == [token + 1 for token in first.prompt_ids]
        assert [len(second.real_ids), len(second.synthetic_ids)] == [len(first.real_ids), len(first.synthetic_ids)]


def test_prompts_differ_in_words_and_length() -> None:
    assert len({prompt for prompt, _ in instructions(256)}) == 256
    rendered = prompts(Renderer(tiny.build_tokenizer(), PromptSection()), 64)
    assert len({len(ids) for ids in rendered}) > 20
    assert rendered == prompts(Renderer(tiny.build_tokenizer(), PromptSection()), 64)


@pytest.mark.parametrize(("ids", "counted"), [([5, 6, 9, 9, 9], [5, 6, 9]), ([5, 6], [5, 6]), ([9, 5], [9]), ([], [])])
def test_an_answer_counts_up_to_its_end(ids: list[int], counted: list[int]) -> None:
    assert answer_tokens(ids, frozenset({9})) == counted


def test_sizes_are_changed_by_name() -> None:
    assert with_sizes(QUICK, ["prompts=8", "rounds=3"]).prompts == 8
    assert with_sizes(Sizes(), []) == Sizes()
    for wrong in ("promts=8", "prompts=0", "prompts=many", "prompts"):
        with pytest.raises(UserError):
            with_sizes(QUICK, [wrong])

"""Limits in tokens and the split, with a tokenizer whose tokens are bytes and a prompt that is its own text."""

from typing import Any

import pytest

import tiny
import tokenizers_zoo as zoo
from spinlm.config import DataSection, PromptSection
from spinlm.data.examples import Dropped, Example
from spinlm.data.prepare import Split, TokenizedExample, prepare
from spinlm.data.render import Renderer
from spinlm.errors import UserError

END = tiny.IM_END


def example(name: str, prompt: str, response: str, *earlier: str) -> Example:
    turns = [*earlier, prompt]
    roles = ["user" if place % 2 == 0 else "assistant" for place in range(len(turns))]
    messages = tuple({"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True))
    return Example(name, messages, response, {"of": name})  # type: ignore[arg-type]


def split(*examples: Example, dropped: tuple[Dropped, ...] = (), seed: int = 0, **section: Any) -> Split:
    renderer = Renderer(tiny.build_tokenizer(), PromptSection(template="{prompt}"))
    section = {"held_out": 0, "max_prompt_tokens": 8, "max_length": 12} | section
    return prepare(examples, dropped, renderer, DataSection(source="d.jsonl", **section), seed)


def numbered(count: int) -> list[Example]:
    return [example(f"e{number}", f"p{number}", "r") for number in range(count)]


def names(examples: list[TokenizedExample]) -> list[str]:
    return [e.id for e in examples]


def test_an_example_and_its_tokens() -> None:
    assert split(example("e", "ab", "xyz")).train == [
        TokenizedExample("e", [*b"ab"], [*b"xyz", END], "ab", "xyz", {"of": "e"})
    ]


class TestLimits:
    def test_what_just_fits_is_kept(self) -> None:
        fits = split(example("prompt", "12345678", "xyz"), example("response", "1", "1234567890"))
        assert names(fits.train) == ["prompt", "response"]
        assert [len(e.prompt_ids) + len(e.real_ids) for e in fits.train] == [12, 12]

    def test_what_is_over_is_dropped_and_counted_by_reason(self) -> None:
        found = split(
            example("prompt", "123456789", "x"),
            example("both", "12345678", "wxyz"),
            example("response", "1", "12345678901"),
            example("alone", "1", "123456789012345"),
            example("token", "1", "a<|im_end|>b"),
            example("good", "1", "a"),
            dropped=(Dropped("row", "no response"), Dropped("row2", "no response")),
        )
        assert names(found.train) == ["good"]
        assert found.dropped == [
            Dropped("row", "no response"),
            Dropped("row2", "no response"),
            Dropped("prompt", "prompt over data.max_prompt_tokens"),
            Dropped("both", "prompt over data.max_length"),
            Dropped("response", "response over data.max_length"),
            Dropped("alone", "response over data.max_length"),
            Dropped("token", "response contains the end-of-turn token"),
        ]
        assert found.drop_counts() == {
            "no response": 2,
            "response over data.max_length": 2,
            "prompt over data.max_prompt_tokens": 1,
            "prompt over data.max_length": 1,
            "response contains the end-of-turn token": 1,
        }
        assert list(found.drop_counts())[:2] == ["no response", "response over data.max_length"]

    def test_a_prompt_is_cut_on_its_left(self) -> None:
        found = split(
            example("prompt", "0123456789", "x"),
            example("both", "12345678", "uvwxyz"),
            example("response", "1", "123456789012"),
            overlong="truncate_prompt_left",
        )
        assert [(e.id, bytes(e.prompt_ids), bytes(e.real_ids[:-1])) for e in found.train] == [
            ("prompt", b"23456789", b"x"),
            ("both", b"45678", b"uvwxyz"),
        ]
        assert found.train[0].prompt == "0123456789"
        assert found.drop_counts() == {"response over data.max_length": 1}

    def test_a_prompt_that_is_cut_keeps_its_beginning_of_sequence_token(self) -> None:
        renderer = Renderer(zoo.llama2(), PromptSection())
        section = DataSection(
            source="d", held_out=0, max_prompt_tokens=4, max_length=20, overlong="truncate_prompt_left"
        )
        whole = renderer.prompt_ids([{"role": "user", "content": "0123456789"}])
        (cut,) = prepare([example("e", "0123456789", "x")], [], renderer, section, 0).train
        assert cut.prompt_ids == [renderer.bos_id, *whole[-3:]]

    def test_a_prompt_of_no_tokens_is_dropped(self) -> None:
        renderer = Renderer(zoo.chatml(), PromptSection(chat_template="{{ messages[1].content if messages[1:] }}"))
        kept = Example("k", ({"role": "system", "content": "S"}, {"role": "user", "content": "p"}), "r")
        found = prepare([example("e", "p", "r"), kept], [], renderer, DataSection(source="d", held_out=0), 0)
        assert names(found.train) == ["k"]
        assert found.dropped == [Dropped("e", "empty prompt")]

    def test_a_conversation_that_the_template_refuses_is_dropped(self) -> None:
        renderer = Renderer(zoo.gemma(), PromptSection())
        refused = Example("s", ({"role": "system", "content": "S"}, {"role": "user", "content": "p"}), "r")
        found = prepare([refused, example("e", "p", "r")], [], renderer, DataSection(source="d", held_out=0), 0)
        assert names(found.train) == ["e"]
        assert found.drop_counts() == {"chat template refused it: System role not supported": 1}


class TestSplit:
    @pytest.mark.parametrize(("held_out", "count"), [(0, 0), (3, 3), (19, 19), (0.0, 0), (0.05, 1), (0.5, 10)])
    def test_a_count_or_a_share(self, held_out: float, count: int) -> None:
        found = split(*numbered(20), held_out=held_out)
        assert (len(found.held_out), len(found.train)) == (count, 20 - count)

    def test_a_share_is_of_what_is_left(self) -> None:
        too_long = [example(f"x{number}", "123456789", "r") for number in range(10)]
        assert len(split(*numbered(10), *too_long, held_out=0.2).held_out) == 2

    def test_order_is_kept_and_nothing_is_lost(self) -> None:
        found = split(*numbered(20), held_out=7)
        place = {f"e{number}": number for number in range(20)}
        for part in (found.train, found.held_out):
            assert sorted(names(part), key=place.__getitem__) == names(part)
        assert {*names(found.train), *names(found.held_out)} == set(place)

    def test_the_seed_decides(self) -> None:
        held_out = {seed: names(split(*numbered(20), held_out=5, seed=seed).held_out) for seed in range(8)}
        assert held_out[3] == names(split(*numbered(20), held_out=5, seed=3).held_out)
        assert len({tuple(chosen) for chosen in held_out.values()}) > 4

    def test_it_is_the_same_in_whatever_order_the_rows_come(self) -> None:
        forwards, backwards = split(*numbered(20), held_out=5), split(*reversed(numbered(20)), held_out=5)
        assert names(backwards.held_out) == names(forwards.held_out)[::-1]

    def test_copies_of_a_prompt_stay_together(self) -> None:
        examples = [example(f"e{number}", f"p{number % 6}", f"r{number}") for number in range(24)]
        for seed in range(20):
            found = split(*examples, held_out=9, seed=seed)
            assert not {e.prompt for e in found.train} & {e.prompt for e in found.held_out}
            assert len(found.held_out) == 8  # two groups of four; a third one would be too many

    def test_turns_of_a_conversation_stay_together(self) -> None:
        examples = []
        for number in range(6):
            examples += [
                example(f"c{number}#0", f"a{number}", "r"),
                example(f"c{number}#1", "same", "r", f"a{number}", "b"),
            ]
        for seed in range(10):
            found = split(*examples, held_out=4, seed=seed)
            conversations = [{e.id.partition("#")[0] for e in part} for part in (found.train, found.held_out)]
            assert len(found.held_out) == 4
            assert not conversations[0] & conversations[1]


class TestRefusals:
    @pytest.mark.parametrize("held_out", [5, 100, 0.95])
    def test_nothing_to_train_on(self, held_out: float) -> None:
        with pytest.raises(UserError, match=rf"^d.jsonl: data.held_out={held_out} leaves none of the 5 examples to"):
            split(*numbered(5), held_out=held_out)

    def test_nothing_left(self) -> None:
        with pytest.raises(UserError) as caught:
            split(
                example("a", "123456789", "x"), example("b", "123456789", "x"), dropped=(Dropped("row", "no response"),)
            )
        assert (
            str(caught.value) == "d.jsonl: no example is left: prompt over data.max_prompt_tokens (2), no response (1)"
        )

    def test_nothing_at_all(self) -> None:
        with pytest.raises(UserError, match=r"^d.jsonl: no example is left: it has no rows$"):
            split()


@pytest.mark.parametrize("overlong", ["drop", "truncate_prompt_left"])
def test_a_text_of_many_megabytes_is_dropped_unread(overlong: str) -> None:
    rows = split(
        example("a", "a" * 50_000_000, "b"),
        example("b", "a", "b" * 50_000_000),
        example("c", "c", "d"),
        overlong=overlong,
    )
    assert [row.id for row in rows.train] == ["c"]
    assert rows.dropped == [
        Dropped("a", "prompt over data.max_prompt_tokens"),
        Dropped("b", "response over data.max_length"),
    ]

"""Each shape of dataset by hand, and rows that no dataset should have."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from spinlm.config import DataSection
from spinlm.data.examples import Dropped, Example, Message
from spinlm.data.formats import MOST_TURNS, examples_of, load_examples
from spinlm.data.sources import Row
from spinlm.errors import UserError


def system(content: Any) -> Message:
    return {"role": "system", "content": content}


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any) -> Message:
    return {"role": "assistant", "content": content}


def read(*rows: dict[str, Any], **section: Any) -> tuple[list[Example], list[Dropped]]:
    numbered = [Row(f"d[{index}]", row) for index, row in enumerate(rows)]
    return examples_of(numbered, DataSection(source="d", **section))


def only(row: dict[str, Any], **section: Any) -> tuple[list[Message], str]:
    """The prompt and the response of a row which is one example."""
    examples, dropped = read(row, **section)
    assert (len(examples), dropped) == (1, [])
    return list(examples[0].messages), examples[0].response


def why(row: dict[str, Any], **section: Any) -> str:
    """Why a row is dropped that stands behind a good one."""
    good = {"messages": [user("p"), assistant("r")], "prompt": "p", "response": "r", "instruction": "p", "output": "r"}
    examples, dropped = read({key: good[key] for key in row if key in good}, row, **section)
    assert len(examples) == 1
    assert [d.id for d in dropped] == ["d[1]"]
    return dropped[0].reason


def refusal(*rows: dict[str, Any], **section: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(*rows, **section)
    return str(caught.value)


SHAREGPT = [{"from": "system", "value": "S"}, {"from": "human", "value": "p"}, {"from": "gpt", "value": "r"}]


class TestShapes:
    @pytest.mark.parametrize(
        ("row", "prompt", "response"),
        [
            ({"messages": [system("S"), user("p"), assistant("r")]}, [system("S"), user("p")], "r"),
            ({"conversations": SHAREGPT}, [system("S"), user("p")], "r"),
            ({"conversations": [user("p"), assistant("r")]}, [user("p")], "r"),
            ({"real": [user("p"), assistant("r")], "generated": [user("p"), assistant("g")]}, [user("p")], "r"),
            ({"prompt": "p", "chosen": "r", "rejected": "g"}, [user("p")], "r"),
            ({"prompt": "p", "chosen": [assistant("r")], "rejected": [assistant("g")]}, [user("p")], "r"),
            ({"prompt": "p", "chosen": [user("p"), assistant("r")], "rejected": []}, [user("p")], "r"),
            ({"prompt": [user("p")], "chosen": [assistant("r")], "rejected": []}, [user("p")], "r"),
            ({"prompt": [user("p")], "chosen": [user("p"), assistant("r")]}, [user("p")], "r"),
            (
                {"prompt": [system("S"), user("p")], "chosen": [user("p"), assistant("r")]},
                [system("S"), user("p")],
                "r",
            ),
            ({"prompt": "p", "chosen": [system("S"), user("p"), assistant("r")]}, [system("S"), user("p")], "r"),
            ({"chosen": [user("p"), assistant("r")], "rejected": [user("p"), assistant("g")]}, [user("p")], "r"),
            ({"system": "S", "question": "p", "chosen": "r", "rejected": "g"}, [system("S"), user("p")], "r"),
            ({"prompt": "p", "response": "r"}, [user("p")], "r"),
            ({"prompt": "p", "completion": " r\n"}, [user("p")], " r\n"),
            ({"prompt": [user("p")], "completion": [assistant("r")]}, [user("p")], "r"),
            ({"prompt": [system("S"), user("p")], "response": "r"}, [system("S"), user("p")], "r"),
            ({"instruction": "p", "output": "r"}, [user("p")], "r"),
            ({"instruction": "p", "input": "", "output": "r"}, [user("p")], "r"),
            ({"instruction": "p", "input": None, "output": "r"}, [user("p")], "r"),
            ({"instruction": "p", "input": "i", "output": "r"}, [user("p\n\ni")], "r"),
            ({"instruction": "", "input": "i", "output": "r"}, [user("i")], "r"),
            ({"question": "p", "answer": "r"}, [user("p")], "r"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
    )
    def test_recognised_by_its_columns(self, row: dict[str, Any], prompt: list[Message], response: str) -> None:
        assert only({"id": 3, **row, "source": None}) == (prompt, response)

    def test_the_first_shape_in_the_list_wins(self) -> None:
        row = {"question": "q", "answer": "a", "prompt": "p", "response": "r"}
        assert only(row) == ([user("p")], "r")
        row["chosen"] = "c"
        assert only(row) == ([user("p")], "c")
        assert only({**row, "real": [user("rp"), assistant("rr")]}) == ([user("rp")], "rr")
        assert only({**row, "messages": [user("mp"), assistant("mr")], "real": []}) == ([user("mp")], "mr")

    def test_the_first_row_decides_and_later_ones_may_lack_values(self) -> None:
        examples, dropped = read(
            {"instruction": "p", "output": "r"},
            {"instruction": "p", "input": "i", "output": "r"},
            {"instruction": "p"},
            {},
            {"messages": [user("p"), assistant("r")]},
        )
        assert [e.messages[-1]["content"] for e in examples] == ["p", "p\n\ni"]
        assert dropped == [
            Dropped("d[2]", "empty response"),
            Dropped("d[3]", "empty prompt"),
            Dropped("d[4]", "empty prompt"),
        ]

    def test_values_that_parquet_leaves_empty_in_a_mixed_list(self) -> None:
        turns = [{"role": None, "from": "human", "value": "p", "content": None}, {"from": "gpt", "value": "r"}]
        assert only({"conversations": turns}) == ([user("p")], "r")

    def test_a_verifier_is_passed_on(self) -> None:
        row = Row("t[0]", {"question": "p", "answer": "r"}, {"task": "t"})
        examples, _ = examples_of([row], DataSection(source="t"))
        assert examples == [Example("t[0]", (user("p"),), "r", {"task": "t"})]

    def test_a_file_end_to_end(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"prompt": "p", "response": "r"}\n{"prompt": "p", "response": ""}\n', encoding="utf-8")
        assert load_examples(DataSection(source=str(path))) == (
            [Example("a.jsonl:1", (user("p"),), "r")],
            [Dropped("a.jsonl:2", "empty response")],
        )


class TestMessages:
    @pytest.mark.parametrize("human", ["user", "human", "User", " HUMAN ", "prompter"])
    @pytest.mark.parametrize("bot", ["assistant", "gpt", "bot", "model", "Assistant"])
    def test_role_names(self, human: str, bot: str) -> None:
        turns = [{"role": "developer", "content": "S"}, {"role": human, "content": "p"}, {"role": bot, "content": "r"}]
        assert only({"messages": turns}) == ([system("S"), user("p")], "r")

    def test_content_in_parts(self) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert only({"messages": [user(parts), assistant(parts)]}) == ([user("ab")], "ab")

    def test_other_keys_of_a_turn_are_left_out(self) -> None:
        turns = [{"role": "user", "content": "p", "name": "x", "weight": 0}, assistant("r")]
        assert only({"messages": turns}) == ([user("p")], "r")

    @pytest.mark.parametrize("column", ["system", "system_prompt"])
    def test_a_system_column(self, column: str) -> None:
        assert only({column: "S", "question": "p", "answer": "r"}) == ([system("S"), user("p")], "r")
        assert only({column: "S", "messages": [user("p"), assistant("r")]}) == ([system("S"), user("p")], "r")
        assert only({column: " ", "question": "p", "answer": "r"}) == ([user("p")], "r")
        assert only({column: None, "question": "p", "answer": "r"}) == ([user("p")], "r")

    def test_a_conversations_own_system_prompt_goes_before_the_column(self) -> None:
        row = {"system": "column", "messages": [system("own"), user("p"), assistant("r")]}
        assert only(row) == ([system("own"), user("p")], "r")


CONVERSATION = [system("S"), user("p1"), assistant("r1"), user("p2"), assistant("r2"), user("p3")]


class TestTurns:
    def test_last(self) -> None:
        assert only({"messages": CONVERSATION}) == (CONVERSATION[:4], "r2")

    def test_first(self) -> None:
        assert only({"messages": CONVERSATION}, turns="first") == (CONVERSATION[:2], "r1")

    def test_all(self) -> None:
        examples, dropped = read({"messages": CONVERSATION}, turns="all")
        assert dropped == []
        assert examples == [
            Example("d[0]#1", tuple(CONVERSATION[:2]), "r1"),
            Example("d[0]#2", tuple(CONVERSATION[:4]), "r2"),
        ]

    def test_all_drops_single_turns(self) -> None:
        turns = [assistant("hello"), user("p"), assistant(" "), user("q"), assistant("r")]
        examples, dropped = read({"messages": turns}, turns="all")
        assert [e.id for e in examples] == ["d[0]#3"]
        assert dropped == [
            Dropped("d[0]#1", "no user turn before the response"),
            Dropped("d[0]#2", "empty response"),
        ]

    @pytest.mark.parametrize("turns", ["last", "first", "all"])
    def test_a_prompts_own_turns_are_never_responses(self, turns: str) -> None:
        row = {"prompt": [user("p1"), assistant("r1"), user("p2")], "chosen": [assistant("r2")]}
        assert only(row, turns=turns) == ([user("p1"), assistant("r1"), user("p2")], "r2")
        row["chosen"] = [user("p1"), assistant("r1"), user("p2"), assistant("r2")]
        assert only(row, turns=turns) == ([user("p1"), assistant("r1"), user("p2")], "r2")

    def test_a_completion_of_several_turns(self) -> None:
        row = {"prompt": "p1", "completion": [assistant("r1"), user("p2"), assistant("r2")]}
        assert only(row) == ([user("p1"), assistant("r1"), user("p2")], "r2")
        assert only(row, turns="first") == ([user("p1")], "r1")


class TestColumns:
    def test_prompt_input_and_response(self) -> None:
        row = {"instruction": "other", "task": "p", "context": "i", "reply": "r"}
        columns = {"prompt": "task", "input": "context", "response": "reply"}
        assert only(row, columns=columns) == ([user("p\n\ni")], "r")

    def test_one_of_them_and_the_other_recognised(self) -> None:
        assert only({"instruction": "p", "input": "i", "reply": "r"}, columns={"response": "reply"}) == (
            [user("p\n\ni")],
            "r",
        )
        assert only({"task": "p", "output": "r"}, columns={"prompt": "task"}) == ([user("p")], "r")

    def test_messages_and_system(self) -> None:
        row = {"chat": [user("p"), assistant("r")], "persona": "S", "messages": None, "system": "no"}
        assert only(row, columns={"messages": "chat", "system": "persona"}) == ([system("S"), user("p")], "r")

    def test_system_alone_leaves_the_rest_recognised(self) -> None:
        row = {"persona": "S", "question": "p", "answer": "r"}
        assert only(row, columns={"system": "persona"}) == ([system("S"), user("p")], "r")

    def test_prompt_and_response_go_before_a_conversation(self) -> None:
        row = {"messages": [user("no"), assistant("no")], "prompt": "p", "answer": "r"}
        assert only(row, columns={"response": "answer"}) == ([user("p")], "r")

    def test_a_column_that_only_later_rows_have(self) -> None:
        examples, _ = read(
            {"prompt": "p", "response": "r"}, {"prompt": "p", "response": "r", "hint": "i"}, columns={"input": "hint"}
        )
        assert [e.messages[-1]["content"] for e in examples] == ["p", "p\n\ni"]

    def test_a_column_that_is_not_there(self) -> None:
        said = refusal({"prompt": "p", "reply": "r"}, columns={"response": "replay"})
        assert said == "data.columns.response: d has no column 'replay'; did you mean reply? its columns: prompt, reply"

    def test_messages_beside_prompt(self) -> None:
        said = refusal({"a": 1}, columns={"messages": "a", "prompt": "a"})
        assert "data.columns: give messages, or prompt and response (and input), not both" in said

    def test_no_usable_column(self) -> None:
        said = refusal({"text": "p", "label": 1})
        assert "d: its columns aren't understood: text, label" in said
        for shape in ("messages", "conversations", "real", "chosen", "completion", "instruction", "question"):
            assert shape in said
        assert "data.columns.prompt=... and data.columns.response=..." in said

    def test_no_column_at_all(self) -> None:
        assert "its columns aren't understood: none" in refusal({})
        assert "its columns aren't understood: none" in refusal()


class TestDropped:
    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"prompt": "p", "response": ""}, "empty response"),
            ({"prompt": "p", "response": " \n"}, "empty response"),
            ({"prompt": "p", "response": None}, "empty response"),
            ({"prompt": "p", "response": math.nan}, "empty response"),
            ({"prompt": "", "response": "r"}, "empty prompt"),
            ({"prompt": None, "response": "r"}, "empty prompt"),
            ({"prompt": "p", "response": 3}, "response is not text"),
            ({"prompt": "p", "response": {"text": "r"}}, "response is not text"),
            ({"prompt": 3, "response": "r"}, "prompt is not text"),
            ({"prompt": b"p", "response": "r"}, "prompt is not text"),
            ({"prompt": "p", "response": "\ud800"}, "response is not valid Unicode"),
            ({"prompt": "p", "response": []}, "no assistant turn"),
            ({"prompt": "p", "response": ["r"]}, "unreadable messages: a turn is not an object"),
            ({"prompt": [], "response": "r"}, "no user turn before the response"),
            ({"prompt": [user("p"), assistant("x")], "response": "r"}, "no user turn before the response"),
            ({"prompt": "p", "response": "r", "system": 3}, "system prompt is not text"),
            ({"instruction": "p", "input": 3, "output": "r"}, "input is not text"),
            ({"instruction": [user("p")], "input": "i", "output": "r"}, "prompt is not text"),
            ({"messages": None}, "no messages"),
            ({"messages": math.nan}, "no messages"),
            ({"messages": []}, "no assistant turn"),
            ({"messages": [user("p")]}, "no assistant turn"),
            ({"messages": [assistant("r")]}, "no user turn before the response"),
            ({"messages": [user("p"), assistant("a"), assistant("r")]}, "no user turn before the response"),
            ({"messages": [user(" "), assistant("r")]}, "empty prompt"),
            ({"messages": [user("p"), assistant(None)]}, "empty response"),
            ({"messages": [user("p"), assistant(3)]}, "response is not text"),
            ({"messages": [user(3), assistant("r")]}, "message is not text"),
            ({"messages": "user: p"}, "unreadable messages: not a list"),
            ({"messages": {"role": "user"}}, "unreadable messages: not a list"),
            ({"messages": ["p", "r"]}, "unreadable messages: a turn is not an object"),
            ({"messages": [{"content": "p"}]}, "unreadable messages: a turn has no role"),
            ({"messages": [{"role": "tool", "content": "p"}]}, "unreadable messages: a turn has an unknown role"),
            ({"messages": [{"role": ["user"], "content": "p"}]}, "unreadable messages: a turn has an unknown role"),
            ({"messages": [user([{"type": "image"}]), assistant("r")]}, "unreadable messages: a part is not text"),
            ({"messages": [user([[["p"]]]), assistant("r")]}, "unreadable messages: a part is not text"),
        ],
        ids=repr,
    )
    def test_reasons(self, row: dict[str, Any], reason: str) -> None:
        assert why(row) == reason

    def test_no_usable_row_is_counted_by_reason(self) -> None:
        rows = [{"prompt": "p", "response": value} for value in ("", None, 3)]
        said = refusal(*rows)
        assert "d: none of its 3 rows can be used: empty response (2), response is not text (1)" in said
        assert "the first is d[0]. Read was prompt and response" in said
        assert "data.columns" in said


class TestLimit:
    def test_counts_usable_examples(self) -> None:
        rows = [{"prompt": "p", "response": value} for value in ("", "a", "", "b", "", "c")]
        examples, dropped = read(*rows, limit=2)
        assert [e.response for e in examples] == ["a", "b"]
        assert [d.id for d in dropped] == ["d[0]", "d[2]"]

    def test_may_end_within_a_row(self) -> None:
        examples, _ = read({"messages": CONVERSATION}, turns="all", limit=1)
        assert [e.id for e in examples] == ["d[0]#1"]

    def test_more_than_there_are(self) -> None:
        assert len(read({"prompt": "p", "response": "r"}, limit=9)[0]) == 1


WEIRD: list[Any] = [
    None, math.nan, math.inf, 0, -1, 10**400, True, "", " ", "\ud800", "text", b"bytes", [], {}, (), {1, 2}, object(),
    [None], [[]], [{}], [[[[]]]], {"a": {"b": []}}, [1, "a", None], [{"role": None}], [{"role": "user"}],
    [{"role": {}, "content": []}], [user({}), assistant([])], [user([{}]), assistant([None])],
    [user("p"), assistant({})], [{"from": 3, "value": 3}], [{1: 2}], [user("p"), assistant("r")],
]  # fmt: skip
"""Values of every type and nesting; the last is a conversation."""

SHAPES = [
    ["messages"],
    ["conversations", "system"],
    ["real", "generated"],
    ["chosen", "rejected"],
    ["prompt", "chosen"],
    ["prompt", "completion"],
    ["instruction", "input", "output"],
    ["question", "answer", "system_prompt"],
]


@pytest.mark.parametrize("columns", SHAPES, ids="+".join)
@pytest.mark.parametrize("turns", ["last", "first", "all"])
def test_whatever_a_row_holds_it_is_an_example_or_dropped(columns: list[str], turns: str) -> None:
    choices = WEIRD if len(columns) < 3 else [*WEIRD[::2], WEIRD[-1], "text"]
    rows = [dict(zip(columns, values, strict=True)) for values in itertools.product(choices, repeat=len(columns))]
    rows += [{}, {"other": 1}]
    if "question" in columns:
        rows.append({"question": "p", "answer": "r"})
    examples, dropped = read(*rows, turns=turns)
    seen = {outcome.id.partition("#")[0] for outcome in (*examples, *dropped)}
    assert seen == {f"d[{index}]" for index in range(len(rows))}
    assert len({d.reason for d in dropped}) < 20
    for example in examples:
        json.dumps([example.messages, example.response], ensure_ascii=False).encode()
        assert example.response.strip()
        assert example.messages[-1]["role"] == "user"
        assert example.messages[-1]["content"].strip()
        assert all(message.keys() == {"role", "content"} for message in example.messages)
        assert all(message["role"] in {"system", "user", "assistant"} for message in example.messages)


def test_a_conversation_of_a_hundred_thousand_turns() -> None:
    """Each response would be an example with all before it: as many turns as it has, squared."""
    turns = [user("a"), assistant("b")] * 50_000
    examples, dropped = read({"messages": turns}, turns="all")
    assert [len(example.messages) for example in examples] == list(range(1, MOST_TURNS + 1, 2))
    assert {one.reason for one in dropped} == {"after more than 256 turns"}
    assert len(examples) + len(dropped) == 50_000
    assert len(read({"messages": turns}, turns="last")[0]) == 1

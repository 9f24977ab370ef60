"""Questions from files of all the shapes that are understood."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spinlm.data.examples import Message
from spinlm.data.questions import Question, load_questions
from spinlm.errors import UserError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(*rows: Any) -> Path:
        path = tmp_path / "questions.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return written


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


class TestShapes:
    def test_mt_benchs_own(self, write: Write) -> None:
        row = {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."], "reference": ["x", "y"]}
        (question,) = load_questions(str(write(row)))
        assert question == Question("81", (user("Write."),), ("Rewrite.",), "writing", ("x", "y"))
        assert (question.turns, question.reference(0), question.reference(1)) == (2, "x", "y")

    def test_the_hubs(self, write: Write) -> None:
        row = {"prompt_id": 90, "category": "maths", "prompt": ["1+1?", "2+2?"], "reference": []}
        (question,) = load_questions(str(write(row)))
        assert question == Question("90", (user("1+1?"),), ("2+2?",), "maths")
        assert question.reference(1) == ""

    @pytest.mark.parametrize(
        ("row", "messages", "references"),
        [
            ({"prompt": "Why?"}, [user("Why?")], ()),
            ({"prompt": "Why?", "reference": "So."}, [user("Why?")], ("So.",)),
            ({"prompt": "Why?", "reference": None}, [user("Why?")], ("",)),
            ({"instruction": "Add.", "input": "1 2"}, [user("Add.\n\n1 2")], ("",)),
            ({"instruction": "Add.", "input": ""}, [user("Add.")], ("",)),
            ({"prompt": [{"from": "human", "value": "Why?"}]}, [user("Why?")], ("",)),
            (
                {"messages": [{"role": "system", "content": "Be brief."}, user("Why?")]},
                [{"role": "system", "content": "Be brief."}, user("Why?")],
                ("",),
            ),
            (
                {"messages": [user("Why?"), {"role": "assistant", "content": "So."}], "reference": "no"},
                [user("Why?")],
                ("So.",),
            ),
        ],
    )
    def test_one_turn(
        self, write: Write, row: dict[str, Any], messages: list[dict[str, str]], references: tuple[str, ...]
    ) -> None:
        (question,) = load_questions(str(write(row)))
        assert list(question.messages) == messages
        assert question.id == "questions.jsonl:1"
        assert question.turns == 1
        assert question.reference(0) == "".join(references)

    def test_a_directory_of_files(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text('[{"prompt": "a"}]')
        (tmp_path / "b.csv").write_text("prompt\nb\n")
        assert [question.messages[0]["content"] for question in load_questions(str(tmp_path))] == ["a", "b"]


def test_a_conversation_grows_by_the_answers() -> None:
    question = Question("1", (Message(role="user", content="one"),), ("two", "three"))
    assert [m["content"] for m in question.asked([])] == ["one"]
    assert [m["content"] for m in question.asked(["1"])] == ["one", "1", "two"]
    assert [(m["role"], m["content"]) for m in question.asked(["1", "2"])] == [
        ("user", "one"),
        ("assistant", "1"),
        ("user", "two"),
        ("assistant", "2"),
        ("user", "three"),
    ]


class TestBadInput:
    @pytest.mark.parametrize(
        ("row", "words"),
        [
            ({"text": "Why?"}, "questions.jsonl:2: holds no question: give it as turns"),
            ({"prompt": ""}, "questions.jsonl:2: holds no question"),
            ({"prompt": "  "}, "questions.jsonl:2: a turn of it is empty"),
            ({"turns": ["a", ""]}, "questions.jsonl:2: a turn of it is empty"),
            ({"turns": ["a", 3]}, "questions.jsonl:2: message is not text"),
            ({"turns": "\ud800"}, "questions.jsonl:2: message is not valid Unicode"),
            ({"prompt": "a", "reference": 3}, "questions.jsonl:2: response is not text"),
            ({"messages": [{"role": "system", "content": "x"}]}, "questions.jsonl:2: its messages have no user's"),
            ({"messages": [{"role": "nobody", "content": "x"}]}, "questions.jsonl:2: unreadable messages"),
            ({"question_id": 1, "prompt": "b"}, "questions.jsonl:2 and questions.jsonl:1 are both named '1'"),
        ],
    )
    def test_the_row_is_named(self, write: Write, row: dict[str, Any], words: str) -> None:
        with pytest.raises(UserError) as raised:
            load_questions(str(write({"question_id": 1, "prompt": "a"}, row)))
        assert str(raised.value).startswith(f"questions: {words}")

    def test_no_rows(self, write: Write) -> None:
        with pytest.raises(UserError, match=r"questions: .*there are no rows in it"):
            load_questions(str(write()))

    def test_no_file(self) -> None:
        with pytest.raises(UserError, match=r"questions: nothing.jsonl: no such file"):
            load_questions("nothing.jsonl")

    def test_no_such_dataset(self) -> None:
        with pytest.raises(UserError, match="questions: nobody/nothing: not a file or directory here, and the hub"):
            load_questions("nobody/nothing")

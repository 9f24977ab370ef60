"""The questions of judged benchmarks: from a file of any usual shape, or from the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spinlm.config import DataSection
from spinlm.data.examples import Message
from spinlm.data.formats import conversation
from spinlm.data.sources import Row, read_rows
from spinlm.errors import UserError

UNDERSTOOD = "turns (a list of texts), prompt, messages or instruction"


@dataclass(frozen=True)
class Question:
    """What is asked in one conversation.

    Attributes:
        id: Its name in the file, or its place there.
        messages: All that stands before the first answer; the last is a user's.
        later_turns: What the user says after each answer but the last.
        category: For sums by category; empty where there is none.
        references: For each turn, a right answer to hold others against; empty where there is none.
    """

    id: str
    messages: tuple[Message, ...]
    later_turns: tuple[str, ...] = ()
    category: str = ""
    references: tuple[str, ...] = ()

    @property
    def turns(self) -> int:
        """How many answers it wants."""
        return 1 + len(self.later_turns)

    def asked(self, answers: Sequence[str]) -> tuple[Message, ...]:
        """The conversation up to where the answer after these begins."""
        messages = list(self.messages)
        for answer, turn in zip(answers, self.later_turns, strict=False):
            messages += [Message(role="assistant", content=answer), Message(role="user", content=turn)]
        return tuple(messages)

    def reference(self, turn: int) -> str:
        """The right answer to a turn, counted from 0; empty where there is none."""
        return self.references[turn] if turn < len(self.references) else ""


def load_questions(source: str, revision: str | None = None) -> list[Question]:
    """Read questions: `turns` in MT-bench's layout, or `prompt`, `messages` or `instruction`, one question a row.

    Optional: `question_id` (or `prompt_id`, `id`), `category`, and `reference`, a text or one for each turn.
    The last answer in `messages` is taken as the reference.

    Args:
        source: A JSON, JSONL, CSV or Parquet file, a directory of them, or a dataset on the hub.
        revision: Of a dataset on the hub.

    Raises:
        UserError: It can't be read, a row holds no question, or two have the same name.
    """
    try:
        rows = read_rows(DataSection(source=source, revision=revision))
    except UserError as error:
        raise UserError(str(error).replace("data.source", "questions")) from None
    questions = [_question(row) for row in rows]
    places: dict[str, str] = {}
    for row, question in zip(rows, questions, strict=True):
        first = places.setdefault(question.id, row.place)
        if first != row.place:
            raise UserError(f"questions: {row.place} and {first} are both named {question.id!r}: name each once")
    return questions


def _question(row: Row) -> Question:
    try:
        messages, later_turns, answer = _conversation(row.columns)
        references = _texts(row.columns.get("reference"), "assistant")
    except ValueError as reason:
        raise UserError(f"questions: {row.place}: {reason}") from None
    names = (row.columns.get(key) for key in ("question_id", "prompt_id", "id"))
    name = next((name for name in names if name is not None and name != ""), row.place)
    category = row.columns.get("category") or ""
    return Question(str(name), tuple(messages), tuple(later_turns), str(category), answer or references)


def _conversation(columns: dict[str, Any]) -> tuple[list[Message], list[str], tuple[str, ...]]:
    """The messages before the first answer, the user's later turns, and the answer that is given already."""
    if columns.get("messages"):
        return _given(conversation(columns["messages"]))
    if columns.get("turns"):
        return _by_turns(columns["turns"])
    if columns.get("prompt"):
        prompt = columns["prompt"]
        is_conversation = isinstance(prompt, (list, tuple)) and any(isinstance(turn, dict) for turn in prompt)
        return _given(conversation(prompt)) if is_conversation else _by_turns(prompt)
    if columns.get("instruction"):
        parts = _texts([columns["instruction"], columns.get("input")], "user")
        return _by_turns("\n\n".join(part for part in parts if part.strip()))
    raise ValueError(f"holds no question: give it as {UNDERSTOOD}")


def _given(messages: list[Message]) -> tuple[list[Message], list[str], tuple[str, ...]]:
    answer: tuple[str, ...] = ()
    if messages and messages[-1]["role"] == "assistant":
        answer = (messages.pop()["content"],)
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError("its messages have no user's question at their end")
    return messages, [], answer


def _by_turns(turns: Any) -> tuple[list[Message], list[str], tuple[str, ...]]:
    first, *later = _texts(turns, "user")
    if not all(text.strip() for text in (first, *later)):
        raise ValueError("a turn of it is empty")
    return [Message(role="user", content=first)], later, ()


def _texts(value: Any, role: str) -> tuple[str, ...]:
    """One text or a list of them; nothing, as datasets say it, is empty text."""
    texts = value if isinstance(value, (list, tuple)) else [value]
    return tuple(turn["content"] for turn in conversation([{"role": role, "content": text} for text in texts]))

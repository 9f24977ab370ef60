"""What a row means: which of its columns are a conversation, or a prompt and its response."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from spinlm.config import DataSection
from spinlm.data.examples import Dropped, Example, Message
from spinlm.data.sources import Row, read_rows
from spinlm.errors import UserError

UNDERSTOOD = """\
  messages                      a list of {role, content}
  conversations                 a list of {from, value} (ShareGPT)
  real                          a list of {role, content} (SPIN's own files)
  chosen, rejected, prompt?     preference data: the chosen response, or the conversation with it
  prompt, response              or prompt, completion: text, or lists of {role, content}
  instruction, input?, output
  question, answer
each with an optional system or system_prompt."""

CONVERSATION_COLUMNS = ("messages", "conversations", "real")
PROMPT_AND_RESPONSE_COLUMNS = (
    ("prompt", "chosen"),
    ("question", "chosen"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
)
SYSTEM_COLUMNS = ("system", "system_prompt")

MOST_TURNS = 256
"""Before a response that is one of several of its conversation: each of them has a prompt of its own, and all of these
together would be as many turns as the conversation has, squared."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""The names datasets have for the three roles."""


@dataclass(frozen=True)
class Shape:
    """Which column plays which part: `messages`, or `prompt` and `response`. The others are optional."""

    messages: str | None = None
    prompt: str | None = None
    input: str | None = None
    response: str | None = None
    system: tuple[str, ...] = SYSTEM_COLUMNS


class _UnusableError(Exception):
    """Why a row can't be used, in a short phrase."""


def load_examples(section: DataSection) -> tuple[list[Example], list[Dropped]]:
    """Read a dataset: the examples in its rows, and the rows that can't be used.

    Raises:
        UserError: It can't be read, isn't understood, or has no usable row.
    """
    return examples_of(read_rows(section), section)


def examples_of(rows: Sequence[Row], section: DataSection) -> tuple[list[Example], list[Dropped]]:
    """The examples in the rows, and the rows that can't be used; reading stops at `section.limit` examples.

    The columns are recognised once, from the first row and `section.columns`.

    Raises:
        UserError: The columns aren't understood, one named in `section.columns` isn't there, or not a
            single row can be used.
    """
    shape = _recognise(rows, section)
    examples: list[Example] = []
    dropped: list[Dropped] = []
    for row in rows:
        for outcome in _outcomes(row, shape, section.turns):
            if isinstance(outcome, Dropped):
                dropped.append(outcome)
            else:
                examples.append(outcome)
            if len(examples) == section.limit:
                return examples, dropped
    if not examples:
        raise UserError(_nothing_usable(dropped, len(rows), shape, section))
    return examples, dropped


def conversation(turns: Any) -> list[Message]:
    """A list of turns as messages, with our names for their roles.

    Raises:
        ValueError: It isn't one; the message is a short reason.
    """
    try:
        return _turns(turns)
    except _UnusableError as unusable:
        raise ValueError(str(unusable)) from None


# Which columns


def _recognise(rows: Sequence[Row], section: DataSection) -> Shape:
    columns = list(rows[0].columns) if rows else []
    mapped = section.columns
    _check_mapping(rows, section)
    system = (mapped["system"],) if "system" in mapped else SYSTEM_COLUMNS
    if "messages" in mapped:
        return Shape(messages=mapped["messages"], system=system)
    names_parts = bool(mapped.keys() & {"prompt", "input", "response"})
    for name in CONVERSATION_COLUMNS:
        if name in columns and not names_parts:
            return Shape(messages=name, system=system)
    for default_prompt, default_response in PROMPT_AND_RESPONSE_COLUMNS:
        prompt, response = mapped.get("prompt", default_prompt), mapped.get("response", default_response)
        if {prompt, response} <= {*columns, *mapped.values()}:
            input_column = mapped.get("input", "input" if prompt == "instruction" else None)
            return Shape(prompt=prompt, input=input_column, response=response, system=system)
    if {"chosen", "rejected"} <= set(columns) and not names_parts:
        return Shape(messages="chosen", system=system)
    raise UserError(
        f"data.source: {section.source}: its columns aren't understood: {', '.join(map(str, columns)) or 'none'}\n"
        f"understood are\n{UNDERSTOOD}\n"
        "or say which column is which, for example data.columns.prompt=... and data.columns.response=..."
    )


def _check_mapping(rows: Sequence[Row], section: DataSection) -> None:
    if "messages" in section.columns and section.columns.keys() & {"prompt", "input", "response"}:
        raise UserError("data.columns: give messages, or prompt and response (and input), not both")
    if not section.columns:
        return
    present = {str(name): None for row in rows for name in row.columns}
    for part, name in section.columns.items():
        if name not in present:
            matches = difflib.get_close_matches(name, present, n=1, cutoff=0.5)
            near = f"did you mean {matches[0]}? " if matches else ""
            raise UserError(
                f"data.columns.{part}: {section.source} has no column {name!r}; {near}"
                f"its columns: {', '.join(present) or 'none'}"
            )


def _nothing_usable(dropped: Sequence[Dropped], row_count: int, shape: Shape, section: DataSection) -> str:
    counts = Counter(d.reason for d in dropped).most_common()
    reasons = ", ".join(f"{reason} ({count})" for reason, count in counts)
    read_as = shape.messages or f"{shape.prompt} and {shape.response}"
    return (
        f"data.source: {section.source}: none of its {row_count} rows can be used: {reasons}; the first is "
        f"{dropped[0].id}. Read was {read_as}: where that is wrong, name the columns in data.columns"
    )


# One row


def _outcomes(row: Row, shape: Shape, turns: str) -> Iterator[Example | Dropped]:
    """A row's examples, as far as they can be used."""
    try:
        context, continuation = _conversation(row.columns, shape)
        wanted = _responses(continuation, turns)
    except _UnusableError as unusable:
        yield Dropped(row.place, str(unusable))
        return
    for number, position in enumerate(wanted, start=1):
        place = f"{row.place}#{number}" if turns == "all" else row.place
        if turns == "all" and position > MOST_TURNS:
            yield Dropped(place, f"after more than {MOST_TURNS:,} turns")
            continue
        try:
            prompt = _prompt((*context, *continuation[:position]))
            yield Example(place, prompt, _response(continuation[position]), row.verifier)
        except _UnusableError as unusable:
            yield Dropped(place, str(unusable))


def _responses(turns: Sequence[Message], which: str) -> list[int]:
    """Where the wanted responses are: the last assistant turn, the first, or all."""
    assistant = [position for position, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not assistant:
        raise _UnusableError("no assistant turn")
    return {"last": assistant[-1:], "first": assistant[:1], "all": assistant}[which]


def _prompt(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    if not turns or turns[-1]["role"] != "user":
        raise _UnusableError("no user turn before the response")
    if not turns[-1]["content"].strip():
        raise _UnusableError("empty prompt")
    return turns


def _response(turn: Message) -> str:
    if not turn["content"].strip():
        raise _UnusableError("empty response")
    return turn["content"]


def _conversation(columns: dict[str, Any], shape: Shape) -> tuple[list[Message], list[Message]]:
    """A row as what can only be prompt, and the turns after it, in which the responses are."""
    system = _system(columns, shape)
    if shape.messages is not None:
        turns = _turns(columns.get(shape.messages))
        return _system_turns(system, turns), turns
    prompt = _prompt_turns(columns, shape)
    response = _turns_or_text(columns.get(str(shape.response)), "assistant", "response")
    repeated = _repeated(prompt, response)
    if repeated:  # the response column holds the prompt's turns too, and perhaps a system prompt of its own
        prompt = response[:repeated] if _has_system(response) else prompt
        response = response[repeated:]
    return [*_system_turns(system, prompt), *prompt], response


def _prompt_turns(columns: dict[str, Any], shape: Shape) -> list[Message]:
    prompt = columns.get(str(shape.prompt))
    extra = _text(columns.get(shape.input), "input") if shape.input is not None else ""
    if extra.strip():
        joined = [part for part in (_text(prompt, "prompt"), extra) if part.strip()]
        prompt = "\n\n".join(joined)
    return _turns_or_text(prompt, "user", "prompt")


def _repeated(prompt: list[Message], response: list[Message]) -> int:
    """How many turns at the response's beginning are the prompt's again, system prompts aside."""
    said = [turn for turn in prompt if turn["role"] != "system"]
    positions = [position for position, turn in enumerate(response) if turn["role"] != "system"]
    opening = [response[position] for position in positions[: len(said)]]
    return positions[len(said) - 1] + 1 if said and opening == said else 0


def _system(columns: dict[str, Any], shape: Shape) -> str:
    texts = (_text(columns.get(name), "system prompt") for name in shape.system)
    return next((text for text in texts if text.strip()), "")


def _system_turns(system: str, turns: Sequence[Message]) -> list[Message]:
    """The system column as a turn, unless the conversation has a system prompt of its own."""
    return [Message(role="system", content=system)] if system and not _has_system(turns) else []


def _has_system(turns: Sequence[Message]) -> bool:
    return any(turn["role"] == "system" for turn in turns)


# One value, which may be anything


def _turns_or_text(value: Any, role: str, part: str) -> list[Message]:
    if isinstance(value, (list, tuple)):
        return _turns(value)
    return [Message(role=role, content=_text(value, part))]


def _turns(value: Any) -> list[Message]:
    if _is_missing(value):
        raise _UnusableError("no messages")
    if not isinstance(value, (list, tuple)):
        raise _UnusableError("unreadable messages: not a list")
    return [_turn(turn) for turn in value]


def _turn(value: Any) -> Message:
    if not isinstance(value, dict):
        raise _UnusableError("unreadable messages: a turn is not an object")
    name = _first_present(value, "role", "from")
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        known = "no role" if name is None else "an unknown role"
        raise _UnusableError(f"unreadable messages: a turn has {known}")
    content = _first_present(value, "content", "value")
    if isinstance(content, (list, tuple)):
        content = "".join(_part(part) for part in content)
    return Message(role=role, content=_text(content, "response" if role == "assistant" else "message"))


def _part(value: Any) -> str:
    """One part of a content that is a list of them."""
    if isinstance(value, dict) and value.get("type") in (None, "text"):
        value = value.get("text")
    if not isinstance(value, str):
        raise _UnusableError("unreadable messages: a part is not text")
    return value


def _first_present(value: dict[str, Any], *keys: str) -> Any:
    return next((value[key] for key in keys if not _is_missing(value.get(key))), None)


def _text(value: Any, part: str) -> str:
    """A value as text; nothing, as datasets say it, is empty text."""
    if _is_missing(value):
        return ""
    if not isinstance(value, str):
        raise _UnusableError(f"{part} is not text")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and no tokenizer reads
        raise _UnusableError(f"{part} is not valid Unicode") from None
    return value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)

"""What a dataset row becomes before it is tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """A prompt and the real response to it.

    Attributes:
        id: Stable name: the row's place in its source, with the turn's when a row has several.
        messages: The prompt: everything before the response, the last message being a user's.
        response: The real response's text.
        verifier: What the row's verifier needs to judge another response (`reasoning_gym:` sources).
    """

    id: str
    messages: tuple[Message, ...]
    response: str
    verifier: dict[str, Any] | None = None


@dataclass(frozen=True)
class Dropped:
    """A row, or one turn of it, that can't be used.

    Attributes:
        id: As the Example's would have been.
        reason: A short phrase, one of few, so that rows can be counted by it.
    """

    id: str
    reason: str

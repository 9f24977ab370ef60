"""What every engine is asked for, and what it gives back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from spinlm.config import GenerationSection


@dataclass(frozen=True)
class Sampling:
    """How a next token is drawn. A temperature of 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @classmethod
    def of(cls, section: GenerationSection, greedy: bool = False) -> Sampling:
        if greedy:
            return cls(section.max_new_tokens, temperature=0.0)
        return cls(section.max_new_tokens, section.temperature, section.top_p, section.top_k)


@dataclass(frozen=True)
class Request:
    """A prompt to answer, and the seed that decides its sampled answer whatever is decoded beside it."""

    prompt_ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Response:
    """An answer.

    Attributes:
        token_ids: With the token that ended it, if one did.
        text: Without special tokens.
        finish_reason: `stop`, or `length` where it was cut at the cap.
        logprob: Under the engine: the sum over its tokens of the model's own (untempered) log-probs.
    """

    token_ids: list[int]
    text: str
    finish_reason: Literal["stop", "length"]
    logprob: float


OnProgress = Callable[[int, int], None]
"""Called after each decoding step with the tokens it made and the responses it finished; where an engine has to begin
again, with what that takes back, below 0."""


class Engine(Protocol):
    """Answers requests as whoever is seated."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: OnProgress | None = None
    ) -> list[Response]:
        """One response for each request, in their order."""
        ...


def request_seed(*parts: object) -> int:
    """A seed from whatever names a request: the run's seed, the player, the example, which of its k responses."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

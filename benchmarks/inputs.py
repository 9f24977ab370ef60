"""What is trained on and answered: seeded, of uneven lengths."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from spinlm.data.pairs import Pair
from spinlm.data.render import Renderer

FIRST_ORDINARY_TOKEN, LAST_ORDINARY_TOKEN = 64, 48_000
"""Past the special tokens of SmolLM2, and in GPT-Neo's vocabulary too."""


@dataclass(frozen=True)
class PairSet:
    """The lengths of a set of pairs, in tokens; all are drawn evenly from first to last.

    Attributes:
        prompt: About a nominal length: a quarter less to a quarter more.
        response: Of real and of synthetic responses.
    """

    prompt: tuple[int, int]
    response: tuple[int, int]

    def pairs(self, count: int, seed: int = 0, copies: int = 1) -> list[Pair]:
        """Pairs of random tokens that no opponent has scored yet; the first ones of a longer list are the same.

        Args:
            count: How many.
            seed: Of lengths and tokens.
            copies: They come so many times, each time with other tokens.
        """
        chance = random.Random(f"{self}/{seed}")
        pairs = [self._pair(chance) for _ in range(count)]
        return [_shifted(pair, copy) for copy in range(copies) for pair in pairs]

    def stretched(self, factor: int) -> PairSet:
        """The same with longer responses."""
        shortest, longest = self.response
        return replace(self, response=(factor * shortest, factor * longest))

    def _pair(self, chance: random.Random) -> Pair:
        def tokens(lengths: tuple[int, int]) -> list[int]:
            return [chance.randint(FIRST_ORDINARY_TOKEN, LAST_ORDINARY_TOKEN) for _ in range(chance.randint(*lengths))]

        return Pair(tokens(self.prompt), tokens(self.response), tokens(self.response), math.nan, math.nan)


def _shifted(pair: Pair, by: int) -> Pair:
    prompt, real, synthetic = (
        [token + by for token in ids] for ids in (pair.prompt_ids, pair.real_ids, pair.synthetic_ids)
    )
    return replace(pair, prompt_ids=prompt, real_ids=real, synthetic_ids=synthetic)


SETS = {
    "short": PairSet(prompt=(36, 60), response=(8, 32)),
    "balanced": PairSet(prompt=(96, 160), response=(64, 256)),
    "long": PairSet(prompt=(384, 640), response=(64, 128)),
}

_FORMS = (
    "Write a sentence about {a}.",
    "What is the difference between {a} and {b}?",
    "Give three reasons why somebody may like {a}, and one against it.",
    "Tell a very short story in which {a} and {b} meet by chance, and say how it ends.",
    "Explain {a} to a child.",
    "Name something that is as old as {a}.",
    "Somebody wants to buy {a}, but there is only {b} left. Write the short letter in which the shop says so, "
    "politely, and offers something else.",
)
_THINGS = (
    "a river", "the moon", "a bicycle", "a library", "bread", "an old clock", "a thunderstorm", "a violin", "the sea",
    "a garden", "a train", "chess", "a lighthouse", "snow", "a bakery", "the wind", "a map", "a bridge", "honey",
    "a telescope", "a harbour", "the alphabet", "a mountain hut", "a market", "an umbrella", "a newspaper",
)  # fmt: skip
_ANSWERS = (
    "There is more to {a} than people think.",
    "{A} and {b} have little in common.",
    "I would say: {a}, of course.",
    "It began with {a}, went on with {b}, and ended well for everybody.",
)


def instructions(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Short instructions of uneven length, no two alike as far as that goes, and a plain answer to each."""
    chance = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        a, b = chance.sample(_THINGS, 2)
        words = {"a": a, "b": b, "A": a[0].upper() + a[1:]}
        rows.setdefault(chance.choice(_FORMS).format(**words), chance.choice(_ANSWERS).format(**words))
    return list(rows.items())


def prompts(renderer: Renderer, count: int, seed: int = 0) -> list[list[int]]:
    """Instructions as the model's chat template renders them."""
    return [renderer.prompt_ids([{"role": "user", "content": text}]) for text, _ in instructions(count, seed)]


def answer_tokens(ids: Sequence[int], stop_ids: frozenset[int]) -> list[int]:
    """An answer up to the token that ends it, that token included: what every side's generated tokens are."""
    ends = (place + 1 for place, token in enumerate(ids) if token in stop_ids)
    return list(ids[: next(ends, len(ids))])

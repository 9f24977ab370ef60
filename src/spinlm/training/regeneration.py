"""Regeneration inside an iteration: every so many steps the main player itself becomes the opponent.

IRFT (arXiv 2405.17888) draws the synthetic responses anew while it trains. Here each round of steps is a short
iteration of self-play: the player as the round begins answers the prompts of the round's pairs and scores them, so
that every margin is 0 there again, while the optimiser and its schedule go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from itertools import islice
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from spinlm.data.pairs import Pair
from spinlm.players.models import without_dropout
from spinlm.training.spin_trainer import PromptSampler, SPINTrainer

Answer = Callable[[Any, int, Sequence[Pair]], list[Pair]]
"""From the model, a round's number and its pairs: the pairs with the model's own responses, not yet scored."""

Keep = Callable[[int, Callable[[], list[Pair]]], list[Pair]]
"""From a round's number and a way to make its pairs: the pairs, made and kept, or as they were kept before."""


class RegeneratingTrainer(SPINTrainer):
    """A SPINTrainer in one process whose pairs are made anew when a round of `every` steps begins."""

    def __init__(self, *args: Any, every: int, answer: Answer, keep: Keep, **kwargs: Any) -> None:
        """As SPINTrainer.

        Args:
            args: SPINTrainer's.
            every: Optimiser steps in a round; the first has the pairs that were given.
            answer: Makes the new responses.
            keep: Keeps a round's pairs, so that a resumed training has the same.
            kwargs: SPINTrainer's.
        """
        self._every = every
        self._answer = answer
        self._keep = keep
        self._round = 0
        self._fresh: dict[Hashable, Pair] = {}
        super().__init__(*args, **kwargs)
        self.add_callback(_SaveEachRound(every))

    def as_they_are_now(self, rows: list[Pair]) -> list[Pair]:
        """The rows with this round's responses; those that teach nothing are left out, if not all do."""
        number = self.state.global_step // self._every
        if number == 0:
            return rows
        if number != self._round:
            self._begin(number)
        fresh = [self._fresh[_key(row)] for row in rows]
        return self.instructive(fresh)[0] or fresh

    def _begin(self, number: int) -> None:
        pairs = self._pairs_of(number)

        def make() -> list[Pair]:
            with without_dropout(self.model), self.accelerator.autocast():
                return self.scored(self._answer(self.model, number, list(pairs.values())))

        fresh = self._keep(number, make)
        self._fresh = dict(zip(pairs, fresh, strict=True))
        self._round = number
        self.dropped_identical = self.instructive(fresh)[1]

    def _pairs_of(self, number: int) -> dict[Hashable, Pair]:
        """The pairs that a round's steps train on, by their keys."""
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        steps_an_epoch = math.ceil(len(self.train_dataset) / size)
        sampler = PromptSampler(self.train_dataset, self.sampler_seed)
        pairs: dict[Hashable, Pair] = {}
        for step in range(number * self._every, min((number + 1) * self._every, self.state.max_steps)):
            epoch, within = divmod(step, steps_an_epoch)
            sampler.set_epoch(epoch)
            for place in islice(sampler, within * size, (within + 1) * size):
                pairs.setdefault(_key(self.train_dataset[place]), self.train_dataset[place])
        return pairs


class _SaveEachRound(TrainerCallback):
    """What comes before the next round's responses, which may take long, isn't lost where they are interrupted."""

    def __init__(self, every: int) -> None:
        self._every = every

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            control.should_save = True


def _key(pair: Pair) -> Hashable:
    """What a pair is known by, in whichever process it is."""
    return tuple(pair.prompt_ids), tuple(pair.real_ids), tuple(pair.synthetic_ids)

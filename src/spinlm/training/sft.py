"""The supervised stage: the real responses' tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spinlm.data.pairs import Group
from spinlm.data.prepare import TokenizedExample
from spinlm.players.layouts import ResponseBatch, count_tokens, lay_out
from spinlm.players.logprobs import Method, response_logprobs
from spinlm.training.checkpoints import Arguments
from spinlm.training.passes import PassTrainer


class SFTTrainer(PassTrainer[TokenizedExample]):
    """Cross-entropy, averaged over the response tokens of the optimiser's whole batch."""

    def __init__(
        self,
        model: Any,
        args: Arguments,
        examples: Sequence[TokenizedExample],
        pad_id: int,
        method: Method,
        tokens_per_pass: int,
    ) -> None:
        self.method = method
        self.tokens_per_pass = tokens_per_pass
        self._pad_id = pad_id
        super().__init__(rows_are="examples", model=model, args=args, train_dataset=list(examples))

    def count_items(self, rows: Sequence[TokenizedExample]) -> int:
        return sum(len(row.real_ids) for row in rows)

    def count_tokens(self, rows: Sequence[TokenizedExample]) -> int:
        return count_tokens(_groups(rows), self.method.layout)

    def lay_out(self, rows: Sequence[TokenizedExample]) -> ResponseBatch:
        return lay_out(_groups(rows), self.method.layout, self._pad_id)

    def compute_loss(
        self, model: Any, inputs: ResponseBatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The negative log-likelihood of a token."""
        processes = self.accelerator.num_processes if model.training else 1
        logprobs = response_logprobs(model, inputs)
        self.numbers = {"loss": -logprobs.detach()}
        loss = -logprobs.sum() * processes / num_items_in_batch
        return (loss, {}) if return_outputs else loss


def _groups(rows: Sequence[TokenizedExample]) -> list[Group]:
    return [Group(row.prompt_ids, [row.real_ids]) for row in rows]

"""Log-probs of responses by the forward pass of training, in the fastest layout that a model computes rightly."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlm.data.pairs import Group
from spinlm.errors import UserError, first_line
from spinlm.hardware import is_out_of_memory
from spinlm.players.attention import SegmentedAttention, segmented_attention, takes_segments
from spinlm.players.head import LogitScale, head_logprobs
from spinlm.players.layouts import LAYOUTS, Layout, ResponseBatch, Segment, count_tokens, into_passes, lay_out
from spinlm.players.linear import fast_linear_layers

NO_SEGMENTS = "the model has no attention that could be told what belongs together"
NOT_FINITE = "model.name: this model's log-probs are not finite numbers; try model.dtype=float32"


def tolerance(dtype: torch.dtype) -> float:
    """How far two computations of one log-prob may be apart, times the square root of the response's tokens."""
    return {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}.get(dtype, 0.2)


def widest_float(device: torch.device) -> torch.dtype:
    """float64, but on Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def causal_lm(model: Any) -> Any:
    """The causal language model inside an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@dataclass(frozen=True)
class Method:
    """How the log-probs of responses are computed.

    Attributes:
        layout: Of a batch.
        fused_head: Whether they come straight from the hidden states; else from logits, of response positions alone
            where the model can be asked for those.
        reason: Why not by a faster method, in words; empty where there is none.
    """

    layout: Layout = "plain"
    fused_head: bool = True
    reason: str = ""


@contextmanager
def scoring(model: Any, method: Method) -> Iterator[None]:
    """While it lasts, `model(..., predicting=, targets=, segments=)` gives log-probs [R] in place of logits.

    Forward and backward passes both belong inside: checkpointed layers are computed again in the backward pass.

    Args:
        model: A causal language model, with or without an adapter, not yet wrapped for distribution.
        method: For the batches to come.
    """
    inner = causal_lm(model)
    with ExitStack() as stack:
        stack.enter_context(fast_linear_layers(inner))
        attention = stack.enter_context(segmented_attention(inner)) if method.layout != "plain" else None
        own = vars(inner).get("forward")
        inner.forward = _ScoringForward(inner, attention, method.fused_head)
        try:
            yield
        finally:
            del inner.forward
            if own is not None:
                inner.forward = own


class _ScoringForward:
    """A causal language model's forward that gives the targets' log-probs."""

    def __init__(self, model: Any, attention: SegmentedAttention | None, fused_head: bool) -> None:
        self._forward = model.forward
        self._head = model.get_output_embeddings()
        fuses = fused_head and self._head is not None and not _is_gathered_by_zero(self._head)
        self._scale = LogitScale.of(model.config) if fuses else None
        self._can_choose = bool(logits_argument(model, 1))
        self._attention = attention

    def __call__(
        self,
        *args: Any,
        predicting: Tensor | None = None,
        targets: Tensor | None = None,
        segments: Sequence[Segment] = (),
        **kwargs: Any,
    ) -> Any:
        if predicting is None or targets is None:
            return self._forward(*args, **kwargs)
        if self._attention is not None:
            self._attention.segments = segments
        if self._scale is None:
            return self._from_logits(predicting, targets, *args, **kwargs)
        return self._fused(self._scale, predicting, targets, *args, **kwargs)

    def _from_logits(self, predicting: Tensor, targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Those of response positions alone, where the model can be asked for them in one row; else all."""
        if self._can_choose and len(kwargs["input_ids"]) == 1:
            logits = self._forward(*args, logits_to_keep=predicting, **kwargs).logits[0]
        else:
            logits = self._forward(*args, **kwargs).logits.flatten(0, -2).index_select(0, predicting)
        return -F.cross_entropy(logits.float(), targets, reduction="none")

    def _fused(self, scale: LogitScale, predicting: Tensor, targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logprobs: list[Tensor] = []

        def score(head: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            """Within the model's forward: whatever is set up there (autocast, gathered weights) holds for the head."""
            hook.remove()
            hidden = inputs[0]
            chosen = hidden.flatten(0, -2).index_select(0, predicting)
            logprobs.append(head_logprobs(head, scale, chosen, targets))
            return (hidden[:1, :1].detach(),)

        hook = self._head.register_forward_pre_hook(score)
        try:
            self._forward(*args, **kwargs)
        finally:
            hook.remove()
        return logprobs[0]


def _is_gathered_by_zero(head: Any) -> bool:
    """ZeRO-3 gathers a module's weights for one call of it: the head can't be called within its own."""
    return any(hasattr(parameter, "ds_id") for parameter in head.parameters())


def response_logprobs(model: Any, batch: ResponseBatch) -> Tensor:
    """The log-prob of each response: the sum over its tokens, end-of-turn included, in float32, [N].

    Args:
        model: A causal language model, possibly wrapped for distribution, made ready by `scoring`.
        batch: N responses.
    """
    arguments = {} if batch["position_ids"] is None else {"position_ids": batch["position_ids"]}
    logprobs = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        predicting=batch["predicting"],
        targets=batch["targets"],
        segments=batch["segments"],
        use_cache=False,
        **arguments,
    )
    sums = torch.zeros(len(batch["lengths"]), dtype=torch.float32, device=logprobs.device)
    return sums.index_add(0, batch["owners"], logprobs)


def logits_argument(model: Any, count: int) -> dict[str, int]:
    """What asks a model for the last tokens' logits alone, where it can be asked."""
    takes = inspect.signature(causal_lm(model).forward).parameters
    return {"logits_to_keep": count} if "logits_to_keep" in takes else {}


def logprobs_from_logits(model: Any, group: Group) -> Tensor:
    """The same for one group by the model's own logits, one response at a time: slow, and beyond doubt."""
    device = next(model.parameters()).device
    sums = []
    for response in group.responses:
        ids = torch.tensor([[*group.prompt_ids, *response]], device=device)
        count = len(response)
        needed = logits_argument(model, count + 1)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **needed).logits
        sums.append(-F.cross_entropy(logits[0, -count - 1 : -1].float(), ids[0, -count:], reduction="sum"))
    return torch.stack(sums)


@torch.no_grad()
def score_groups(
    model: Any, groups: Sequence[Group], method: Method, tokens_per_pass: int, pad_id: int
) -> Iterator[tuple[list[int], list[list[float]]]]:
    """The log-probs of many groups' responses, pass by pass.

    Yields:
        The places of a pass's groups in the input, and the log-probs of their responses.
    """
    device = next(model.parameters()).device
    with scoring(model, method):
        for places in into_passes(
            range(len(groups)), lambda places: count_tokens([groups[i] for i in places], method.layout), tokens_per_pass
        ):
            batch: Any = lay_out([groups[i] for i in places], method.layout, pad_id)
            on_device = {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
            values = iter(response_logprobs(model, on_device).tolist())  # type: ignore[arg-type]
            yield list(places), [[next(values) for _ in groups[i].responses] for i in places]


def all_scores(
    model: Any, groups: Sequence[Group], method: Method, tokens_per_pass: int, pad_id: int
) -> list[list[float]]:
    """The log-probs of each group's responses."""
    scores: list[list[float]] = [[] for _ in groups]
    for places, values in score_groups(model, groups, method, tokens_per_pass, pad_id):
        for place, scored in zip(places, values, strict=True):
            scores[place] = scored
    return scores


@torch.no_grad()
def choose_method(
    model: Any, groups: Sequence[Group], pad_id: int, dtype: torch.dtype, layouts: Sequence[Layout] = LAYOUTS
) -> Method:
    """The fastest method that agrees with the model's own logits on the longest group, a middling and the shortest.

    Args:
        model: In evaluation mode.
        groups: The run's own, with two or more responses each.
        pad_id: For the plain layout.
        dtype: Of the forward pass: what differs by less than its rounding agrees.
        layouts: To choose from, the fastest first.

    Raises:
        UserError: None agrees.
    """
    by_length = sorted(groups, key=lambda one: -count_tokens([one], "shared"))
    groups = [by_length[place] for place in sorted({0, len(groups) // 2, len(groups) - 1})]
    expected = [logprobs_from_logits(model, one).tolist() for one in groups]
    if not all(math.isfinite(value) for values in expected for value in values):
        raise UserError(NOT_FINITE)
    allowed = 2e-4 if dtype == torch.float32 else tolerance(dtype)
    reasons: list[str] = []
    for fused_head in (True, False):
        for layout in layouts:
            method = Method(layout, fused_head, "; ".join(reasons))
            problem = _disagreement(model, groups, expected, method, pad_id, allowed)
            if problem is None:
                return method
            reasons.append(f"{layout}{' with a fused head' if fused_head else ''}: {problem}")
    raise UserError(f"layout: this model's log-probs come out wrong in every layout tried: {'; '.join(reasons)}")


def _disagreement(
    model: Any, groups: Sequence[Group], expected: list[list[float]], method: Method, pad_id: int, allowed: float
) -> str | None:
    if method.layout != "plain" and not takes_segments(causal_lm(model)):
        return NO_SEGMENTS
    try:
        scores = all_scores(model, groups, method, tokens_per_pass=2**62, pad_id=pad_id)
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):  # which says nothing about the layout
            raise
        return f"it can't be computed: {first_line(error)}"
    differences = [
        abs(ours - theirs) / len(response) ** 0.5
        for one, scored, wanted in zip(groups, scores, expected, strict=True)
        for response, ours, theirs in zip(one.responses, scored, wanted, strict=True)
    ]
    if not all(map(math.isfinite, differences)):
        return "log-probs come out that are not finite"
    worst = max(differences)
    return None if worst <= allowed else f"log-probs differ by {worst:.2g} times the square root of their tokens"

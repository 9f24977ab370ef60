"""Log-probs of tokens straight from hidden states: the whole vocabulary is never there for more than a chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from spinlm.players.linear import ROWS_TOGETHER, linear, rows_to_spare

CHUNK_BYTES = 32 * 2**20
"""Of logits in float32 at a time."""


@dataclass(frozen=True)
class LogitScale:
    """What a model does to its logits after the head: `cap * tanh(factor * logits / cap)`.

    Attributes:
        factor: Granite divides, Cohere multiplies; 1 elsewhere.
        cap: Gemma's soft cap; None elsewhere.
    """

    factor: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitScale:
        """As a model's configuration says."""
        text = config.get_text_config()
        factor = (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
        cap = getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None)
        return cls(float(factor), cap)

    def __call__(self, logits: Tensor) -> Tensor:
        """The logits as the model gives them."""
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def head_logprobs(head: Any, scale: LogitScale, hidden: Tensor, targets: Tensor) -> Tensor:
    """The log-prob of each target token, in float32, [R].

    Args:
        head: From hidden states to logits: any module.
        scale: What comes after it.
        hidden: The states that predict the targets, [R, H].
        targets: [R].
    """
    rows = max(16, CHUNK_BYTES // (4 * head_size(head)) // ROWS_TOGETHER * ROWS_TOGETHER)
    count, spare = len(targets), rows_to_spare(len(targets))
    hidden, targets = F.pad(hidden, (0, 0, 0, spare)), F.pad(targets, (0, spare))
    if torch.is_grad_enabled() and _is_frozen_linear(head):
        logprobs: Tensor = _FrozenHead.apply(hidden, targets, head.weight, head.bias, scale, rows)  # type: ignore[no-untyped-call]
        return logprobs[:count]
    chunks = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    if torch.is_grad_enabled():
        parts = [checkpoint(_chunk_logprobs, head, scale, h, t, use_reentrant=False) for h, t in chunks]
    else:
        parts = [_chunk_logprobs(head, scale, h, t) for h, t in chunks]
    return torch.cat(parts)[:count]


def head_size(head: Any) -> int:
    """The number of tokens that a head tells apart."""
    size = getattr(head, "out_features", None)
    return int(size if size is not None else head.weight.shape[0])


def _chunk_logprobs(head: Any, scale: LogitScale, hidden: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(scale(head(hidden)).float(), targets, reduction="none")


def _is_frozen_linear(head: Any) -> bool:
    """Nothing of it is trained, nothing changes what it gives, and its weights are whole in this process."""
    frozen = not any(parameter.requires_grad for parameter in head.parameters())
    hooked = bool(head._forward_hooks or head._forward_pre_hooks)
    elsewhere = isinstance(getattr(head, "weight", None), DTensor) or hasattr(getattr(head, "weight", None), "ds_id")
    return frozen and type(head) is nn.Linear and not hooked and not elsewhere


class _FrozenHead(torch.autograd.Function):
    """Computes the gradient by the hidden states along with the log-probs, so that no logits are kept or made again.

    For a token with logits z, log p(target) = z[target] - log sum exp z, whose gradient by z is
    onehot(target) - softmax(z).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, scale: LogitScale, rows: int
    ) -> Tensor:
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = scale(linear(hidden[part], weight, bias)).float()
            place = targets[part, None]
            slope = None if scale.cap is None else 1 - (logits / scale.cap).square()
            all_logprobs = torch.log_softmax(logits, dim=1)
            chosen = all_logprobs.gather(1, place)
            logprobs[part] = chosen[:, 0]
            against_logits = all_logprobs.exp_().scatter_(1, place, chosen.expm1())
            if slope is not None:
                against_logits *= slope
            gradient[part] = linear(against_logits.to(weight.dtype), weight.t()).mul_(-scale.factor)
        ctx.save_for_backward(gradient)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][:, None].to(gradient.dtype), None, None, None, None, None

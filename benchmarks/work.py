"""Floating-point work of training on pairs, counted from the model's shapes.

A multiply and an add are two operations. What is counted is what cannot be avoided: every token that the model has to
read is counted once, the prompt of a pair too, though two responses follow it. The last token of a response is
predicted but never read. Base weights are frozen: their own gradients are not needed. Counted are

- linear layers, N weights in all, a token read: 2 N forward, 2 N for the gradient of their input;
- their adapters, M weights in all, a token read: 2 M forward, 2 M for the gradient of their input, 2 M for their own;
- attention of width D in all layers together (layers x heads x head size), a couple of a token and one that it sees
  (itself included): 4 D forward (scores, weighted sum), 8 D backward (four products);
- the head, V x d, a predicted token: 2 V d forward, 2 V d for the gradient of its input.

Element-wise work (norms, activations, softmax, the optimiser) is left out, and so is whatever an implementation
computes more than once. The first layer's input needs no gradient: that saving, below 1 %, is not subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spinlm.data.pairs import Pair


@dataclass(frozen=True)
class Shapes:
    """What work depends on.

    Attributes:
        linear: Weights of all linear layers but the head.
        adapter: Weights of their adapters.
        attention: Width of attention, summed over layers.
        head: Weights of the head, V x d.
    """

    linear: int
    adapter: int
    attention: int
    head: int

    @classmethod
    def of(cls, model: Any, rank: int) -> Shapes:
        """Of a model without adapter, and LoRA of a rank on all its linear layers but the head."""
        import torch

        head = model.get_output_embeddings()
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        config = model.config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            linear=sum(layer.in_features * layer.out_features for layer in layers),
            adapter=sum(rank * (layer.in_features + layer.out_features) for layer in layers),
            attention=config.num_hidden_layers * config.num_attention_heads * width,
            head=head.in_features * head.out_features,
        )


def training_work(shapes: Shapes, pairs: Sequence[Pair]) -> int:
    """Operations of one forward and backward pass over pairs; see the module's text."""
    return sum(_pair_work(shapes, len(p.prompt_ids), len(p.real_ids), len(p.synthetic_ids)) for p in pairs)


def _pair_work(shapes: Shapes, prompt: int, real: int, synthetic: int) -> int:
    read = prompt + (real - 1) + (synthetic - 1)
    seen = triangle(prompt) + sum(prompt * (n - 1) + triangle(n - 1) for n in (real, synthetic))
    predicted = real + synthetic
    return read * (4 * shapes.linear + 6 * shapes.adapter) + seen * 12 * shapes.attention + predicted * 4 * shapes.head


def triangle(tokens: int) -> int:
    """How many tokens a run of tokens sees of itself, causally: 1 + 2 + … + tokens."""
    return tokens * (tokens + 1) // 2

"""Counted work against numbers worked by hand, and against torch's own counter."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

import tiny
from benchmarks.work import Shapes, training_work, triangle
from spinlm.data.pairs import Pair

RANK = 4


def _pair(prompt: int, real: int, synthetic: int) -> Pair:
    return Pair([1] * prompt, [2] * real, [3] * synthetic, math.nan, math.nan)


def test_a_pair_by_hand() -> None:
    """Prompt 3, responses 2 and 4: reads 3 + 1 + 3 tokens, predicts 6."""
    shapes = Shapes(linear=100, adapter=10, attention=8, head=50)
    sees = (1 + 2 + 3) + (4) + (4 + 5 + 6)
    expected = 7 * (4 * 100 + 6 * 10) + sees * 12 * 8 + 6 * 4 * 50
    assert expected == 3220 + 2400 + 1200
    assert training_work(shapes, [_pair(3, 2, 4)]) == expected
    assert training_work(shapes, [_pair(3, 2, 4)] * 2) == 2 * expected


def test_the_prompt_counts_once() -> None:
    linear_only = Shapes(linear=1, adapter=0, attention=0, head=0)
    assert training_work(linear_only, [_pair(100, 1, 1)]) == 4 * 100


def test_shapes_of_a_llama() -> None:
    """Hidden 16, two heads of 8 and one for keys and values, inner 32, two layers, vocabulary 260."""
    shapes = Shapes.of(tiny.build_model("llama"), RANK)
    weights = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32)
    lora = 2 * RANK * (32 + 2 * 24 + 32 + 3 * 48)
    assert shapes == Shapes(linear=weights, adapter=lora, attention=2 * 16, head=260 * 16)


@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
def test_linear_layers_and_adapters_are_what_torch_counts(family: str) -> None:
    """One sequence, all of it read, its attention left out: forward and backward as torch's counter sees them."""
    tokens = 24
    model = tiny.build_model(family)
    shapes = Shapes.of(model, RANK)
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.enable_input_require_grads()  # so that the first layer's input has a gradient too, as we count
    with FlopCounterMode(display=False) as counter:
        hidden = model.base_model.model.base_model(torch.arange(tokens)[None]).last_hidden_state
        model.get_output_embeddings()(hidden).sum().backward()
    products = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    linear = sum(flops for op, flops in products.items() if op in ("aten.mm", "aten.addmm"))
    assert linear == tokens * (4 * shapes.linear + 6 * shapes.adapter + 4 * shapes.head)


def test_triangle() -> None:
    assert [triangle(n) for n in range(5)] == [0, 1, 3, 6, 10]

"""A model and tokenizer with six tokens, whose every response of up to three tokens can be enumerated."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spinlm.config import PromptSection
from spinlm.data.render import Renderer
from unit.players.families import sharpened

WORDS, END, DEPTH = 5, 5, 3


def build_model(seed: int = 0) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=WORDS + 1,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=END,
    )
    torch.manual_seed(seed)
    return sharpened(transformers.LlamaForCausalLM(config).eval(), 15)


def build_renderer() -> Renderer:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "<eos>": END}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="a")
    return Renderer(fast, PromptSection(template="{prompt} "))


def next_token_probabilities(
    model: Any, ids: list[int], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> list[float]:
    """Of each token, worked out in plain Python."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].double()
    probabilities = torch.softmax(logits / temperature, -1).tolist()
    likeliest_first = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    kept = likeliest_first[:top_k] if top_k else likeliest_first
    total, sum_before, nucleus = sum(probabilities[token] for token in kept), 0.0, []
    for token in kept:
        if sum_before < top_p:
            nucleus.append(token)
        sum_before += probabilities[token] / total
    mass = sum(probabilities[token] for token in nucleus)
    return [probabilities[token] / mass if token in nucleus else 0.0 for token in range(len(probabilities))]


def response_distribution(model: Any, prompt: list[int], **how: Any) -> dict[tuple[int, ...], float]:
    """The probability of every response that ends, or is cut at DEPTH tokens."""
    finished: dict[tuple[int, ...], float] = {}
    running: dict[tuple[int, ...], float] = {(): 1.0}
    for depth in range(1, DEPTH + 1):
        going_on: dict[tuple[int, ...], float] = {}
        for (response, probability), token in itertools.product(running.items(), range(WORDS + 1)):
            share = next_token_probabilities(model, prompt + list(response), **how)[token]
            target = finished if token == END or depth == DEPTH else going_on
            target[(*response, token)] = probability * share
        running = going_on
    return finished

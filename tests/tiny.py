"""Tiny models, a byte tokenizer and a small dataset: all that the tests need of the outside world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 260
END_OF_TEXT, IM_START, IM_END = 256, 257, 258

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCABULARY}
_LLAMA_LIKE = {
    **_SIZES,
    "intermediate_size": 32,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": IM_END,
    "pad_token_id": END_OF_TEXT,
}
_GPT_LIKE = {"vocab_size": VOCABULARY, "bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neo": (
        "GPTNeo",
        {
            **_GPT_LIKE,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "intermediate_size": 32,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 32,
            "max_position_embeddings": 128,
            "attention_dropout": 0.0,
        },
    ),
    "gpt2": ("GPT2", {**_GPT_LIKE, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}),
    "gpt_neox": ("GPTNeoX", {**_GPT_LIKE, **_SIZES, "intermediate_size": 32, "max_position_embeddings": 128}),
    "opt": (
        "OPT",
        {
            **_GPT_LIKE,
            **_SIZES,
            "ffn_dim": 32,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 128,
            "pad_token_id": 1,
        },
    ),
    "llama": ("Llama", _LLAMA_LIKE),
    "qwen3": ("Qwen3", {**_LLAMA_LIKE, "head_dim": 8}),
    "gemma3": (
        "Gemma3",
        {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mamba": ("Mamba", {**_GPT_LIKE, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
}
"""Each family's class names and a configuration small enough to train in milliseconds."""


def build_model(family: str, seed: int = 0) -> Any:
    """A randomly initialised model of a family."""
    name, sizes = FAMILIES[family]
    if family == "gemma3":
        config = transformers.Gemma3TextConfig(**sizes)
    else:
        config = getattr(transformers, f"{name}Config")(**sizes)
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def build_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes: token id = byte value, then three special tokens."""
    alphabet = _byte_alphabet()
    vocabulary = {alphabet[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>" if chat_template else "<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = chat_template
    return fast


def save_model(directory: Path, family: str = "llama", chat_template: str | None = CHATML, seed: int = 0) -> Path:
    """A model and its tokenizer, on the disk as from_pretrained wants them."""
    build_model(family, seed).save_pretrained(directory)
    build_tokenizer(chat_template).save_pretrained(directory)
    return directory


def write_dataset(path: Path, rows: int = 12) -> Path:
    """Prompts and responses of uneven length."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            file.write(
                json.dumps({"prompt": f"say {'a' * (i % 5 + 1)}", "response": f"{'ab' * (i % 4 + 1)} {i}"}) + "\n"
            )
    return path


def _byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in GPT-2's byte-level tokenizers."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    unprintable = [byte for byte in range(256) if byte not in alphabet]
    return alphabet | {byte: chr(256 + place) for place, byte in enumerate(unprintable)}

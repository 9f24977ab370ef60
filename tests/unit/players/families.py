"""Tiny models that have an opinion: freshly initialised ones give every token nearly the same probability."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

import tiny
from spinlm.players.models import switch_off_dropout

_LLAMA_LIKE = tiny.FAMILIES["llama"][1]
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}

RELATIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": (
        "Gemma2",
        {
            **_LLAMA_LIKE,
            "head_dim": 8,
            "sliding_window": 16,
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 1.5,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "granite": ("Granite", {**_LLAMA_LIKE, "logits_scaling": 3.0, "attention_multiplier": 0.5}),
    "cohere": ("Cohere", {**_LLAMA_LIKE, "logit_scale": 0.25}),
    "mixtral": ("Mixtral", {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", {**_LLAMA_LIKE, **_EXPERTS, "num_experts": 4, "decoder_sparse_step": 1}),
    "bloom": ("Bloom", {"vocab_size": tiny.VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "lfm2": ("Lfm2", {**_LLAMA_LIKE, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "recurrent_gemma": (
        "RecurrentGemma",
        {
            **_LLAMA_LIKE,
            "head_dim": 8,
            "num_hidden_layers": 3,
            "block_types": ["recurrent", "recurrent", "attention"],
            "attention_window_size": 16,
            "lru_width": 16,
            "logits_soft_cap": 2.5,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            **_LLAMA_LIKE,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}
"""What tests/tiny.py hasn't: soft caps and scales, experts, ALiBi, convolutions and recurrence beside attention."""


def build_model(family: str, seed: int = 0, **settings: Any) -> Any:
    """A tiny model of a family, its weight matrices scaled up; a relative's with other settings."""
    if family in tiny.FAMILIES:
        return sharpened(tiny.build_model(family, seed), 4 if family == "mamba" else 15)
    name, sizes = RELATIVES[family]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{name}Config")(**{**sizes, **settings})
    )
    return sharpened(model.eval(), 8)


def sharpened(model: Any, factor: float) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(factor)
    return model


def adapted(model: Any, seed: int = 1, **settings: Any) -> Any:
    """With an adapter of random weights on every linear layer, without any dropout."""
    mamba = model.config.model_type == "mamba"
    modules = ["in_proj", "x_proj"] if mamba else "all-linear"
    settings = {"r": 2, "lora_alpha": 4, "target_modules": modules, "task_type": "CAUSAL_LM", **settings}
    switch_off_dropout(model)
    model = get_peft_model(model, LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_((0.05 if mamba else 0.1) * torch.randn(parameter.shape, generator=generator))
    return model

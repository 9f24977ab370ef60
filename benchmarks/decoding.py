"""Generated tokens a second, side by side: ours, transformers' `generate`, `generate_batch`, and a forward pass.

    python benchmarks/decoding.py MODEL [--prompts 256] [--only ours-64,forward]

The model has a LoRA adapter (r = 16, all linear layers); responses are sampled, of uneven length, to 128 tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from spinlm.config import PromptSection
from spinlm.data.render import Renderer
from spinlm.generation.engine import Request, Sampling, request_seed
from spinlm.generation.transformers_engine import TransformersEngine
from spinlm.players.models import find_device

CAP = 128
QUESTIONS = (
    "What is {} plus {}? Answer with the number only.",
    "Write a short story about {} cats and {} dogs in a garden.",
    "Tom has {} apples and buys {} more at the market. How many has he now? Think step by step.",
    "Name a city that has more than {} bridges and fewer than {} theatres, and say in one sentence why you like it.",
)

Decoded = list[tuple[list[int], list[int]]]
"""Prompts and responses."""


def load(name: str) -> tuple[Any, Renderer]:
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for place, parameter in model.named_parameters():
        if "lora_B" in place:
            torch.nn.init.normal_(parameter, std=1e-3)
    return model.to(find_device("auto")).eval(), Renderer(tokenizer, PromptSection(), [tokenizer.eos_token_id])


def ask(renderer: Renderer, count: int) -> list[list[int]]:
    texts = [QUESTIONS[i % len(QUESTIONS)].format(3 + i, 7 * i % 50 + 2) for i in range(count)]
    return [renderer.prompt_ids([{"role": "user", "content": text}]) for text in texts]


def with_engine(model: Any, renderer: Renderer, prompts: Sequence[list[int]], rows: int | None) -> Decoded:
    requests = [Request(prompt, request_seed("bench", i)) for i, prompt in enumerate(prompts)]
    responses = TransformersEngine(model, renderer, rows).generate(requests, Sampling(CAP))
    return [(prompt, response.token_ids) for prompt, response in zip(prompts, responses, strict=True)]


def with_generate(model: Any, renderer: Renderer, prompts: Sequence[list[int]], rows: int) -> Decoded:
    decoded: Decoded = []
    how = {"max_new_tokens": CAP, "do_sample": True, "top_k": 0, "pad_token_id": renderer.pad_id}
    for start in range(0, len(prompts), rows):
        batch = prompts[start : start + rows]
        padded = renderer.tokenizer.pad({"input_ids": batch}, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(**padded, generation_config=GenerationConfig(eos_token_id=stops(renderer), **how))
        for prompt, row in zip(batch, output[:, padded.input_ids.shape[1] :].tolist(), strict=True):
            length = next((place + 1 for place, token in enumerate(row) if token in renderer.stop_ids), len(row))
            decoded.append((prompt, row[:length]))
    return decoded


def with_generate_batch(model: Any, renderer: Renderer, prompts: Sequence[list[int]]) -> Decoded:
    how = GenerationConfig(
        max_new_tokens=CAP, do_sample=True, top_k=0, eos_token_id=stops(renderer)[0], pad_token_id=renderer.pad_id
    )
    blocks = ContinuousBatchingConfig(num_blocks=2 * len(prompts), max_batch_tokens=256)  # else it takes all memory
    outputs = model.get_base_model().generate_batch(
        list(prompts), generation_config=how, continuous_batching_config=blocks
    )
    by_prompt = {tuple(output.prompt_ids): list(output.generated_tokens) for output in outputs.values()}
    return [(prompt, by_prompt[tuple(prompt)]) for prompt in prompts]


def forward(model: Any, decoded: Decoded, rows: int = 16) -> None:
    """The same tokens, in batches of like length."""
    texts = sorted((prompt + response for prompt, response in decoded), key=len)
    for start in range(0, len(texts), rows):
        batch = texts[start : start + rows]
        width = max(map(len, batch))
        input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in batch], device=model.device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in batch], device=model.device)
        model(input_ids=input_ids, attention_mask=mask, use_cache=False)


def stops(renderer: Renderer) -> list[int]:
    return sorted(renderer.stop_ids)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=256, help="for ours; the others get two batches")
    parser.add_argument("--only", default="", help="some of the rows, with commas between")
    arguments = parser.parse_args()
    model, renderer = load(arguments.model)
    prompts = ask(renderer, arguments.prompts)
    contenders: dict[str, Callable[[], Decoded]] = {
        "generate-16": lambda: with_generate(model, renderer, prompts[: 2 * 16], 16),
        "generate-64": lambda: with_generate(model, renderer, prompts[: 2 * 64], 64),
        "generate_batch": lambda: with_generate_batch(model, renderer, prompts[:16]),
        "ours-64": lambda: with_engine(model, renderer, prompts, 64),
        "ours-auto": lambda: with_engine(model, renderer, prompts, None),
    }
    only: list[str] = arguments.only.split(",") if arguments.only else [*contenders, "forward"]
    print(f"{torch.get_num_threads()} threads, {model.device}")
    print(f"{'':16}{'responses':>10}{'tokens':>8}{'seconds':>9}{'tok/s':>8}{'CPU s':>9}{'tok/CPU s':>11}")
    decoded: Decoded = []
    with_engine(model, renderer, prompts[:4], 4)  # warm up
    for name in only:
        start, cpu = time.perf_counter(), time.process_time()
        if name == "forward":
            decoded = decoded[:128]
            forward(model, decoded)
            tokens = sum(len(prompt) + len(response) for prompt, response in decoded)
        else:
            decoded = contenders[name]()
            tokens = sum(len(response) for _, response in decoded)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        rates = f"{seconds:9.1f}{tokens / seconds:8.1f}{cpu:9.1f}{tokens / cpu:11.1f}"
        print(f"{name:16}{len(decoded):10}{tokens:8}{rates}", flush=True)


if __name__ == "__main__":
    main()

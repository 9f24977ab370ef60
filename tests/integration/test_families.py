"""One iteration of self-play with a model of each family."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

import spinlm
import tiny
from integration.command import RECIPE, ROWS, rows
from spinlm.config import recipe_from

BASE_STYLE = {"gpt_neo"}
"""Those whose tokenizer is given no chat template here, so that the paper's prompt is used."""


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_plays_an_iteration(family: str, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / family, family, chat_template=None if family in BASE_STYLE else tiny.CHATML)
    data = tiny.write_dataset(tmp_path / "data.jsonl", rows=ROWS)
    changes = {
        "run_dir": str(tmp_path / "run"),
        "iterations": 1,
        "sft": None,
        "model": {"name": str(model)},
        "data": {**RECIPE["data"], "source": str(data)},
    }
    run = spinlm.run(recipe_from({**RECIPE, **changes}, where=family))

    start = rows(run.path / "iterations/0/training.jsonl")[0]
    assert start["start_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert start["start_margin"] < 1e-4
    adapter = load_file(run.latest / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    moved = [tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name]
    assert moved
    assert all(moved)  # every adapted module is in the graph of the loss
    assert {"real_nll", "discriminability", "truncation_rate"} <= run.measures["iteration-0"].keys()
    assert run.measures["iteration-0"]["real_nll"]["value"] != run.measures["base"]["real_nll"]["value"]

    example = rows(run.path / "data/train.jsonl")[0]
    prompt = AutoTokenizer.from_pretrained(model).decode(example["prompt_ids"])
    if family in BASE_STYLE:
        assert prompt == f"### Instruction: {example['prompt']}\n\n### Response: "
    else:
        assert prompt == f"<|im_start|>user\n{example['prompt']}<|im_end|>\n<|im_start|>assistant\n"

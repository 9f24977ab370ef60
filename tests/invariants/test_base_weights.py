"""With an adapter the base weights are never copied, written or merged: they stay what they were, bit by bit."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from integration.command import RECIPE
from spinlm import selfplay
from spinlm.api import opened
from spinlm.config import recipe_from
from spinlm.files import file_hashes


def test_the_models_files_are_untouched(finished: Path, finished_full: Path, tiny_llama: Path) -> None:
    before = file_hashes(tiny_llama)
    assert file_hashes(finished / "model") == before
    assert file_hashes(finished_full / "model") == before


def test_the_base_in_memory_is_untouched(place: Path) -> None:
    names = {"model": {"name": str(place / "model")}, "data": {**RECIPE["data"], "source": str(place / "data.jsonl")}}
    recipe = recipe_from({**RECIPE, **names, "run_dir": str(place / "run"), "iterations": 1}, where="test")
    with opened(recipe) as stages:
        selfplay.play(stages)
        base = stages.players.opponent(stages.base).state_dict()
    on_disk = AutoModelForCausalLM.from_pretrained(place / "model").state_dict()
    assert base.keys() == on_disk.keys()
    assert all(torch.equal(base[name], on_disk[name]) for name in on_disk)

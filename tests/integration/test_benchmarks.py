"""The real benchmark command on a tiny model in place of SmolLM2: every measure but vLLM's, from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny

pytest.importorskip("trl")

ROOT = Path(__file__).parents[2]
SIZES = ("peak_size=128", "short_pairs=4", "growth_pairs=4", "optimiser_batch=4", "prompts=8", "iteration_pairs=4")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory whose cache holds a tiny Llama with a vocabulary that the pairs fit into."""
    model = tmp_path / ".cache/benchmarks/smollm2"
    sizes = tiny.FAMILIES["llama"][1] | {"vocab_size": 49_152, "max_position_embeddings": 2048}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(model)
    tiny.build_tokenizer().save_pretrained(model)
    return tmp_path


def _bench(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=place,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_quick_measures_everything_and_both_sides_compute_the_same(place: Path) -> None:
    sizes = [argument for size in SIZES for argument in ("--size", size)]
    done = _bench(place, "--quick", *sizes)
    assert done.returncode == 0, done.stderr
    measures: dict[str, Any] = json.loads((place / "benchmarks/results/quick.json").read_text())["measures"]
    assert measures.pop("generation-vllm")["failed"].startswith("skipped: there is no .venv-vllm")
    for name, measure in measures.items():
        assert measure["finished"] and measure["figures"], name
        assert all(check["same"] for check in measure.get("checks", [])), name
    losses = [note for note in measures["train-short"]["notes"] if note.startswith("losses")]
    assert "spinlm 0.6931" in losses[0] and "TRL 0.6931" in losses[0]

    again = _bench(place, "--quick", *sizes, "--resume", "--only", "train-short,iteration")
    assert again.returncode == 0 and again.stdout.count("already") == 2


def test_a_wrong_name_is_refused(place: Path) -> None:
    for arguments in (["--only", "speed"], ["--size", "pears=3"], ["--show", "none.json"]):
        done = _bench(place, *arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert arguments[1].partition("=")[0] in done.stderr

"""Memory that runs out, for real: the command under a limit on its address space."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny
from integration.command import (
    Outcome,
    contents,
    flip_a_byte,
    forget,
    refused,
    rows,
    spinlm,
    spinlm_process,
    succeeded,
    write_recipe,
)
from spinlm.files import sealed, write_json

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps RLIMIT_AS")

LIMITED = Path(__file__).with_name("short_of_memory.py")


def _limited(megabytes: int, *arguments: str, cwd: Path) -> Outcome:
    return spinlm_process(str(megabytes), *arguments, cwd=cwd, launcher=(str(LIMITED),))


@pytest.fixture(scope="module")
def roomy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two kilobytes of keys and values a token; it ends a response after about four."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 131072,
    }
    torch.manual_seed(0)
    _, llama = tiny.FAMILIES["llama"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**llama, **sizes}))
    model.generation_config.eos_token_id = [*range(200, tiny.VOCABULARY)]
    directory = tmp_path_factory.mktemp("roomy")
    model.save_pretrained(directory)
    tiny.build_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def roomy(roomy_model: Path, tmp_path: Path) -> Path:
    data = [{"prompt": f"say {i}", "response": f"{'ab ' * 800}{i}"} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    changes = {
        "model": {"name": str(roomy_model)},
        "iterations": 1,
        "sft": None,
        "data": {"held_out": 0, "max_length": 3000},
        "generation": {"max_new_tokens": 120000, "shard_size": 6, "batch_size": 6},
        "training": {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1},
    }
    write_recipe(tmp_path / "recipe.yaml", changes)
    return tmp_path


def test_generation_goes_on_with_half_of_the_batch(roomy: Path) -> None:
    """Six responses ask for 1.5 GB, three for half of it; and what is interrupted goes on with the same three."""
    out = succeeded(_limited(1300, "generate", "recipe.yaml", cwd=roomy)).out
    run = roomy / "runs/recipe"
    size = json.loads((run / "batch_size/0.json").read_text())["batch_size"]
    assert size < 6
    assert out.count(f"memory has run out; from here on {size} responses are decoded together") == 1
    assert "iteration 0: generate 12/12 responses" in out
    shards = [run / f"iterations/0/synthetic/0000{number}.jsonl" for number in (0, 1)]
    made = [response for shard in shards for row in rows(shard) for response in row["responses"]]
    (timing,) = (row for row in rows(run / "timings.jsonl") if row["what"] == "iterations/0/synthetic")
    assert timing["tokens"] == sum(len(response["token_ids"]) for response in made), "counted once"

    small = ("generate", "recipe.yaml", f"generation.batch_size={size}", "run_dir=runs/small")
    succeeded(spinlm(*small, cwd=roomy))
    for shard in shards:
        assert shard.read_bytes() == (roomy / "runs/small" / shard.relative_to(run)).read_bytes()

    before = contents(run)
    forget(run, "iterations/0/synthetic/00001.jsonl")
    again = succeeded(spinlm("generate", "recipe.yaml", cwd=roomy)).out  # with all the memory there is
    assert "memory has run out" not in again
    assert contents(run) == before
    forget(run, "iterations/0/synthetic/00001.jsonl")
    flip_a_byte(run / "batch_size/0.json")
    refused(spinlm("generate", "recipe.yaml", cwd=roomy), "batch_size/0.json: not what was written; spinlm run with")


@pytest.mark.parametrize("said", [{"size": 2}, {"batch_size": [2]}, {"batch_size": 0}, None])
def test_a_note_of_another_shape_is_refused_and_repaired(place: Path, said: dict[str, Any] | None) -> None:
    settings = ("recipe.yaml", "sft=null", "iterations=1", "evaluation.greedy=false")
    note = place / "runs/recipe/batch_size/0.json"
    succeeded(spinlm("generate", *settings, cwd=place))
    forget(place / "runs/recipe", "iterations/0/synthetic/00001.jsonl")
    if said is None:
        note.mkdir(parents=True)
    else:
        write_json(note, sealed(said))
    refused(spinlm("generate", *settings, cwd=place), "batch_size/0.json: not what was written", "--repair")
    assert "so generation.batch_size holds again" in succeeded(spinlm("run", *settings, "--repair", cwd=place)).out
    assert not note.exists()


@pytest.mark.slow
def test_generation_that_has_no_room_for_one_response_says_what_to_lower(roomy: Path) -> None:
    message = refused(
        _limited(
            500, "generate", "recipe.yaml", "generation.max_new_tokens=130000", "generation.batch_size=1", cwd=roomy
        )
    )
    assert "generation, of one response at a time (generation.batch_size): memory has run out" in message
    assert "Lower generation.max_new_tokens or data.max_prompt_tokens" in message


@pytest.mark.slow
def test_training_names_what_to_lower_and_what_was_planned(roomy: Path) -> None:
    """A pass of 29,000 tokens needs more than a gigabyte, and passes of 2,600 go through."""
    arguments = ("run", "recipe.yaml", "generation.max_new_tokens=12")
    message = refused(
        _limited(900, *arguments, "tokens_per_pass=100000", cwd=roomy),
        "iteration 0: train: memory has run out (",
        "Nothing committed is lost. Lower tokens_per_pass (now 100000), or lower data.max_length (now 3000), or set "
        "training.gradient_checkpointing=true, or lower adapter.r (now 4); a run goes on with another recipe by --fork",
        "spinlm plan estimates for train, in each process, 1.30 GB: weights 791 kB, adapter 70 kB, gradients",
    )
    assert (roomy / "runs/recipe/iterations/0/opponent_logprobs/00001.jsonl").exists(), message
    goes_on = _limited(900, *arguments, "--fork", "runs/small", cwd=roomy)
    assert "iteration 0: train step 1/1" in succeeded(goes_on).out
    assert "iteration 0: generate" not in goes_on.out

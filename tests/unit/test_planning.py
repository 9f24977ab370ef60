"""Plans against what real training takes, and against sums worked by hand."""

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
from spinlm.config import Recipe, recipe_from
from spinlm.data.pairs import Group, Pair
from spinlm.data.render import Renderer
from spinlm.generation.continuous import LOGITS_COPIES, columns_needed, row_bytes
from spinlm.generation.packed_linear import packed_bytes
from spinlm.hardware import named_gpu
from spinlm.planning import Phase, Plan, StageCost, estimate, plan
from spinlm.players.layouts import tokens_per_pass
from spinlm.players.logprobs import Method, all_scores, logits_argument
from spinlm.players.models import Players
from spinlm.players.tally import Tally
from spinlm.sketch import Sketch, extent_of
from spinlm.training.spin_trainer import SPINConfig, SPINTrainer
from spinlm.workshop import prepare_data

SMALL = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
    "max_position_embeddings": 512,
    "eos_token_id": tiny.IM_END,
    "tie_word_embeddings": True,
}
TRAINING: dict[str, Any] = {"per_device_train_batch_size": 4, "learning_rate": 1e-3}


def _save(directory: Path, config: Any, weights: bool = True) -> Path:
    if weights:
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    else:
        config.save_pretrained(directory)
    tiny.build_tokenizer().save_pretrained(directory)
    return directory


def _dataset(path: Path, rows: int = 4, response: int = 60) -> Path:
    lines = [{"prompt": f"{i} " + "p" * 30, "response": "r" * (response + i)} for i in range(rows)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def _recipe(model: Path, data: Path, /, **changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "run_dir": "unused",
        "iterations": 1,
        "model": {"name": str(model)},
        "data": {"source": str(data), "held_out": 0, "max_prompt_tokens": 200, "max_length": 400},
        "adapter": {"r": 8},
        "generation": {"max_new_tokens": 200},
        "training": TRAINING,
    }
    for key, value in changes.items():
        old = tree.get(key)
        tree[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return recipe_from(tree, where="here")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("small"), transformers.LlamaConfig(**SMALL))


def _phase(planned: Plan, name: str) -> dict[str, int]:
    return next(phase.parts for phase in planned.phases if phase.name == name)


def _stage(planned: Plan, name: str) -> StageCost:
    return next(stage for stage in planned.stages if stage.name == name)


def _pairs(recipe: Recipe, players: Players) -> list[Pair]:
    """What the plan takes the opponent's responses for: as long as the real ones."""
    split = prepare_data(recipe, players, Renderer(players.tokenizer, recipe.prompt, players.stop_ids()))
    return [Pair(e.prompt_ids, e.real_ids, [1] * len(e.real_ids), float("nan"), float("nan")) for e in split.train]


def _real_step(recipe: Recipe, directory: Path) -> int:
    """Bytes at the fullest moment of two real optimiser steps, without the weights."""
    section, players = recipe.training, Players(recipe.model, recipe.adapter)
    model = players.main_player(players.base_player(), seed=0)
    settings = section.arguments() | {"learning_rate": 1e-3, "num_train_epochs": 2, "save_strategy": "no"}
    args = SPINConfig(
        str(directory), use_cpu=True, disable_tqdm=True, tokens_per_pass=recipe.tokens_per_pass, **settings
    )
    method = None if recipe.layout == "auto" else Method(recipe.layout)
    trainer = SPINTrainer(model, args, _pairs(recipe, players), method=method)
    with Tally([*model.parameters(), *model.buffers()]) as tally:
        trainer.train()
    return tally.peak


def test_a_tally_counts_what_is_there_and_the_products() -> None:
    weight = torch.zeros(8, 4)
    with Tally([weight]) as tally:
        x = torch.zeros(2, 8)
        y = x @ weight
        view = y[0]
        assert tally.live == 2 * 8 * 4 + 2 * 4 * 4
        del x
        assert tally.live == 2 * 4 * 4
        del y
        assert tally.live == 2 * 4 * 4  # the view keeps it
        del view
        assert tally.live == 0
    assert tally.peak == 2 * 8 * 4 + 2 * 4 * 4
    assert tally.work == 2 * (2 * 8 * 4)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="adapter"),
        pytest.param({"adapter": None}, id="full", marks=pytest.mark.slow),
        pytest.param({"adapter": None, "training": {"optim": "rmsprop"}}, id="rmsprop", marks=pytest.mark.slow),
        pytest.param({"tokens_per_pass": 200}, id="several-passes", marks=pytest.mark.slow),
        pytest.param({"adapter": None, "tokens_per_pass": 200}, id="full-several-passes", marks=pytest.mark.slow),
        pytest.param({"training": {"gradient_checkpointing": True}}, id="checkpointed"),
        pytest.param({"adapter": None, "training": {"bf16": True}}, id="full-bf16", marks=pytest.mark.slow),
        pytest.param({"training": {"bf16": True}}, id="adapter-bf16", marks=pytest.mark.slow),
        pytest.param({"layout": "packed"}, id="packed", marks=pytest.mark.slow),
        pytest.param({"layout": "plain"}, id="plain", marks=pytest.mark.slow),
    ],
)
def test_training_memory_is_what_a_real_step_takes(changes: dict[str, Any], small: Path, tmp_path: Path) -> None:
    recipe = _recipe(small, _dataset(tmp_path / "data.jsonl"), **changes)
    parts = _phase(plan(recipe), "train")
    planned = sum(size for part, size in parts.items() if part not in ("weights", "adapter"))
    assert planned == pytest.approx(_real_step(recipe, tmp_path / "out"), rel=0.15)


def test_a_phase_in_words() -> None:
    phase = Phase("train", {"weights": 2_000_000_000, "gradients": 0, "adapter": 500_000_000})
    assert phase.words() == "2.50 GB: weights 2.00 GB, adapter 500.00 MB"


@pytest.mark.slow
def test_one_phase_is_estimated_in_a_sentence(small: Path, tmp_path: Path) -> None:
    recipe = _recipe(small, _dataset(tmp_path / "data.jsonl"))
    players = Players(recipe.model, recipe.adapter)
    split = prepare_data(recipe, players, Renderer(players.tokenizer, recipe.prompt, players.stop_ids()))
    planned = {phase.name: phase for phase in plan(recipe).phases}
    for phase in (planned["train"], planned["generate"]):
        said = estimate(recipe, phase.name, split, processes=1)
        assert said.startswith(
            f"spinlm plan estimates for {phase.name}, in each process, {phase.words()}; the machine has "
        )
    assert "activations and temporaries" in said and "keys and values" in said


def test_scoring_memory_is_what_a_real_pass_takes(small: Path, tmp_path: Path) -> None:
    recipe = _recipe(small, _dataset(tmp_path / "data.jsonl"))
    players = Players(recipe.model, recipe.adapter)
    groups = [Group(pair.prompt_ids, [pair.real_ids, pair.synthetic_ids]) for pair in _pairs(recipe, players)]
    model = players.opponent(players.base_player())
    with Tally([*model.parameters(), *model.buffers()]) as tally:
        all_scores(
            model,
            groups,
            Method("shared"),
            tokens_per_pass(recipe.tokens_per_pass, on_gpu=False, training=False),
            pad_id=0,
        )
    parts = _phase(plan(recipe), "score")
    assert parts["activations and temporaries"] == pytest.approx(tally.peak, rel=0.15)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neo", pytest.param("mamba", marks=pytest.mark.slow)])
def test_generation_memory_is_what_the_engine_takes(family: str, tmp_path: Path) -> None:
    """Eleven prompts of some 50 tokens: more in all than the models take, and longer than Gemma's window."""
    recipe = _recipe(
        tiny.save_model(tmp_path / "model", family),
        _dataset(tmp_path / "data.jsonl", rows=11, response=20),
        data={"max_prompt_tokens": 90, "max_length": 128},
        adapter=None,
        generation={"max_new_tokens": 30, "batch_size": 9},
    )
    planned, players = plan(recipe), Players(recipe.model, recipe.adapter)
    parts, model = _phase(planned, "generate"), players.opponent(players.base_player())
    longest = max(len(pair.prompt_ids) for pair in _pairs(recipe, players))
    logits = LOGITS_COPIES * 4 * tiny.VOCABULARY
    if family == "mamba":
        assert parts["packed copies"] == parts["keys and values"] == 0
    else:
        assert parts["packed copies"] == packed_bytes(model, planned.machine.memory) > 0
        a_row = row_bytes(model, columns_needed(longest, 30)) - logits
        assert parts["keys and values"] == 16 * a_row, "9 rows are filled up to 16"
    with torch.no_grad(), Tally([*model.parameters(), *model.buffers()]) as tally:
        output = model(torch.zeros(11, longest, dtype=torch.long), use_cache=True, **logits_argument(model, 1))
        layers = getattr(output.get("past_key_values"), "layers", [])
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    expected = max(tally.peak - kept, 16 * logits)
    assert parts["activations and temporaries"] == pytest.approx(expected, rel=0.15)


GPT_NEO_2_7B = transformers.GPTNeoConfig(
    hidden_size=2560, num_layers=32, attention_types=[[["global", "local"], 16]], num_heads=20
)


@pytest.fixture(scope="module")
def planned_2_7b(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """In float32, from a configuration without weights; 4 pairs of prompt 57 or so and responses of about 180."""
    directory = tmp_path_factory.mktemp("2.7b")
    model = _save(directory / "model", GPT_NEO_2_7B, weights=False)
    recipe = _recipe(
        model, _dataset(directory / "data.jsonl", response=180), model={"dtype": "float32"}, adapter={"r": 16}
    )
    return plan(recipe, gpu="A100-80")


@pytest.mark.slow
def test_the_parts_of_2_7b(planned_2_7b: Plan) -> None:
    parts = _phase(planned_2_7b, "train")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(GPT_NEO_2_7B)
    assert parts["weights"] == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    h, layers, r = 2560, 32, 16
    adapter = layers * r * (4 * (h + h) + 2 * (h + 4 * h)) * 4
    assert parts["adapter"] == parts["gradients"] == adapter
    assert parts["optimiser state"] == pytest.approx(2 * adapter, rel=0.001)
    # Of each layer, in vectors of the hidden size for each token: the inputs and outputs of the two norms, 4; queries,
    # keys and values, 3; attention's output by segment and joined, 2; the activation function's input, half of it,
    # tanh, one more than tanh, and its output, each four times as wide, 20. Keys and values are there again for each
    # response with its prompt.
    prompt = len("*user\n0 " + 30 * "p" + "*\n*assistant\n")  # a token a byte, and one for each special one
    response = 182.5  # in the mean, with its end
    tokens, again = 4 * (prompt + 2 * response), 4 * 2 * (prompt + response)
    by_hand = layers * (29 * tokens + 2 * again) * h * 4
    assert parts["activations and temporaries"] == pytest.approx(by_hand, rel=0.15)


def test_work_by_hand(tmp_path: Path) -> None:
    """Of full fine-tuning of the tiny Llama: 2 layers of size 16 with 2 heads and 1 of keys, 32 within, 260 tokens."""
    model = tiny.save_model(tmp_path / "model", "llama")
    recipe = _recipe(model, tmp_path / "unused", adapter=None)
    sketch = Sketch(recipe, Players(recipe.model, None), "", load_in_4bit=False, is_gpu=False)
    linear = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32)  # weights of q, o; k, v; gate, up, down
    forward, backward = sketch.work(), sketch.work(recipe.training)
    assert forward.token == pytest.approx(2 * linear)
    assert forward.response == pytest.approx(2 * 16 * 260)
    assert forward.couple == pytest.approx(2 * (2 * 2 * 16))  # layers, with scores and sums over 2 heads of 8
    assert backward.token == pytest.approx(3 * forward.token)
    assert backward.response == pytest.approx(4 * forward.response)  # the logits of a chunk are made again
    assert backward.couple == pytest.approx(3.5 * forward.couple)  # and so are the scores


def test_the_extent_of_a_pass() -> None:
    groups = [Group([1, 2, 3], [[4, 5], [6]])]
    shared, packed, plain = (extent_of(groups, layout) for layout in ("shared", "packed", "plain"))
    assert (shared.tokens, shared.responses, shared.couples) == (4, 3, 3 * 3 + 1 * 4)
    assert (packed.tokens, packed.responses, packed.couples) == (7, 3, 2 * 3 * 3 + 1 * 4)
    assert (plain.tokens, plain.responses, plain.couples) == (8, 3, 2 * 4 * 4)


@pytest.mark.slow
def test_twice_the_pairs_are_twice_the_work_and_time(small: Path, tmp_path: Path) -> None:
    once, twice = (
        plan(_recipe(small, _dataset(tmp_path / f"{rows}.jsonl", rows=rows, response=60)), gpu="H100")
        for rows in (8, 16)
    )
    for name in ("iteration 0: score", "iteration 0: train"):
        assert _stage(once, name).seconds > 0
        assert _stage(twice, name).work == pytest.approx(2 * _stage(once, name).work, rel=0.15)
        assert _stage(twice, name).seconds == pytest.approx(2 * _stage(once, name).seconds, rel=0.15)
    assert _stage(twice, "iteration 0: generate").seconds > _stage(once, "iteration 0: generate").seconds


@pytest.mark.slow
def test_processes_share_the_work(small: Path, tmp_path: Path) -> None:
    recipe = _recipe(small, _dataset(tmp_path / "data.jsonl", rows=16))
    one, four = plan(recipe, gpu="L4"), plan(recipe, gpu="L4", processes=4)
    assert _stage(four, "iteration 0: train").work == pytest.approx(_stage(one, "iteration 0: train").work)
    assert _stage(four, "iteration 0: train").seconds == pytest.approx(_stage(one, "iteration 0: train").seconds / 4)


@pytest.mark.slow
def test_4_bit_weights_by_arithmetic(small: Path, tmp_path: Path) -> None:
    data = _dataset(tmp_path / "data.jsonl")
    whole = plan(_recipe(small, data), gpu="H100")
    quantised = plan(_recipe(small, data, model={"load_in_4bit": True}), gpu="H100")
    linear = 4 * (2 * 96 * 96 + 2 * 96 * 48 + 3 * 96 * 256)
    saved = _phase(whole, "train")["weights"] - _phase(quantised, "train")["weights"]
    assert saved == pytest.approx(linear * (2 - 0.5625), abs=1)


@pytest.mark.slow
def test_what_does_not_fit_is_said(planned_2_7b: Plan, tmp_path: Path) -> None:
    assert not planned_2_7b.warnings
    model = _save(tmp_path / "model", GPT_NEO_2_7B, weights=False)
    data = _dataset(tmp_path / "data.jsonl", rows=8, response=180)
    too_much = plan(_recipe(model, data, adapter=None, model={"dtype": "float32"}), gpu="L4")
    assert any("train needs" in line and "gradient_checkpointing" in line for line in too_much.warnings)


def test_tensor_cores_take_what_they_take() -> None:
    assert named_gpu("a100 80", torch.bfloat16).peak == 312e12
    assert named_gpu("A100-80", torch.float32).peak == 19.5e12
    assert named_gpu("T4", torch.float16).peak == 65e12
    assert named_gpu("T4", torch.bfloat16).peak == 8.1e12


MEASURE = """
import gc, json, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, LlamaConfig
from spinlm.config import recipe_from
from spinlm.data.pairs import Pair
from spinlm.data.render import Renderer
from spinlm.players.models import Players
from spinlm.workshop import prepare_data
from spinlm.training.spin_trainer import SPINConfig, SPINTrainer

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

recipe = recipe_from(json.loads(sys.argv[1]), "here")
players = Players(recipe.model, recipe.adapter)
split = prepare_data(recipe, players, Renderer(players.tokenizer, recipe.prompt, players.stop_ids()))
pairs = [Pair(e.prompt_ids, e.real_ids, [1] * len(e.real_ids), float("nan"), float("nan")) for e in split.train]
settings = recipe.training.arguments() | {"learning_rate": 1e-3, "num_train_epochs": 2, "save_strategy": "no"}
args = SPINConfig(sys.argv[2], use_cpu=True, tokens_per_pass=recipe.tokens_per_pass, **settings)
one_layer = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=1, vocab_size=2000)
SPINTrainer(AutoModelForCausalLM.from_config(one_layer), args, pairs).train()  # the program itself is there now
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
model = players.main_player(players.base_player(), seed=0)
SPINTrainer(model, args, pairs).train()
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_135m_takes_what_was_planned(checkpointing: bool, tmp_path: Path) -> None:
    """A process's resident memory at its most, above what it was before the weights were there,
    after a small model was trained in it.

    The allocator is told to give memory back: left to itself, glibc keeps more than half as much again, each time
    another amount.
    """
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        eos_token_id=tiny.IM_END,
    )
    recipe = _recipe(
        _save(tmp_path / "model", config),
        _dataset(tmp_path / "data.jsonl", rows=2, response=180),
        adapter={"r": 16},
        training=TRAINING | {"gradient_checkpointing": checkpointing},
    )
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    arguments = [json.dumps(recipe.model_dump(mode="json")), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    planned = next(phase for phase in plan(recipe).phases if phase.name == "train").total
    assert planned == pytest.approx(int(done.stdout.splitlines()[-1]), rel=0.15)

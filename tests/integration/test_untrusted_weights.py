"""Models, adapters and checkpoints from somebody else: no pickle is opened, no code runs that wasn't asked for."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from integration import command
from integration.command import after, killed_at, refused, spinlm, spinlm_process, succeeded
from spinlm.files import digest, file_hashes, read_json, sealed, unsealed, write_json
from spinlm.training.checkpoints import mark

RUN = ("run", "recipe.yaml")


class Evil:
    """Whoever unpickles it makes a file."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self._place), "w")


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    """Is there where something evil has been done."""
    return tmp_path / "owned"


def _put_evil(path: Path, owned: Path) -> None:
    torch.save({"w": torch.zeros(1), "evil": Evil(owned)}, path)


def test_the_evil_is_evil(tmp_path: Path, owned: Path) -> None:
    _put_evil(tmp_path / "x.bin", owned)
    torch.load(tmp_path / "x.bin", weights_only=False)["evil"].close()
    assert owned.exists()


def _only_pickle(model: Path, owned: Path) -> str:
    (model / "model.safetensors").unlink()
    _put_evil(model / "pytorch_model.bin", owned)
    return "pytorch_model.bin"


def _sharded_pickle(model: Path, owned: Path) -> str:
    (model / "model.safetensors").unlink()
    _put_evil(model / "shard.bin", owned)
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "shard.bin"}}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return "pytorch_model.bin.index.json"


def _other_name(model: Path, owned: Path) -> str:
    (model / "model.safetensors").unlink()
    _put_evil(model / "consolidated.00.pth", owned)
    return "consolidated.00.pth"


def _index_of_pickles(model: Path, owned: Path) -> str:
    (model / "model.safetensors").unlink()
    _put_evil(model / "shard.bin", owned)
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "shard.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return "'shard.bin', which isn't safetensors"


def _index_of_something_elsewhere(model: Path, owned: Path) -> str:
    (model / "model.safetensors").rename(model.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "../elsewhere.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return "'../elsewhere.safetensors', which isn't safetensors"


def _named_in_the_configuration(model: Path, owned: Path) -> str:
    _put_evil(model / "adapter_model.bin", owned)
    config = read_json(model / "config.json")
    (model / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    return "'adapter_model.bin', which isn't safetensors"


def _adapter_beside_it(model: Path, owned: Path) -> str:
    _put_evil(model / "adapter_model.bin", owned)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(model), "target_modules": ["q_proj"], "r": 4}
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    return "adapter_model.bin"


PICKLES = [
    _only_pickle,
    _sharded_pickle,
    _other_name,
    _index_of_pickles,
    _index_of_something_elsewhere,
    _named_in_the_configuration,
    _adapter_beside_it,
]


@pytest.mark.parametrize("make", PICKLES)
def test_a_model_in_a_pickle_is_refused(place: Path, owned: Path, make: Callable[[Path, Path], str]) -> None:
    words = make(place / "model", owned)
    for arguments in (RUN, (*RUN, "adapter=null"), ("plan", "recipe.yaml")):
        refused(spinlm(*arguments, cwd=place), "model.name: ./model", words)
    assert not owned.exists()


def test_pickles_beside_the_weights_are_left_alone(place: Path, owned: Path) -> None:
    names = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl", "spiece.model", "vocab.bin")
    for name in names:
        _put_evil(place / "model" / name, owned)
    succeeded(spinlm("generate", "recipe.yaml", "sft=null", cwd=place))
    assert not owned.exists()


def test_the_way_to_convert_it_works(place: Path, tiny_llama: Path) -> None:
    weights = tiny.build_model("llama").state_dict()
    (place / "model/model.safetensors").unlink()
    torch.save(weights, place / "model/pytorch_model.bin")
    line = refused(spinlm(*RUN, cwd=place), "model.name=model-safetensors").splitlines()[-1]
    words = shlex.split(line)
    assert words[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *words[1:]], cwd=place, check=True, capture_output=True)
    assert (place / "model-safetensors/model.safetensors").is_file()
    assert not list((place / "model-safetensors").glob("*.bin"))
    succeeded(spinlm("generate", "recipe.yaml", "sft=null", "model.name=model-safetensors", cwd=place))


def _forge(run: Path, key: str) -> None:
    """Make an artifact's record fit what is there now."""
    path = run / "commits" / (key.replace("/", "--") + ".json")
    record = unsealed(read_json(path))
    record["files"] = file_hashes(run / key)
    record["hash"] = digest(record["files"])
    write_json(path, sealed(record))


def test_an_adapter_in_a_pickle(copied: Path, owned: Path) -> None:
    run = copied / "runs/recipe"
    for number in (0, 1):
        adapter = run / f"iterations/{number}/adapter"
        (adapter / "adapter_model.safetensors").unlink()
        _put_evil(adapter / "adapter_model.bin", owned)
        _forge(run, f"iterations/{number}/adapter")
    refused(spinlm("export", "runs/recipe", "out", "--merge", cwd=copied), "has no adapter_model.safetensors")
    assert not owned.exists()


def test_what_an_adapters_file_says_of_it_isnt_read(copied: Path) -> None:
    """It could name modules of Python to import."""
    run = copied / "runs/recipe"
    succeeded(spinlm("export", "runs/recipe", "before", "--merge", "--iteration", "1", cwd=copied))
    config = read_json(run / "iterations/1/adapter/adapter_config.json")
    (copied / "evil.py").write_text("raise SystemExit('ran')")
    config |= {"megatron_config": {"a": 1}, "megatron_core": "evil", "peft_type": "XLORA"}
    write_json(run / "iterations/1/adapter/adapter_config.json", config)
    _forge(run, "iterations/1/adapter")
    outcome = spinlm_process("export", "runs/recipe", "after", "--merge", "--iteration", "1", cwd=copied)
    assert "ran" not in succeeded(outcome).err
    one, other = (copied / name / "model.safetensors" for name in ("before", "after"))
    assert one.read_bytes() == other.read_bytes()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A run that was killed in its SFT stage, after a checkpoint."""
    directory = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(tiny_llama, directory / "model")
    tiny.write_dataset(directory / "data.jsonl", rows=command.ROWS)
    command.write_recipe(directory / "recipe.yaml")
    killed_at(after(command.CHECKPOINTED, "checkpoint-1.json"), arguments=RUN, cwd=directory)
    return directory


@pytest.mark.parametrize(
    ("name", "is_refused"),
    [
        ("optimizer.pt", True),
        pytest.param("scheduler.pt", True, marks=pytest.mark.slow),
        ("rng_state.pth", True),
        pytest.param("scaler.pt", True, marks=pytest.mark.slow),
        pytest.param("training_args.bin", False, marks=pytest.mark.slow),
        ("adapter_model.bin", False),
        pytest.param("pytorch_model.bin", False, marks=pytest.mark.slow),
    ],
)
def test_a_pickle_in_a_checkpoint(interrupted: Path, tmp_path: Path, owned: Path, name: str, is_refused: bool) -> None:
    shutil.copytree(interrupted, tmp_path / "place", symlinks=True)
    (checkpoint,) = (tmp_path / "place").glob("runs/recipe/checkpoints/sft/*/checkpoint-1")
    _put_evil(checkpoint / name, owned)
    if name == "adapter_model.bin":
        (checkpoint / "adapter_model.safetensors").unlink()
    mark(checkpoint)
    outcome = spinlm("generate", "recipe.yaml", cwd=tmp_path / "place")
    if is_refused:
        refused(outcome, "checkpoint-1: not a checkpoint that a run writes", "Delete it")
        shutil.rmtree(checkpoint)
        outcome = spinlm("generate", "recipe.yaml", cwd=tmp_path / "place")
    succeeded(outcome)
    assert not owned.exists()


@pytest.mark.parametrize("key", ["state_dict_type", "fsdp_state_dict_type"])
def test_checkpoints_that_are_read_by_unpickling_are_refused(place: Path, key: str) -> None:
    sharded = f"training.fsdp_config={{{key}: SHARDED_STATE_DICT}}"
    refused(
        spinlm(*RUN, "training.fsdp=full_shard", sharded, cwd=place),
        "training: ",
        "SHARDED_STATE_DICT checkpoints hold a pickle",
    )


def test_checkpoints_that_are_read_by_unpickling_are_refused_by_the_environment(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    refused(spinlm(*RUN, cwd=place), "SHARDED_STATE_DICT checkpoints hold a pickle")


CODE = """
from pathlib import Path
Path({owned!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "our_own"
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture
def with_code(place: Path, owned: Path) -> Path:
    """Where the model comes with code of its own."""
    _with_code(place / "model", owned)
    return place


def _with_code(model: Path, owned: Path) -> None:
    config = read_json(model / "config.json")
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config |= {"model_type": "our_own", "auto_map": auto_map, "architectures": ["Model"]}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(CODE.format(owned=str(owned)))


def test_code_that_comes_with_a_model_is_not_run_unasked(with_code: Path, owned: Path) -> None:
    for arguments in (RUN, ("plan", "recipe.yaml")):
        message = refused(spinlm(*arguments, cwd=with_code), "model.trust_remote_code=true")
        assert "comes with code of its own" in message
    outcome = spinlm_process(*RUN, cwd=with_code)  # which doesn't wait for an answer on its input
    refused(outcome, "model.trust_remote_code=true")
    assert not owned.exists()


def test_code_that_comes_with_a_model_is_run_by_the_recipes_key_and_that_is_said(with_code: Path, owned: Path) -> None:
    arguments = ("generate", "recipe.yaml", "sft=null", "model.trust_remote_code=true", "--iteration", "0")
    said = "model.trust_remote_code: runs code that comes with the model: ./model\n"
    for _ in range(2):  # at each start
        outcome = succeeded(spinlm_process(*arguments, cwd=with_code, HF_MODULES_CACHE=str(with_code / "modules")))
        assert outcome.err.count(said) == 1
    assert owned.exists()
    header = read_json(with_code / "runs/recipe/run.json")
    assert header["recipe"]["model"]["trust_remote_code"] is True


def test_code_that_comes_with_somebody_elses_run_is_not_run_unasked(copied: Path, owned: Path) -> None:
    run = copied / "runs/recipe"
    shutil.copytree(copied / "model", run / "m")
    _with_code(run / "m", owned)
    header = unsealed(read_json(run / "run.json"))
    header["recipe"]["model"] |= {"name": "runs/recipe/m", "trust_remote_code": True}
    write_json(run / "run.json", sealed(header))
    export, evaluate = ("export", "runs/recipe", "out"), ("evaluate", "runs/recipe")
    for arguments in (export, evaluate):
        refused(spinlm(*arguments, cwd=copied), "runs/recipe: its recipe has", "--trust-remote-code")
    assert not owned.exists()
    refused(spinlm("evaluate", "recipe.yaml", "--trust-remote-code", cwd=copied), "--trust-remote-code goes with a run")
    said = "model.trust_remote_code: runs code that comes with the model: runs/recipe/m\n"
    trusting = spinlm_process(*export, "--trust-remote-code", cwd=copied, HF_MODULES_CACHE=str(copied / "modules"))
    assert succeeded(trusting).err == said
    assert owned.exists()


def test_code_that_comes_with_another_model_is_never_run(copied: Path, owned: Path, tiny_llama: Path) -> None:
    other = shutil.copytree(tiny_llama, copied / "other")
    _with_code(other, owned)
    judge = ("--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m")
    arguments = ("evaluate", "runs/recipe", "--suite", "arena", "--against", "./other", *judge)
    refused(spinlm(*arguments, cwd=copied), "--against", "comes with code of its own")
    assert not owned.exists()


def test_a_whole_model_of_a_run_in_a_pickle(finished_full: Path, tmp_path: Path, owned: Path) -> None:
    shutil.copytree(finished_full, tmp_path / "place", symlinks=True)
    run = tmp_path / "place/runs/recipe"
    key = (run / "best").readlink().as_posix()
    _only_pickle(run / key, owned)
    _forge(run, key)
    refused(spinlm("export", "runs/recipe", "out", cwd=tmp_path / "place"), "pytorch_model.bin")
    assert not owned.exists()


def test_a_dataset_that_is_a_pickle_or_a_program(place: Path, owned: Path) -> None:
    _put_evil(place / "rows.parquet", owned)
    assert zipfile.is_zipfile(place / "rows.parquet")
    refused(spinlm(*RUN, "data.source=rows.parquet", cwd=place), "not a readable Parquet file")
    (place / "script").mkdir()
    (place / "script/script.py").write_text(f"open({str(owned)!r}, 'w')")
    refused(spinlm(*RUN, "data.source=script", cwd=place), "no file in it ends in")
    refused(spinlm(*RUN, "data.source=script/script.py", cwd=place), "data.source")
    assert not owned.exists()

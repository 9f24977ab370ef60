"""What people get wrong: each ends with exit code 2 and one message that says what, where, and what to do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from integration.command import contents, differing, refused, spinlm, spinlm_process, succeeded

RUN = ("run", "recipe.yaml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "nothing.yaml"), ("nothing.yaml: no such recipe file",)),
        (("run", "."), (".: can't be read",)),
        (("run", "data.jsonl"), ("data.jsonl: not valid YAML",)),
        (("run", "list.yaml"), ("list.yaml: a recipe is a mapping",)),
        (("run", "seed=1"), ("give a recipe, or both --model and --data",)),
        (("run", "--model", "./model"), ("give a recipe, or both --model and --data",)),
        ((*RUN, "seed"), ("'seed': an override is written section.key=value",)),
        ((*RUN, "training.lerning_rate=1"), ("training", "lerning_rate", "did you mean learning_rate?")),
        ((*RUN, "trainings.beta=1"), ("trainings: unknown key; did you mean training?",)),
        ((*RUN, "training.output_dir=elsewhere"), ("output_dir is decided by the run",)),
        ((*RUN, "training.beta=high"), ("training.beta", "'high'")),
        ((*RUN, "iterations=two"), ("iterations", "'two'")),
        ((*RUN, "training.beta=[0.1]"), ("training.beta has 1 values for 2 iterations",)),
        ((*RUN, "training.beta=-1"), ("training.beta", "above 0")),
        ((*RUN, "prompt.template=no place"), ("prompt: template must contain {prompt} exactly once",)),
        ((*RUN, "sft=null", "evaluation.control=true"), ("evaluation.control", "sft section")),
        ((*RUN, "adapter=null", "model.load_in_4bit=true"), ("model.load_in_4bit needs an adapter",)),
    ],
)
def test_a_recipe_that_is_none(place: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    (place / "list.yaml").write_text("- a\n- b\n")
    before = contents(place)
    refused(spinlm(*arguments, cwd=place), *words)
    assert contents(place) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("data.source=nothing.jsonl",), ("data.source: nothing.jsonl: no such file",)),
        (("data.source=nobody/nothing",), ("data.source: nobody/nothing", "the hub said")),
        (("data.columns.prompt=promt",), ("data.columns.prompt", "did you mean prompt?")),
        (("data.max_prompt_tokens=2",), ("data.jsonl: no example is left: prompt over data.max_prompt_tokens (15)",)),
        (("data.held_out=15",), ("data.held_out=15 leaves none of the 15 examples",)),
        (
            ("data.max_length=500",),
            ("data.max_length: 500", "./model takes 128", "data.max_length=128 data.max_prompt_tokens=64 generation."),
        ),
        (("generation.max_new_tokens=90",), ("generation.max_new_tokens: 60 + 90, but ./model takes 128",)),
        (("evaluation.select_by=accuracy_sampled",), ("evaluation.select_by", "no verifier")),
        (("model.name=./nothing",), ("model.name: ./nothing: no such directory",)),
        (("model.name=nothing.gguf",), ("model.name: nothing.gguf: no such file",)),
        (("model.name=nobody/nothing",), ("model.name: ", "nobody/nothing can't be loaded")),
        (("model.device=cuda",), ("model.device: cuda asked for, but this machine shows 0 GPUs",)),
        (("model.device=cpuu",), ("model.device: 'cpuu' is not a device",)),
        (("model.attn_implementation=magic",), ("model.name", "magic")),
        (("sft=null", "adapter.target_modules=[nothing]"), ("adapter: peft refuses these settings",)),
        (("prompt.chat_template=nothing.jinja",), ("prompt.chat_template: nothing.jinja",)),
        (("prompt.chat_template='{% for'",), ("the chat template is not valid Jinja",)),
        (("run_dir=data.jsonl",), ("data.jsonl: can't write there",)),
        (("training.optim=magic",), ("training: ", "magic", "adamw_torch")),
        (("sft.lr_scheduler_type=magic",), ("sft: ", "magic", "linear")),
        (("training.report_to=magic",), ("training: ", "magic", "tensorboard")),
        (("training.deepspeed=nothing.json",), ("training: ",)),
    ],
)
def test_settings_that_dont_fit(place: Path, changes: tuple[str, ...], words: tuple[str, ...]) -> None:
    before = contents(place)
    refused(spinlm(*RUN, *changes, cwd=place), *words)
    after = contents(place)
    assert {name: after.get(name) for name in before} == before


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"prompt": "a", "response": "b"}', '{"prompt": "a", '], ("data.jsonl: line 2: not valid JSON",)),
        (['{"prompt": "a", "response": "b"}', "[1]"], ("data.jsonl: line 2 is a list",)),
        (['{"text": "a"}'], ("data.jsonl: its columns aren't understood: text", "data.columns.prompt")),
        ([], ("data.jsonl: there are no rows in it",)),
        (['{"prompt": "a", "response": ""}'] * 2, ("none of its 2 rows can be used: empty response (2)",)),
    ],
)
def test_data_that_cant_be_read(place: Path, lines: list[str], words: tuple[str, ...]) -> None:
    good = (place / "data.jsonl").read_bytes()
    (place / "data.jsonl").write_text("".join(f"{line}\n" for line in lines))
    refused(spinlm(*RUN, cwd=place), *words)
    (place / "data.jsonl").write_bytes(good)
    succeeded(spinlm("generate", "recipe.yaml", cwd=place))  # what was refused is in nobody's way


def test_a_conversation_without_a_chat_template(place: Path) -> None:
    (place / "model/chat_template.jinja").unlink()
    tiny.build_tokenizer(chat_template=None).save_pretrained(place / "model")
    turns = [{"role": role, "content": "hi"} for role in ("user", "assistant", "user", "assistant")]
    (place / "data.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(8)))
    refused(spinlm(*RUN, cwd=place), "no chat template", "prompt.chat_template")


def test_a_tokenizer_of_another_model(place: Path) -> None:
    tokenizer = tiny.build_tokenizer()
    tokenizer.add_tokens(["one", "one too many"])
    tokenizer.save_pretrained(place / "model")
    refused(spinlm(*RUN, cwd=place), "token ids up to 260", "vocabulary has 260 entries")


def test_a_damaged_model(place: Path) -> None:
    weights = place / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(spinlm(*RUN, cwd=place), "model.name", "./model can't be loaded")


def test_weights_of_another_model(place: Path) -> None:
    config = place / "model/config.json"
    config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_size": 32'))
    refused(spinlm(*RUN, cwd=place), "model.name", "./model can't be loaded")


def test_a_model_without_tokenizer(place: Path) -> None:
    for path in (place / "model").glob("*token*"):
        path.unlink()
    refused(spinlm(*RUN, cwd=place), "model.name: the tokenizer of ./model can't be loaded")


@pytest.mark.parametrize(
    ("module", "changes", "words"),
    [
        ("bitsandbytes", ("model.load_in_4bit=true",), ("model.load_in_4bit", "pip install 'spinlm[4bit]'")),
        ("reasoning_gym", ("data.source=reasoning_gym:chain_sum",), ("reasoning_gym:chain_sum", "pip install")),
    ],
)
def test_an_extra_that_isnt_installed(
    place: Path, monkeypatch: pytest.MonkeyPatch, module: str, changes: tuple[str, ...], words: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    refused(spinlm(*RUN, *changes, cwd=place), *words)


@pytest.mark.parametrize("stage", ["sft", "iterations/0"])
def test_a_loss_that_isnt_finite(place: Path, stage: str) -> None:
    section = "sft" if stage == "sft" else "training"
    message = refused(
        spinlm(*RUN, f"{section}.learning_rate=1e30", f"{section}.warmup_steps=0", cwd=place),
        "training stopped at step",
        "Lower learning_rate",
    )
    kept = re.search(r"the last good checkpoint is (\S+);", message) or re.search(r"checkpoint is (\S+)\. ", message)
    assert kept is not None
    checkpoint = place / kept[1]
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert f"checkpoints/{stage}/" in kept[1]
    assert not (place / "runs/recipe" / stage / "adapter").exists()
    assert spinlm(*RUN, f"{section}.learning_rate=1e30", f"{section}.warmup_steps=0", cwd=place).err == message


def test_as_a_process(place: Path) -> None:
    """Nothing but the one message is on standard error, whatever the libraries have to say."""
    (place / "data.jsonl").write_text("{\n")
    outcome = spinlm_process(*RUN, cwd=place)
    assert refused(outcome, "data.jsonl: line 1: not valid JSON").count("\n") == 1


LONG = "x" * 300
JUDGED = ("evaluate", "runs/recipe", "--suite", "arena", "--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("evaluate", LONG), "can't be read"),
        (("evaluate", "runs/recipe", "--suite", f"{LONG}.yaml"), "name too long"),
        (("evaluate", "runs/recipe", "--suite", "~nobody-at-all/x.yaml"), "~nobody-at-all/x.yaml: not a task file"),
        ((*JUDGED, "--questions", f"{LONG}.jsonl"), ".jsonl: "),
        ((*JUDGED, "--against", LONG), LONG),
        (("export", "runs/recipe", LONG), "name too long"),
        ((*RUN, "--fork", LONG), "name too long"),
        ((*RUN, f"run_dir={LONG}"), "name too long"),
        ((*RUN, f"data.source={LONG}.jsonl", "run_dir=other"), "no such file"),
        ((*RUN, f"data.source={LONG}", "run_dir=other"), "the hub said"),
        ((*RUN, "data.source=~nobody-at-all/x", "run_dir=other"), "~nobody-at-all/x: no such file"),
        (("status", LONG), "name too long"),
    ],
)
def test_a_name_that_nothing_can_have(copied: Path, arguments: tuple[str, ...], words: str) -> None:
    message = refused(spinlm(*arguments, cwd=copied))
    assert words.lower() in message.lower()


def test_a_long_value_is_no_path(place: Path) -> None:
    template = "prompt.chat_template='{{ messages[0].content }}{# " + LONG + " #}'"
    arguments = ("plan", template, "--model", "./model", "--data", "data.jsonl")
    refused(spinlm(*arguments, cwd=place), "data.max_length: 1024")  # the first thing that is wrong with the rest


@pytest.mark.parametrize(
    ("launched", "redirected"),
    [("", "<&- 1>&- 2>&-"), ("", "1>/dev/full 2>/dev/full"), ("LOCAL_RANK=0", "2>/dev/full")],
)
def test_nobody_hears_what_is_wrong(tmp_path: Path, redirected: str, launched: str) -> None:
    """The exit code says it all the same."""
    command = f"{launched} exec {sys.executable} -m spinlm status nowhere {redirected}"
    assert subprocess.run(command, shell=True, cwd=tmp_path).returncode == 2


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("run", "nothing.yaml"), ("status", "nothing")])
def test_nothing_heavy_is_imported_where_it_isnt_needed(place: Path, arguments: tuple[str, ...]) -> None:
    outcome = spinlm_process(*arguments, cwd=place, launcher=("-X", "importtime", "-m", "spinlm"))
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in outcome.err.splitlines() if "|" in line}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "peft", "datasets", "accelerate"}
    assert outcome.code == (0 if "--help" in arguments else 2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "spinlm", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system isn't permitted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk(place: Path, finished: Path, small_disk: Path) -> None:
    """Whatever is being written when it is full; each time some space is made, the same command goes on."""
    command = (*RUN, "evaluation.control=true", f"run_dir={small_disk}/recipe")
    refusals = 0
    kept: dict[str, Any] = {}
    while (outcome := spinlm(*command, cwd=place)).code != 0:
        refused(outcome, "the disk is full", "run the same command again")
        now = {
            name: content for name, content in contents(small_disk / "recipe").items() if name.startswith("commits/")
        }
        assert {name: now.get(name) for name in kept} == kept
        kept, refusals = {n: c for n, c in now.items() if not n.startswith("commits/.")}, refusals + 1
        size = f"size={64 + 80 * refusals}k"
        subprocess.run(["mount", "-o", f"remount,{size}", str(small_disk)], check=True)
    assert refusals > 5
    assert differing(finished / "runs/recipe", small_disk / "recipe") == ["run.json"]

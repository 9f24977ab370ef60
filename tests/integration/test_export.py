"""What is exported loads by transformers alone, and is the player that the run committed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from integration.command import contents, refused, spinlm, succeeded

IDS = torch.tensor([[257, 117, 115, 101, 114, 10, 104, 105, 258, 10]])


@torch.no_grad()
def _logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits


def _player(place: Path, weights: str) -> torch.nn.Module:
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    return PeftModel.from_pretrained(base, place / "runs/recipe" / weights)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ((), "best"),
        (("--iteration", "0"), "iterations/0/adapter"),
        (("--iteration", "latest"), "iterations/1/adapter"),
        (("--merge",), "best"),
        (("--iteration", "0", "--merge"), "iterations/0/adapter"),
        (("--iteration", "sft", "--merge"), "sft/adapter"),
        (("--iteration", "control"), "control/adapter"),
    ],
)
def test_loads_as_the_player(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], weights: str
) -> None:
    before = contents(finished, without=())
    succeeded(spinlm("export", "runs/recipe", str(tmp_path / "out"), *options, cwd=finished))
    assert contents(finished, without=()) == before

    monkeypatch.chdir(tmp_path)  # it is to be found from anywhere
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    player = _player(finished, weights)
    assert torch.allclose(_logits(exported), _logits(player), atol=1e-5)
    merged = "--merge" in options
    assert (tmp_path / "out/adapter_model.safetensors").exists() != merged
    assert (tmp_path / "out/model.safetensors").exists() == merged

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"

    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nbase_model: ")
    assert "2401.01335" in card
    trained = (finished / "runs/recipe" / weights).resolve().parent.name
    name = f"iteration-{trained}" if trained.isdigit() else trained
    others = [other for other in ("base", "sft", "control") if other != name]
    assert f"| measure | {' | '.join([name, *others])} |" in card
    assert "- It is better than base (5.5" in card


def test_a_whole_model(finished_full: Path, tmp_path: Path) -> None:
    succeeded(spinlm("export", "runs/recipe", str(tmp_path / "out"), "--iteration", "1", cwd=finished_full))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    player = AutoModelForCausalLM.from_pretrained(finished_full / "runs/recipe/iterations/1/model")
    assert torch.equal(_logits(exported), _logits(player))


def test_the_default_prompt_goes_with_the_tokenizer(place: Path, tmp_path: Path) -> None:
    import tiny

    tiny.build_tokenizer(chat_template=None).save_pretrained(place / "model")
    (place / "model/chat_template.jinja").unlink()
    succeeded(spinlm("run", "recipe.yaml", "iterations=1", "sft=null", cwd=place))
    succeeded(spinlm("export", "runs/recipe", str(tmp_path / "out"), cwd=place))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "### Instruction: hi\n\n### Response: "


def test_never_over_something(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    refused(spinlm("export", "runs/recipe", str(tmp_path / "out"), cwd=finished), str(tmp_path / "out"), "empty")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_an_empty_directory_will_do(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    succeeded(spinlm("export", "runs/recipe", str(tmp_path / "out"), cwd=finished))
    assert (tmp_path / "out/adapter_model.safetensors").exists()


def test_by_dots_or_into_where_one_is(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "out/below").mkdir(parents=True)
    for out in (".", "../below"):
        outcome = spinlm("export", str(finished / "runs/recipe"), out, cwd=tmp_path / "out/below")
        refused(outcome, f"{out}: the working directory itself")
    succeeded(spinlm("export", "runs/recipe", f"{tmp_path}/out/below/../below/.", cwd=finished))
    assert (tmp_path / "out/below/adapter_model.safetensors").exists()


@pytest.mark.parametrize("iteration", ["7", "first", "-1", "../../sft"])
def test_an_unknown_iteration(finished: Path, tmp_path: Path, iteration: str) -> None:
    outcome = spinlm("export", "runs/recipe", str(tmp_path / "out"), "--iteration", iteration, cwd=finished)
    refused(outcome, iteration, "0, 1")
    assert not list(tmp_path.iterdir())


def test_no_run(place: Path) -> None:
    refused(spinlm("export", "runs/recipe", "out", cwd=place), "runs/recipe", "not a run directory")
    assert not (place / "out").exists()

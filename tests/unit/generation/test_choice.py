from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from integration import command
from spinlm.config import Recipe, recipe_from
from spinlm.errors import UserError
from spinlm.files import sealed, write_json
from spinlm.generation.choice import choose
from spinlm.rundir import RunDir

without_vllm = pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")

SHARDS = ("synthetic", "sampled", "greedy")


def recipe(engine: str = "auto", model: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    tree = {"run_dir": "run", "model": {"name": "somewhere", **(model or {})}, "data": {"source": "data.jsonl"}}
    return recipe_from({**tree, "generation": {"engine": engine}, **sections}, where="a test")


def chosen(wanted: Recipe, device: str = "cuda", processes: int = 1, used: Any = None) -> tuple[str, str]:
    """The engine, and the line that was said about it."""
    said: list[str] = []
    return choose(wanted, device, processes, lambda: None, used, said.append), "\n".join(said)


def test_auto_takes_transformers_on_a_cpu_and_says_so() -> None:
    assert chosen(recipe(), "cpu") == ("transformers", "engine: transformers, since on a CPU it is the faster one")


@without_vllm
def test_auto_takes_transformers_where_vllm_is_not_installed() -> None:
    engine, line = chosen(recipe())

    assert engine == "transformers"
    assert line.startswith("engine: transformers, since vLLM isn't installed (pip install 'spinlm[vllm]'")


@pytest.mark.parametrize(
    ("wanted", "where", "reason"),
    [
        (recipe(), {"processes": 2}, "vLLM generates in one process, and this run has 2"),
        (recipe(), {"device": "mps"}, "vLLM doesn't run on mps"),
        (recipe(model={"load_in_4bit": True}), {}, "4-bit"),
        (recipe(model={"name": "model.gguf"}), {}, "GGUF"),
        (recipe(model={"gguf_file": "model.gguf"}), {}, "GGUF"),
        (recipe(adapter={"use_dora": True}), {}, "DoRA"),
    ],
)
def test_auto_says_what_keeps_vllm_from_serving_the_players(wanted: Recipe, where: Any, reason: str) -> None:
    engine, line = chosen(wanted, **where)

    assert engine == "transformers"
    assert reason in line


def test_the_same_reasons_refuse_a_recipe_that_asks_for_vllm() -> None:
    with pytest.raises(UserError, match=r"vllm is asked for, but vLLM doesn't serve GGUF files.*=transformers"):
        chosen(recipe("vllm", model={"name": "model.gguf"}))


def test_a_recipe_that_names_transformers_gets_it_without_a_word() -> None:
    assert chosen(recipe("transformers")) == ("transformers", "")


def test_auto_goes_on_with_the_engine_that_has_generated_already() -> None:
    engine, line = chosen(recipe(), used="transformers")

    assert engine == "transformers"
    assert line == "engine: transformers, since it generated what this run has so far"


@without_vllm
def test_vllm_asked_for_but_not_installed_is_refused_before_anything_is_made(place: Path) -> None:
    outcome = command.spinlm("run", "recipe.yaml", "generation.engine=vllm", cwd=place)

    command.refused(outcome, "vLLM isn't installed", "pip install 'spinlm[vllm]'", "generation.engine=transformers")
    assert not (place / "runs/recipe/data").exists()


def test_every_shard_of_responses_records_its_engine(finished: Path) -> None:
    records = RunDir(finished / "runs/recipe").records()
    generated = [record for record in records if Path(record["key"]).parent.name in SHARDS]

    assert {record["inputs"].get("engine") for record in generated} == {"transformers"}
    assert not any("engine" in record["inputs"] for record in records if record not in generated)


@without_vllm
def test_a_run_that_another_engine_began_is_not_gone_on_with_by_this_one(copied: Path) -> None:
    run = RunDir(copied / "runs/recipe")
    _pretend_to_be_generated_by(run, "vllm")
    run.forget("iterations/1/synthetic/00002.jsonl")
    before = command.contents(run.path)

    outcome = command.spinlm("run", "recipe.yaml", "evaluation.control=true", cwd=copied)

    command.refused(outcome, "vLLM isn't installed", "vLLM generated what this run has so far", "--fork NEW_RUN")
    assert command.contents(run.path) == before


def _pretend_to_be_generated_by(run: RunDir, engine: str) -> None:
    """As the records would be if the run had been started where auto takes another engine."""
    for record in run.records():
        if "engine" in record["inputs"]:
            record["inputs"]["engine"] = engine
            write_json(run.record_path(record["key"]), sealed(record))

"""The recipe: what it takes, what it refuses and in which words."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from spinlm import config
from spinlm.config import Recipe, SFTSection, TrainerSection, TrainingSection, at, load_recipe, recipe_from
from spinlm.errors import UserError

ROOT = Path(__file__).parents[2]
SMALLEST: dict[str, Any] = {"run_dir": "r", "model": {"name": "m"}, "data": {"source": "d"}}


def recipe(**sections: Any) -> Recipe:
    return recipe_from({**SMALLEST, **sections}, where="here")


def refusal(**sections: Any) -> list[str]:
    """The lines of the error."""
    with pytest.raises(UserError) as caught:
        recipe(**sections)
    where, _, message = str(caught.value).partition(": ")
    assert where == "here"
    return message.splitlines()


def written(directory: Path, text: str) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def overridden(*overrides: str) -> Recipe:
    return load_recipe(None, ["model.name=m", "data.source=d", *overrides])


class TestDefaults:
    def test_only_the_model_and_the_data_are_needed(self) -> None:
        smallest = recipe()
        assert (smallest.iterations, smallest.seed, smallest.sft) == (3, 0, None)
        assert (smallest.training.beta, smallest.training.loss, smallest.training.replay) == (0.1, "logistic", 1)
        assert smallest.adapter is not None
        assert smallest.adapter.target_modules == "all-linear"

    def test_the_learning_rate_is_the_papers_for_a_whole_model(self) -> None:
        assert recipe().training.learning_rate == 5e-5
        assert recipe(adapter=None).training.learning_rate == 5e-7
        assert recipe(adapter=None, training={"learning_rate": None}).training.learning_rate == 5e-7
        assert recipe(adapter=None, training={"learning_rate": 1e-3}).training.learning_rate == 1e-3

    def test_a_pair_batch_is_the_papers(self) -> None:
        training = recipe().training
        assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 64


class TestRefusals:
    @pytest.mark.parametrize(
        ("sections", "lines"),
        [
            ({"modle": {}}, ["modle: unknown key; did you mean model?"]),
            ({"model": {"name": "m", "nmae": "x"}}, ["model.nmae: unknown key; did you mean name?"]),
            (
                {"data": {"source": "d", "reasoning_gym": {"sise": 3}}},
                ["data.reasoning_gym.sise: unknown key; did you mean size?"],
            ),
            ({"adapter": {"lora_alfa": 3}}, ["adapter.lora_alfa: unknown key; did you mean lora_alpha?"]),
            (
                {"adapter": {"xyz": 3}},
                [
                    "adapter.xyz: unknown key; known keys: lora_alpha, lora_dropout, r, target_modules, use_dora, "
                    "use_rslora"
                ],
            ),
            ({"prompt": {"templat": "x"}}, ["prompt.templat: unknown key; did you mean template?"]),
            ({"generation": {"temprature": 1.0}}, ["generation.temprature: unknown key; did you mean temperature?"]),
            ({"evaluation": {"contrl": True}}, ["evaluation.contrl: unknown key; did you mean control?"]),
            ({"training": {"bata": 1.0}}, ["training: unknown key 'bata'; did you mean beta?"]),
            (
                {"training": {"gradient_checkpoint": True}},
                ["training: unknown key 'gradient_checkpoint'; did you mean gradient_checkpointing?"],
            ),
            ({"sft": {"beta": 1.0}}, ["sft: unknown key 'beta'"]),
            ({"model": {}}, ["model.name: missing, and there is no default"]),
            ({"data": {}}, ["data.source: missing, and there is no default"]),
            ({"iterations": "3"}, ["iterations: Input should be a valid integer, got '3'"]),
            ({"iterations": True}, ["iterations: Input should be a valid integer, got True"]),
            ({"iterations": 0}, ["iterations: Input should be greater than or equal to 1, got 0"]),
            ({"model": {"name": 7}}, ["model.name: Input should be a valid string, got 7"]),
            ({"model": "m"}, ["model: Input should be a valid dictionary or instance of ModelSection, got 'm'"]),
            (
                {"training": {"beta": "high"}},
                [
                    "training.beta: Input should be a valid number, got 'high'",
                    "training.beta: Input should be a valid list, got 'high'",
                ],
            ),
            ({"training": {"beta": [0.1, -1.0, 5.0]}}, ["training.beta: must be above 0"]),
            ({"training": {"learning_rate": 0}}, ["training.learning_rate: must be above 0"]),
            (
                {"data": {"source": "d", "turns": "lst"}},
                ["data.turns: Input should be 'last', 'first' or 'all', got 'lst'"],
            ),
            (
                {"data": {"source": "d", "columns": {"question": "q"}}},
                [
                    "data.columns.question: Input should be 'messages', 'system', 'prompt', 'input' or 'response', "
                    "got 'question'"
                ],
            ),
            (
                {"data": {"source": "d", "held_out": 1.0}},
                ["data.held_out: give a number of examples (10) or a share below 1 (0.05)"],
            ),
            (
                {"data": {"source": "d", "held_out": -1}},
                ["data.held_out: give a number of examples (10) or a share below 1 (0.05)"],
            ),
            (
                {"model": {"name": "m", "attn_implementation": "somebody/fast@main"}},
                [
                    "model: attn_implementation: somebody/fast@main is code from the hub, which isn't run. "
                    "Where you trust it, set trust_remote_code=true"
                ],
            ),
            (
                {"data": {"source": "d", "max_prompt_tokens": 64, "max_length": 64}},
                ["data: max_prompt_tokens must be below max_length, which counts the response too"],
            ),
            (
                {"prompt": {"template": "{prompt}", "chat_template": "{{ messages }}"}},
                ["prompt: set template or chat_template, not both"],
            ),
            ({"prompt": {"template": "no place"}}, ["prompt: template must contain {prompt} exactly once"]),
            ({"prompt": {"template": "{prompt} {prompt}"}}, ["prompt: template must contain {prompt} exactly once"]),
            (
                {"training": {"save_steps": 5, "logging_steps": 2}},
                ["training: save_steps must be a multiple of logging_steps, so that a resumed run logs the same"],
            ),
            (
                {"model": {"name": "m", "load_in_4bit": True}, "adapter": None},
                ["model.load_in_4bit needs an adapter: 4-bit weights can't be trained themselves"],
            ),
            (
                {"evaluation": {"control": True}},
                ["evaluation.control continues the SFT stage: give the sft section too"],
            ),
            (
                {"evaluation": {"greedy": False, "select_by": "accuracy_greedy"}},
                ["evaluation.select_by is accuracy_greedy, but evaluation.greedy is off"],
            ),
        ],
    )
    def test_what_does_not_fit(self, sections: dict[str, Any], lines: list[str]) -> None:
        found = refusal(**sections)
        if lines == ["sft: unknown key 'beta'"]:
            found = [found[0].partition(";")[0]]
        assert found == lines

    @pytest.mark.parametrize(
        ("key", "sections"),
        [
            ("training.hub_token", {"training": {"hub_token": "hunter22"}}),
            ("sft.hub_token", {"sft": {"hub_token": "hunter22"}}),
            ("model.token", {"model": {"name": "m", "token": "hunter22"}}),
            ("HF_TOKEN", {"HF_TOKEN": "hunter22"}),
            (
                "training.deepspeed.comet.api_key",
                {"training": {"deepspeed": {"comet": {"enabled": True, "api_key": "hunter22"}}}},
            ),
            (
                "data.reasoning_gym.args.x.1.password",
                {"data": {"reasoning_gym": {"args": {"x": [0, {"password": "hunter22"}]}}}},
            ),
            ("data.source", {"data": {"source": "https://me:hunter22@host/data.jsonl"}}),
            ("model.name", {"model": {"name": "https://hunter22@host/model"}}),
        ],
    )
    def test_a_secret_is_refused_and_not_repeated(self, key: str, sections: dict[str, Any]) -> None:
        (line,) = refusal(**sections)
        assert line.startswith(f"{key}: holds a secret")
        assert "HF_TOKEN" in line
        assert "hunter22" not in line

    @pytest.mark.parametrize(
        "template", ["{prompt} me@host", "see https://me@host {prompt}", "the secret: {prompt}", "<|token|>{prompt}"]
    )
    def test_what_only_looks_like_one(self, template: str) -> None:
        assert recipe(prompt={"template": template}).prompt.template == template

    @pytest.mark.parametrize("key", ["beta", "learning_rate", "num_train_epochs"])
    def test_a_list_has_a_value_for_each_iteration(self, key: str) -> None:
        assert refusal(iterations=3, training={key: [1.0, 2.0]}) == [
            f"training.{key} has 2 values for 3 iterations: give one each"
        ]
        schedule = getattr(recipe(iterations=2, training={key: [1.0, 2.0]}).training, key)
        assert [at(schedule, 0), at(schedule, 1)] == [1.0, 2.0]

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_every_number_is_finite(self, value: float) -> None:
        for section, key in [("training", "beta"), ("training", "weight_decay"), ("generation", "temperature")]:
            assert f"{section}.{key}: Input should be a finite number, got {value}" in refusal(
                **{section: {key: value}}
            )
        assert "data.held_out: Input should be a finite number" in refusal(data={"source": "d", "held_out": value})[1]

    def test_each_problem_has_a_line(self) -> None:
        assert refusal(modle={}, data={"source": 1}, iterations=0) == [
            "iterations: Input should be greater than or equal to 1, got 0",
            "data.source: Input should be a valid string, got 1",
            "modle: unknown key; did you mean model?",
        ]

    def test_a_recipe_is_frozen(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            recipe().training.beta = 1.0  # type: ignore[misc]


class TestTrainersOwnSettings:
    def test_they_pass_under_their_own_names(self) -> None:
        given = {"gradient_checkpointing": True, "adam_beta2": 0.95, "deepspeed": "ds.json", "optim": "rmsprop"}
        for section in (recipe(training=given).training, recipe(sft=given).sft):
            assert section is not None
            assert section.arguments().items() >= given.items()
            assert not section.arguments().keys() & {"beta", "loss", "replay"}

    def test_transformers_knows_all_that_it_is_given(self) -> None:
        names = config._training_arguments().keys()
        assert recipe().training.arguments().keys() <= names
        assert SFTSection().arguments().keys() <= names

    def test_their_types_are_theirs_too(self) -> None:
        assert refusal(training={"bf16": "yes please"}) == [
            "training: bf16: Input should be a valid boolean, got 'yes please'"
        ]
        assert recipe(training={"dataloader_num_workers": 2}).training.arguments()["dataloader_num_workers"] == 2

    @pytest.mark.parametrize("name", sorted(TrainerSection.DECIDED_BY_THE_RUN))
    def test_what_the_run_decides_is_refused(self, name: str) -> None:
        assert refusal(training={name: 1}) == [f"training: {name} is decided by the run, take it out"]
        assert refusal(sft={name: 1}) == [f"sft: {name} is decided by the run, take it out"]

    def test_a_recipe_without_them_is_read_without_torch(self) -> None:
        code = (
            "import sys; from spinlm.config import load_recipe; load_recipe(None, ['model.name=m', 'data.source=d']);"
            "sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class TestFiles:
    def test_a_file_and_its_name(self, tmp_path: Path) -> None:
        path = written(tmp_path, "model: {name: m}\ndata: {source: d}\ntraining:\n  learning_rate: 5e-7\n")
        found = load_recipe(path)
        assert (found.run_dir, found.training.learning_rate) == ("runs/recipe", 5e-7)

    @pytest.mark.parametrize(
        ("text", "number"),
        [("5e-7", 5e-7), ("5E-7", 5e-7), ("1e3", 1000.0), (".5e1", 5.0), ("2.5e+1", 25.0), ("3", 3.0), ("0.25", 0.25)],
    )
    def test_numbers_as_people_write_them(self, text: str, number: float, tmp_path: Path) -> None:
        path = written(tmp_path, f"model: {{name: m}}\ndata: {{source: d}}\ntraining: {{beta: {text}}}\n")
        assert load_recipe(path).training.beta == number
        assert overridden(f"training.beta={text}").training.beta == number

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("- a\n- b\n", "a recipe is a mapping of sections; this is list"),
            ("", "a recipe is a mapping of sections; this is NoneType"),
            ("model: {name: m\ndata: x\n", r"not valid YAML: (.|\n)*line 2"),
            ("model:\n\tname: m\n", r"not valid YAML: (.|\n)*line 2"),
            ("model: {name: 2024-02-31}\n", "not valid YAML: day is out of range"),
            ("data: {source: d}\n", "model: missing, and there is no default"),
        ],
    )
    def test_what_cannot_be_used(self, text: str, words: str, tmp_path: Path) -> None:
        path = written(tmp_path, text)
        with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {words}"):
            load_recipe(path)

    def test_what_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"none.yaml: no such recipe file"):
            load_recipe(tmp_path / "none.yaml")
        with pytest.raises(UserError, match=r"can't be read: .*directory"):
            load_recipe(tmp_path)
        (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UserError, match=r"bytes.yaml: can't be read: .*utf-8"):
            load_recipe(tmp_path / "bytes.yaml")

    def test_overrides_go_over_the_file(self, tmp_path: Path) -> None:
        path = written(tmp_path, "model: {name: file, dtype: float16}\ndata: {source: d}\nseed: 1\n")
        found = load_recipe(str(path), ["model.name=override"])
        assert (found.model.name, found.model.dtype, found.seed) == ("override", "float16", 1)

    @pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.name)
    def test_ours_are_recipes(self, path: Path) -> None:
        assert load_recipe(path, ["model.name=m", "data.source=d"]).data.source == "d"

    def test_a_chat_template_is_read_from_its_file(self, tmp_path: Path) -> None:
        file = tmp_path / "own.jinja"
        file.write_text("{{ messages[0].content }}", encoding="utf-8")
        path = written(tmp_path, f"model: {{name: m}}\ndata: {{source: d}}\nprompt: {{chat_template: {file}}}\n")
        assert load_recipe(path).prompt.chat_template == "{{ messages[0].content }}"
        file.write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match=f"{path}: prompt.chat_template: {file}: can't be read: "):
            load_recipe(path)
        with pytest.raises(UserError, match=r"prompt.chat_template: no-such-file.jinja: can't be read: "):
            load_recipe(path, ["prompt.chat_template=no-such-file.jinja"])

    def test_only_of_what_is_loaded(self, tmp_path: Path) -> None:
        (tmp_path / "own.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
        assert refusal(prompt={"chat_template": str(tmp_path / "own.jinja")}) == [
            "prompt.chat_template: no Jinja template: it has no { in it"
        ]


class TestOverrides:
    def test_values_are_yaml(self) -> None:
        found = overridden(
            "training.beta=[0.1, 1, 5e0]",
            "training.learning_rate=5e-7",
            "adapter=null",
            "model.revision='1e5'",
            "data.columns={prompt: q, response: a=b}",
            "evaluation.greedy=false",
            "data.held_out=10",
        )
        assert found.training.beta == [0.1, 1.0, 5.0]
        assert found.training.learning_rate == 5e-7
        assert found.adapter is None
        assert found.model.revision == "1e5"
        assert found.data.columns == {"prompt": "q", "response": "a=b"}
        assert found.evaluation.greedy is False
        assert found.data.held_out == 10
        assert isinstance(found.data.held_out, int)

    def test_a_value_may_have_an_equals_sign(self) -> None:
        assert overridden("prompt.template=x = {prompt} =").prompt.template == "x = {prompt} ="
        assert overridden('prompt.template="# {prompt}\\n\\t"').prompt.template == "# {prompt}\n\t"

    def test_the_last_one_counts_and_siblings_stay(self) -> None:
        found = overridden("adapter.r=4", "adapter.lora_alpha=8", "adapter.r=2")
        assert found.adapter is not None
        assert (found.adapter.r, found.adapter.lora_alpha) == (2, 8)

    def test_a_section_that_is_off_is_switched_on(self) -> None:
        assert overridden("sft={}").sft == SFTSection()
        found = overridden("sft=null", "sft.learning_rate=0.5").sft
        assert found is not None
        assert found.learning_rate == 0.5

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("training.beta", "'training.beta': an override is written section.key=value"),
            ("=3", "'=3': an override is written section.key=value"),
            ("training.beta=[1", r"'training.beta=\[1': the value is not valid YAML"),
            ("model.name=2024-02-31", "the value is not valid YAML: day is out of range"),
            ("training.bata=3", "^the command line: training: unknown key 'bata'; did you mean beta"),
            ("model=m", "^the command line: model: Input should be a valid dictionary"),
            ("model.name.x=3", "^the command line: model.name: Input should be a valid string"),
        ],
    )
    def test_what_cannot_be_used(self, override: str, words: str) -> None:
        with pytest.raises(UserError, match=words):
            overridden(override)

    def test_a_section_instead_of_its_keys(self) -> None:
        with pytest.raises(UserError, match="model: Input should be a valid dictionary"):
            load_recipe(None, ["model=m", "data.source=d"])

    @pytest.mark.parametrize(
        ("model", "source", "run_dir"),
        [
            ("Qwen/Qwen2.5-0.5B", "rows.jsonl", "runs/Qwen2.5-0.5B-rows"),
            ("/models/tiny.gguf", "reasoning_gym:chain_sum", "runs/tiny-reasoning_gym-chain_sum"),
            ("./m/", "org/set", "runs/m-set"),
        ],
    )
    def test_a_run_directory_named_after_both(self, model: str, source: str, run_dir: str) -> None:
        assert load_recipe(None, [f"model.name={model}", f"data.source={source}"]).run_dir == run_dir


class TestDifferences:
    def test_none(self) -> None:
        assert recipe().differences(recipe(run_dir="elsewhere")) == []
        assert recipe(training={"beta": 1}).differences(recipe(training={"beta": 1.0})) == []

    def test_each_key(self) -> None:
        mine = recipe(seed=1, data={"source": "d", "columns": {"prompt": "q"}}, training={"bf16": True})
        theirs = recipe(iterations=1, data={"source": "e", "columns": {"prompt": "p"}}, training={"beta": [5.0]})
        assert mine.differences(theirs) == [
            "data.columns.prompt: 'q' -> 'p'",
            "data.source: 'd' -> 'e'",
            "iterations: 3 -> 1",
            "seed: 1 -> 0",
            "training.beta: 0.1 -> [5.0]",
            "training.bf16: True -> None",
        ]

    def test_a_section_that_is_off(self) -> None:
        keys = [line.partition(":")[0] for line in recipe(training={"learning_rate": 1.0}).differences(
            recipe(adapter=None, training={"learning_rate": 1.0})
        )]  # fmt: skip
        assert keys == [f"adapter.{key}" for key in sorted(config.AdapterSection.model_fields)]

    def test_a_recipe_comes_back_from_json_as_it_was(self) -> None:
        given = recipe(sft={}, training={"beta": [1, 2.5, 3], "bf16": True}, data={"source": "d", "held_out": 10})
        again = recipe_from(yaml.safe_load(given.model_dump_json()), where="json")
        assert again == given
        assert recipe_from(given.model_dump(mode="json"), where="json").differences(given) == []


# Every field has a reader and a meaning in the docs

SECTIONS: dict[str, type[BaseModel]] = {
    "": Recipe,
    "model": config.ModelSection,
    "adapter": config.AdapterSection,
    "data": config.DataSection,
    "data.reasoning_gym": config.ReasoningGymSection,
    "prompt": config.PromptSection,
    "sft": SFTSection,
    "generation": config.GenerationSection,
    "training": TrainingSection,
    "evaluation": config.EvaluationSection,
    "stop": config.StopSection,
    "warnings": config.WarningsSection,
}
PASSED_ON = {
    "adapter": set(config.AdapterSection.model_fields),
    "sft": set(TrainerSection.model_fields),
    "training": {*TrainerSection.model_fields, *config.OBJECTIVE_KEYS},
    "warnings": set(config.WarningsSection.model_fields),
}
"""Read by their names: by peft's LoraConfig, transformers' TrainingArguments, the Objective, the CHECKS of warnings."""

FIELDS = [(section, field) for section, schema in SECTIONS.items() for field in schema.model_fields]


def test_every_section_is_listed() -> None:
    listed = {schema for name, schema in vars(config).items() if name.endswith("Section") and name != "Section"}
    assert listed == {*SECTIONS.values(), TrainerSection} - {Recipe}


@pytest.mark.parametrize(
    ("section", "field"), [(section, field) for section, field in FIELDS if field not in PASSED_ON.get(section, ())]
)
def test_every_field_has_a_reader(section: str, field: str) -> None:
    code = "\n".join(p.read_text("utf-8") for p in (ROOT / "src").rglob("*.py") if p.name != "config.py")
    owners = f"{section.rpartition('.')[2] or 'recipe'}|_?section"
    assert re.search(rf"\b(?:{owners})\.{field}\b", code), f"nothing reads {section}.{field}"


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_every_field_is_documented(section: str, field: str) -> None:
    documented = (ROOT / "docs" / "recipe.md").read_text("utf-8")
    name = f"{section}.{field}" if section else field
    sections = {"model", "adapter", "data", "prompt", "sft", "generation", "training", "evaluation", "stop", "warnings"}
    trainers = section == "sft" and field in TrainerSection.model_fields
    wanted = f"## `{name}`" if name in sections else f"| `training.{field}` |" if trainers else f"| `{name}` |"
    assert wanted in documented, f"docs/recipe.md says nothing about {name}"


def test_nothing_is_documented_that_is_not_there() -> None:
    documented = (ROOT / "docs" / "recipe.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-z_.]+)` \|", documented, flags=re.MULTILINE)
    assert set(rows) <= {f"{section}.{field}" if section else field for section, field in FIELDS}
    assert len(rows) == len(set(rows))


def test_documented_defaults_are_the_defaults() -> None:
    documented = (ROOT / "docs" / "recipe.md").read_text("utf-8")
    for section, schema in SECTIONS.items():
        for field, info in schema.model_fields.items():
            name = f"{section}.{field}" if section else field
            cell = re.search(rf"^\| `{re.escape(name)}` \| ([^|]*) \|", documented, flags=re.MULTILINE)
            if cell is not None and isinstance(info.default, bool | int | float | str):
                assert yaml.load(cell[1].strip(" `"), Loader=config._Loader) == info.default, name


class TestHostileFiles:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("a: &a [*a]", "too large: more than 100,000 values, or an alias in what it stands for"),
            ("".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}' if i else 'x'] * 9)}]\n" for i in range(12)), "too large"),
            ("[" * 20_000, "nested too deeply"),
            ("a: !!bool x", "not valid YAML"),
            ("a: !!timestamp x", "not valid YAML"),
            ("a: !!int ''", "not valid YAML"),
            ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
            ("a: " + "x" * 200_000, "it has more than 100,000 bytes"),
            ('model: {name: "a\\0b"}', "model.name: holds a NUL character"),
            ("1: 2", "1: "),
        ],
    )
    def test_are_refused(self, tmp_path: Path, text: str, words: str) -> None:
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(UserError, match=re.escape(words)):
            load_recipe(tmp_path / "r.yaml")

    def test_aliases_that_people_write_are_read(self, tmp_path: Path) -> None:
        (tmp_path / "r.yaml").write_text(
            "model: {name: m}\ndata: {source: d}\nsft: &t {logging_steps: 2}\ntraining: {<<: *t, beta: 0.3}\n"
        )
        training = load_recipe(tmp_path / "r.yaml").training
        assert (training.logging_steps, training.beta) == (2, 0.3)

    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "r.yaml")
        with pytest.raises(UserError, match="neither a file nor a directory"):
            load_recipe(tmp_path / "r.yaml")
        with pytest.raises(UserError, match="neither a file nor a directory"):
            load_recipe(None, ["model.name=m", "data.source=d", f"prompt.chat_template={tmp_path / 'r.yaml'}"])

"""Recipe files of any bytes and of any tree, and overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fuzz.cases import accepted_or_refused, cases
from spinlm.config import Recipe, load_recipe

SECTIONS = {
    name: [*getattr(field.annotation, "model_fields", {}), "unknown", "bf16", "optim_args", "output_dir"]
    for name, field in Recipe.model_fields.items()
}
texts = st.text(max_size=20) | st.sampled_from(["", "\0", "\ud800", "auto", "x" * 5000, "{prompt}", "{{", "a" * 300])
scalars = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | texts | st.dates()
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
plausible = st.sampled_from([0, 1, -1, 0.5, 1e-4, "auto", "adamw_torch", [0.1, 0.2], "data.jsonl", True, "logistic"])


FITTING: list[tuple[str, str, Any]] = [
    ("training", "beta", 0.2),
    ("training", "learning_rate", [1e-4, 1e-5, 1e-6]),
    ("training", "bf16", False),
    ("training", "optim", "rmsprop"),
    ("data", "held_out", 0),
    ("data", "columns", {"prompt": "\u2028"}),
    ("generation", "batch_size", None),
    ("prompt", "template", "a {prompt}"),
    ("adapter", "target_modules", ["q_proj"]),
    ("sft", "num_train_epochs", 2.0),
    ("stop", "patience", 1),
    ("warnings", "drift", None),
]


@st.composite
def trees(draw: st.DrawFn) -> Any:
    tree: dict[Any, Any] = {"model": {"name": "m"}, "data": {"source": "d.jsonl"}}
    for section, key, value in draw(st.lists(st.sampled_from(FITTING), max_size=4)):
        tree.setdefault(section, {})[key] = value
    for _ in range(draw(st.integers(-3, 3))):
        section = draw(st.sampled_from(list(SECTIONS)) | texts)
        if draw(st.booleans()):
            tree[section] = draw(anything | plausible)
        else:
            key = draw(st.sampled_from(SECTIONS.get(section) or ["x"]) | texts)
            old = tree.get(section)
            tree[section] = {**(old if isinstance(old, dict) else {}), key: draw(plausible | anything)}
    return tree if draw(st.integers(0, 9)) else draw(anything)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


def _dump(tree: Any) -> bytes:
    return yaml.safe_dump(tree, allow_unicode=False).encode(errors="replace")


def _loaded(path: Path, overrides: list[str]) -> None:
    recipe = load_recipe(path, overrides)
    assert load_recipe(path, overrides).differences(recipe) == []
    recipe.model_dump_json()


@cases(0.15)
@given(tree=trees(), overrides=st.lists(st.tuples(texts, texts), max_size=1))
def test_trees(path: Path, tree: Any, overrides: list[tuple[str, str]]) -> None:
    path.write_bytes(_dump(tree))
    accepted_or_refused("recipe trees", lambda: _loaded(path, [f"{key}={value}" for key, value in overrides]))


GOOD = "model: {name: m}\ndata: {source: d}\n"
YAML = ["a: ", "- ", "[", "]", "{", "}", "&a ", "*a", "!!int ", "!!binary ", "!!python/name:os.system ", "!!set ", "? "]
YAML += [
    "<<: ",
    "|\n",
    ">\n",
    "\n",
    "  ",
    "'",
    '"',
    "%YAML 1.1\n---\n",
    "...\n",
    "0x",
    "1:2:3",
    "2024-02-31",
    ".inf",
    "~",
]
YAML += [
    "!!timestamp ",
    "!!bool ",
    "!!omap ",
    "!!float ",
    "#",
    "\t",
    "model: {name: m}\n",
    "data: {source: d}\n",
    "\0",
    "é",
]


@cases(0.1)
@given(
    content=st.lists(st.sampled_from(YAML), max_size=25).map("".join).map(str.encode)
    | st.lists(st.sampled_from(YAML), max_size=5).map(lambda parts: GOOD + "".join(parts)).map(str.encode)
    | st.binary(max_size=100)
)
def test_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    accepted_or_refused("recipe bytes", lambda: _loaded(path, []))


@cases(0.03)
@given(
    section=st.sampled_from(list(SECTIONS)), data=st.data(), value=st.lists(st.sampled_from(YAML), max_size=8) | texts
)
def test_overrides(path: Path, section: str, data: st.DataObject, value: list[str] | str) -> None:
    key = data.draw(st.sampled_from(["", *SECTIONS[section]]))
    path.write_bytes(_dump({"model": {"name": "m"}, "data": {"source": "d.jsonl"}}))
    accepted_or_refused("overrides", lambda: _loaded(path, [f"{section}.{key}={''.join(value)}"]))


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)
LARGE = {
    "aliases of aliases": BOMB,
    "an alias in itself": "a: &a [*a]\n",
    "nested": "[" * 200_000,
    "nested mappings": "{a: " * 60_000,
    "a long list": "a: [" + "1," * 100_000 + "]",
    "a large file": "a: " + "x" * 20_000_000,
    "a long number": "seed: " + "9" * 200_000,
    "a base 60 number": "seed: 1" + ":1" * 100_000,
}


@pytest.mark.parametrize("name", LARGE)
def test_large(path: Path, name: str) -> None:
    path.write_text(LARGE[name])
    assert accepted_or_refused("recipes, large", lambda: _loaded(path, [])) is None

"""What no module of ours does, whatever it is given: run text, open a pickle, start a shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import spinlm

FILES = sorted(Path(spinlm.__file__).parent.rglob("*.py"))

CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "os.execv", "yaml.unsafe_load", "yaml.full_load"}
BUILTIN_CALLS = {"compile"}
MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "pty", "code"}
HARMLESS = {"pickle.UnpicklingError"}  # that torch refused a file


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def forbidden(source: str) -> Iterator[str]:
    """What is in a module's source and shouldn't be."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            within = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names = {f"{within}{one.name}" for one in node.names} - HARMLESS
            yield from (name for name in names if name.partition(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        name, given = _name(node.func), {word.arg: word.value for word in node.keywords}
        if name in CALLS | BUILTIN_CALLS:
            yield name
        if name.endswith("torch.load") or (name == "yaml.load" and "Loader" not in given):
            yield name
        for key in ("shell", "allow_pickle", "use_safetensors", "weights_only"):
            value = given.get(key)
            wanted = key in ("use_safetensors", "weights_only")
            if value is not None and not (isinstance(value, ast.Constant) and value.value is wanted):
                yield f"{name}({key}=…)"
        for loader in ("Loader", "UnsafeLoader", "FullLoader"):
            if "Loader" in given and _name(given["Loader"]) == f"yaml.{loader}":
                yield f"yaml.load by {loader}"
        if "trust_remote_code" in given and isinstance(given["trust_remote_code"], ast.Constant):
            yield f"{name}(trust_remote_code=…)"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.name))
def test_nothing_of_the_kind(path: Path) -> None:
    assert list(forbidden(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(x)",
        "compile(x, 'x', 'exec')",
        "import pickle",
        "from pickle import loads",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import torch\ntorch.load('x')",
        "import yaml\nyaml.load(x)",
        "import yaml\nyaml.load(x, Loader=yaml.UnsafeLoader)",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "Model.from_pretrained('x', use_safetensors=False)",
        "Model.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_it_would_be_found(source: str) -> None:
    assert list(forbidden(source))

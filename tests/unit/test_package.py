"""What people import."""

import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files

import pytest

import spinlm


def test_names() -> None:
    assert spinlm.__all__ == [
        "Recipe",
        "Run",
        "SPINConfig",
        "SPINTrainer",
        "UserError",
        "export",
        "load_recipe",
        "run",
    ]


@pytest.mark.parametrize("name", spinlm.__all__)
def test_each_is_there_under_its_own_name(name: str) -> None:
    assert getattr(spinlm, name).__name__ == name


def test_others_are_not() -> None:
    with pytest.raises(AttributeError, match="module 'spinlm' has no attribute 'ruin'"):
        _ = spinlm.ruin


@pytest.mark.parametrize("statement", ["import spinlm", "from spinlm import Recipe, load_recipe", "import spinlm.cli"])
def test_importing_it_loads_nothing_heavy(statement: str) -> None:
    code = f"import sys; {statement}; print({{'torch', 'transformers', 'peft', 'datasets'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_it_is_typed() -> None:
    assert files("spinlm").joinpath("py.typed").is_file()


def test_its_version() -> None:
    assert spinlm.__version__ == version("spinlm")

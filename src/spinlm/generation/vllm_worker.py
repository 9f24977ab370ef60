"""The process that vLLM runs in, the only place that imports it. It knows nothing of players and recipes.

It ends when its parent has closed the pipe or is gone, and all that vLLM holds goes with it.
vLLM's core runs in this same process (VLLM_ENABLE_V1_MULTIPROCESSING=0), so that which requests share
a step is decided by the requests alone: the same requests, the same answers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from itertools import count
from multiprocessing.connection import Connection
from typing import Any, get_args

from spinlm.errors import first_line


def serve(connection: Connection) -> None:
    """Start vLLM with the settings that come first, then answer until the pipe is closed."""
    served = _send_first(connection, lambda: Served(**connection.recv()))
    if served is None:
        return
    while True:
        try:
            wanted, arguments = connection.recv()
        except EOFError:
            return
        if wanted == "seat":
            _send_first(connection, lambda path=arguments: served.seat(path))
        else:
            for message in served.answer(**arguments):
                connection.send(message)


def _send_first(connection: Connection, make: Any) -> Any:
    """What was made, once the parent knows whether it could be: None, or what vLLM says is wrong."""
    try:
        made = make()
    except Exception as error:
        connection.send(first_line(error))
        raise
    connection.send(None)
    return made


class Served:
    """vLLM with one model loaded, and one adapter at a time beside it."""

    def __init__(self, rank: int | None, device: str, **settings: Any) -> None:
        """Load the model.

        Args:
            rank: The adapters', or None where there are none.
            device: `cuda` or `cpu`.
            settings: vLLM's EngineArgs.
        """
        from vllm import EngineArgs, LLMEngine

        lora = {} if rank is None else {"enable_lora": True, "max_loras": 1, "max_lora_rank": _rank_class(rank)}
        self._engine = LLMEngine.from_engine_args(EngineArgs(**settings, **_memory(device), **lora))
        self._adapter: Any = None
        self._numbers = count(1)

    def seat(self, adapter: str | None) -> None:
        """Answer with this adapter from now on, or with the bare model."""
        from vllm.lora.request import LoRARequest

        if self._adapter is not None:
            self._engine.remove_lora(self._adapter.lora_int_id)
        self._adapter = None
        if adapter is not None:
            number = next(self._numbers)
            self._adapter = LoRARequest(f"adapter-{number}", number, adapter)
            self._engine.add_lora(self._adapter)

    def answer(self, prompts: list[list[int]], sampling: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
        """`("step", tokens, finished)` for each decoding step, then `("answers", [(ids, reason, logprob), ...])`."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        self._engine.reset_prefix_cache()  # an earlier shard's would change the rounding of this one
        for place, (prompt, arguments) in enumerate(zip(prompts, sampling, strict=True)):
            params = SamplingParams(**arguments, output_kind=RequestOutputKind.DELTA)
            self._engine.add_request(str(place), tokens_input(prompt), params, lora_request=self._adapter)
        ids: list[list[int]] = [[] for _ in prompts]
        logprobs, reasons = [0.0] * len(prompts), [""] * len(prompts)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            for output in outputs:
                place, made = int(output.request_id), output.outputs[0]
                ids[place] += made.token_ids
                logprobs[place] += sum(
                    step[token].logprob for token, step in zip(made.token_ids, made.logprobs, strict=True)
                )
                reasons[place] = made.finish_reason or ""
            yield "step", sum(len(o.outputs[0].token_ids) for o in outputs), sum(o.finished for o in outputs)
        yield "answers", list(zip(ids, reasons, logprobs, strict=True))


def refusal(architecture: str | None, rank: int | None, device: str) -> str | None:
    """Why this vLLM can't serve such a model with such adapters on such a device; None where it can."""
    from vllm.model_executor.models import ModelRegistry, supports_lora
    from vllm.platforms import current_platform

    if current_platform.device_type != device:
        return f"the vLLM that is installed is one for {current_platform.device_type or 'another device'}, not {device}"
    if architecture not in ModelRegistry.get_supported_archs():
        return f"vLLM doesn't know the architecture {architecture}"
    if rank is None:
        return None
    if not supports_lora(ModelRegistry.models[architecture].load_model_cls()):
        return f"vLLM serves {architecture} without LoRA adapters only"
    if rank > max(_rank_classes()):
        return f"vLLM serves adapters up to rank {max(_rank_classes())}, not {rank}"
    return None


def _rank_classes() -> tuple[int, ...]:
    from vllm.config.lora import MaxLoRARanks

    return get_args(MaxLoRARanks)


def _rank_class(rank: int) -> int:
    """The smallest rank that vLLM has room for and that holds this one."""
    return min(size for size in _rank_classes() if size >= rank)


def _memory(device: str) -> Mapping[str, Any]:
    """On a GPU nine tenths of what is free; on a CPU what VLLM_CPU_KVCACHE_SPACE says."""
    if device != "cuda":
        return {}
    import torch

    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": 0.9 * free / total}


if __name__ == "__main__":
    if sys.argv[1] == "refusal":
        print(json.dumps(refusal(**json.loads(sys.argv[2]))))
    else:
        serve(Connection(int(sys.argv[2])))

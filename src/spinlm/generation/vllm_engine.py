"""Generation by vLLM, in a process of its own (`vllm_worker`) that takes its memory with it when it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import IO, Any

from spinlm.config import Recipe
from spinlm.data.render import Renderer
from spinlm.errors import UserError
from spinlm.generation.engine import OnProgress, Request, Response, Sampling
from spinlm.players.models import Player
from spinlm.players.weights import refuse_pickled_adapter

WORKER = "spinlm.generation.vllm_worker"

DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Environment of vLLM's process, where the user's has no other value."""

ON_CPU = {
    "TORCHDYNAMO_DISABLE": "1",  # compiling one small sampling kernel takes half a minute
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB; vLLM would take nearly all memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""The same, on a CPU."""

REMEDY = "set generation.engine=transformers"


class VLLMEngine:
    """Serves one base model; adapters come and go beside it, unmerged.

    In full fine-tuning each player is a model of its own, and vLLM starts anew with its weights.
    """

    def __init__(
        self, recipe: Recipe, dtype: str, device: str, renderer: Renderer, revision: str | None = None
    ) -> None:
        """Nothing is started before a player is seated.

        Args:
            recipe: Which base model, which adapters, how long prompts and responses get, how many at once.
            dtype: Of the weights and the computation: `float32`, `bfloat16`, `float16`.
            device: `cuda` or `cpu`.
            renderer: For stop tokens and the responses' text.
            revision: Of a base model on the hub.
        """
        self._recipe = recipe
        self._revision = revision
        self._dtype = dtype
        self._device = device
        self._renderer = renderer
        self._worker: _Worker | None = None
        self._model = ""
        self._adapter: str | None = None

    def seat(self, player: Player) -> None:
        """Answer as this player from now on.

        Raises:
            UserError: vLLM can't load it; with what vLLM says.
        """
        path = None if player.path is None else str(player.path.resolve())
        adapted = self._recipe.adapter is not None
        model = self._recipe.model.name if adapted or path is None else path
        if self._worker is None or self._model != model:
            self._start(model)
        if adapted and self._adapter != path:
            assert self._worker is not None
            if player.path is not None:
                refuse_pickled_adapter(player.path)
            self._worker.send(("seat", path))
            self._worker.confirm(f"the adapter {path}")
            self._adapter = path

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: OnProgress | None = None
    ) -> list[Response]:
        """One response for each request, in their order."""
        assert self._worker is not None, "nobody is seated"
        arguments = [_sampling_params(sampling, request.seed, self._renderer) for request in requests]
        prompts = [list(request.prompt_ids) for request in requests]
        self._worker.send(("answer", {"prompts": prompts, "sampling": arguments}))
        while (message := self._worker.receive())[0] == "step":
            if on_progress is not None:
                on_progress(*message[1:])
        return [Response(ids, self._renderer.text(ids), reason, logprob) for ids, reason, logprob in message[1]]

    def close(self) -> None:
        """End vLLM's process, and with it all that it holds in memory."""
        if self._worker is not None:
            self._worker.close()
        self._worker, self._adapter = None, None

    def _start(self, model: str) -> None:
        self.close()
        section, data, generation = self._recipe.model, self._recipe.data, self._recipe.generation
        settings = {
            "model": model,
            "revision": self._revision if model == section.name else None,
            "load_format": "safetensors",  # a GGUF file isn't served, and a pickle can run code
            "trust_remote_code": section.trust_remote_code,
            "dtype": self._dtype,
            "max_model_len": data.max_prompt_tokens + generation.max_new_tokens,
            "max_num_seqs": generation.batch_size,
            "enforce_eager": self._device == "cpu",
            "generation_config": "vllm",  # not what the model's authors recommend
            "logprobs_mode": "raw_logprobs",
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "seed": self._recipe.seed % 2**32,
        }
        adapter = self._recipe.adapter
        self._worker = _Worker(self._device)
        self._worker.send(settings | {"device": self._device, "rank": None if adapter is None else adapter.r})
        self._worker.confirm(model)
        self._model = model


class _Worker:
    """vLLM's process, and the pipe to it.

    What it writes is shown only if it dies, or as it comes where the user has set its log level.
    """

    def __init__(self, device: str) -> None:
        self._pipe, theirs = Pipe()
        self._log: IO[bytes] | None = None
        if "VLLM_LOGGING_LEVEL" not in os.environ:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [*_COMMAND, "serve", str(theirs.fileno())],
            env=_environment(device),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def send(self, message: Any) -> None:
        try:
            self._pipe.send(message)
        except OSError:
            raise self._died() from None

    def receive(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None

    def confirm(self, what: str) -> None:
        """Wait until vLLM has loaded something."""
        problem = self.receive()
        if problem is not None:
            self.close()
            raise UserError(f"generation.engine: vLLM can't load {what}: {problem}; {REMEDY}")

    def close(self) -> None:
        """End the process and wait until it has."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()
        if self._log is not None:
            self._log.close()

    def _died(self) -> UserError:
        code, log = self._process.wait(), ""
        if self._log is not None:
            self._log.seek(0)
            log = self._log.read().decode(errors="replace")[-3000:]
        return UserError(
            f"generation.engine: vLLM's process has ended (exit code {code}; -9 often means that memory ran out). "
            f"Run the same command again to go on. The last that it said:\n{log}"
        )


def refusal(architecture: str | None, rank: int | None, device: str) -> str | None:
    """Why the vLLM that is installed can't serve such a model with such adapters on such a device; None: it can."""
    arguments = json.dumps({"architecture": architecture, "rank": rank, "device": device})
    done = subprocess.run([*_COMMAND, "refusal", arguments], env=_environment(device), capture_output=True, text=True)
    if done.returncode:
        return f"the vLLM that is installed can't be used: {_last_line(done.stderr)}"
    answer: str | None = json.loads(_last_line(done.stdout))
    return answer


_COMMAND = [sys.executable, "-P", "-m", WORKER]


def _environment(device: str) -> dict[str, str]:
    defaults = DEFAULTS | (ON_CPU if device == "cpu" else {})
    given = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_USE_AGENT_STORE"}
    path = os.pathsep.join(str(Path(place).resolve()) for place in sys.path)
    return defaults | given | {"PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def _sampling_params(sampling: Sampling, seed: int, renderer: Renderer) -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams: our stop tokens and no others, the chosen tokens' log-probs alone."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": seed,
        "stop_token_ids": sorted(renderer.stop_ids),
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "it says nothing"

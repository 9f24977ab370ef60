"""Answering prompts by vLLM, in a process and usually an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import vllm_worker
from benchmarks.inputs import answer_tokens
from benchmarks.record import Turn
from benchmarks.sides.generation import Generation, Prompts
from spinlm.errors import UserError
from spinlm.generation.engine import Sampling

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class VLLMGeneration(Generation):
    """A worker that waits between turns; what it says of time is of generating alone."""

    def __init__(
        self, worker: subprocess.Popen[str], stop_ids: frozenset[int], prompts: Prompts, max_new_tokens: int, slots: int
    ) -> None:
        super().__init__(f"vLLM, {slots} slots", prompts, max_new_tokens)
        self._worker = worker
        self._stop_ids = stop_ids
        self._seconds = 0.0
        self.version = str(self._read()["version"])

    def turn(self) -> Turn:
        turn = super().turn()
        return Turn(turn.side, self._seconds, turn.amount, turn.detail)

    def answered(self, prompts: Prompts, sampling: Sampling) -> list[list[int]]:
        job = {
            "prompts": [list(prompt) for prompt in prompts],
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "stop_token_ids": sorted(self._stop_ids),
        }
        assert self._worker.stdin is not None
        print(json.dumps(job), file=self._worker.stdin, flush=True)
        reply = self._read()
        self._seconds = float(reply["seconds"])
        return [answer_tokens(answer, self._stop_ids) for answer in reply["answers"]]

    def _read(self) -> dict[str, Any]:
        assert self._worker.stdout is not None
        for line in self._worker.stdout:
            if line.startswith(vllm_worker.MARK):
                return dict(json.loads(line.removeprefix(vllm_worker.MARK)))
        raise UserError(f"vLLM ended with exit code {self._worker.wait()}; what it said is above")


@contextmanager
def vllm_generation(
    python: Path, model: Path, stop_ids: frozenset[int], prompts: Prompts, max_new_tokens: int, slots: int, length: int
) -> Iterator[VLLMGeneration]:
    """A worker by this Python interpreter, ended on leaving."""
    command = [str(python), "-P", vllm_worker.__file__, str(model), str(slots), str(length)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT
    ) as worker:
        try:
            yield VLLMGeneration(worker, stop_ids, prompts, max_new_tokens, slots)
        finally:
            assert worker.stdin is not None
            worker.stdin.close()

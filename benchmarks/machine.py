"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from spinlm.hardware import total_memory
from spinlm.players.linear import linear

PACKAGES = ("spinlm", "torch", "transformers", "peft", "accelerate", "trl")
_WIDE = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")


def machine(peak_size: int) -> dict[str, Any]:
    """Processor, cores, threads, memory and the rate of a large float32 product."""
    cpu = _cpu_info()
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "vector_units": [name for name in _WIDE if name in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(total_memory(torch.device("cpu")) / 2**30, 1),
        "system": platform.platform(),
        "matrix_peak_gflops": round(matrix_peak(peak_size) / 1e9, 1),
    }


def matrix_peak(size: int, tries: int = 4) -> float:
    """The best rate of a square float32 product, by torch's own kernel or oneDNN's, in operations a second."""
    a, b = torch.randn(2, size, size).unbind()
    seconds = []
    for product in (torch.mm, linear):
        product(a, b)
        for _ in range(tries):
            started = time.perf_counter()
            product(a, b)
            seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def _cpu_info() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}

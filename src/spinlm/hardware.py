"""What a machine or a named GPU can do: arithmetic, memory traffic, memory; and what to do where memory runs out."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from spinlm.errors import OutOfMemory, UserError, first_line

TERA, GIGA = 10**12, 10**9


@dataclass(frozen=True)
class Machine:
    """One device.

    Attributes:
        name: For people.
        is_gpu: Or a CPU.
        peak: Floating-point operations a second of matrix products, in the dtype asked for.
        bandwidth: Bytes a second, read or written.
        memory: Bytes.
        measured: Whether peak and bandwidth were measured here, or come from a data sheet.
    """

    name: str
    is_gpu: bool
    peak: float
    bandwidth: float
    memory: int
    measured: bool


@dataclass(frozen=True)
class GPU:
    """A data sheet.

    Attributes:
        half: Dense bfloat16 and float16 with float32 accumulation, without sparsity, in 10^12 operations a second.
        single: float32 outside the tensor cores (torch's default), in the same.
        bandwidth: 10^9 bytes a second.
        memory: 10^9 bytes.
        bfloat16: Whether the tensor cores take it.
    """

    half: float
    single: float
    bandwidth: float
    memory: float
    bfloat16: bool = True


# NVIDIA's data sheets: H100 and H200 SXM, A100 SXM (both sizes), L40S, L4, A10, V100 SXM2, T4; the Ada and Ampere GA102
# whitepapers for the RTX 4090 and 3090, whose tensor cores run at half rate with float32 accumulation.
GPUS = {
    "H200": GPU(989, 67, 4800, 141),
    "H100": GPU(989, 67, 3350, 80),
    "A100-80": GPU(312, 19.5, 2039, 80),
    "A100-40": GPU(312, 19.5, 1555, 40),
    "L40S": GPU(362, 91.6, 864, 48),
    "L4": GPU(121, 30.3, 300, 24),
    "A10": GPU(125, 31.2, 600, 24),
    "RTX 4090": GPU(165, 82.6, 1008, 24),
    "RTX 3090": GPU(71, 35.6, 936, 24),
    "V100": GPU(125, 15.7, 900, 32, bfloat16=False),
    "T4": GPU(65, 8.1, 320, 16, bfloat16=False),
}


def check_gpu(name: str) -> str:
    """The name as it is in the table.

    Raises:
        UserError: It isn't there.
    """
    known = {_plain(one): one for one in GPUS}
    if _plain(name) not in known:
        raise UserError(f"--gpu {name}: not known; give one of {', '.join(GPUS)}")
    return known[_plain(name)]


def named_gpu(name: str, dtype: torch.dtype) -> Machine:
    """A GPU by its data sheet, computing in a dtype.

    Raises:
        UserError: It isn't in the table.
    """
    name = check_gpu(name)
    gpu = GPUS[name]
    half = dtype == torch.float16 or (dtype == torch.bfloat16 and gpu.bfloat16)
    peak = (gpu.half if half else gpu.single) * TERA
    return Machine(name, True, peak, gpu.bandwidth * GIGA, int(gpu.memory * GIGA), measured=False)


def this_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """A device of this machine, measured for a second or two by a large product in a dtype and a large copy."""
    is_gpu = device.type != "cpu"
    size = 8192 if is_gpu else 2048 if dtype == torch.float32 else 512
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(2**29 if is_gpu else 2**27, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    peak = 2 * size**3 / _shortest(lambda: torch.mm(a, b), device)
    bandwidth = 2 * source.nbytes / _shortest(lambda: target.copy_(source), device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"this machine ({torch.get_num_threads()} threads)"
    return Machine(name, is_gpu, peak, bandwidth, total_memory(device), measured=True)


def _shortest(compute: Callable[[], object], device: torch.device, seconds: float = 0.7) -> float:
    """Seconds of the fastest of the repetitions that fit."""
    best, begin = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - begin < seconds:
        _wait(device)
        start = time.perf_counter()
        compute()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "could not create a memory object",
    "could not create a primitive",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What torch and the libraries under it say, where they have no error of its own for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, the GPU's or the machine's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


@contextmanager
def enough_memory(what: str, phase: str, remedy: str) -> Iterator[None]:
    """Say what to do where memory runs out; see OutOfMemory."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(what, first_line(error), phase, remedy) from None
        raise


def release_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def total_memory(device: torch.device) -> int:
    """Bytes of the GPU, or else of the machine or the control group that this process is confined to."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_cgroup_limits()])


def _cgroup_limits() -> list[int]:
    files = [Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory/memory.limit_in_bytes")]
    texts = [file.read_text().strip() for file in files if file.exists()]
    return [int(text) for text in texts if text.isdecimal()]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())

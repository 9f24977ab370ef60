"""Whether memory has run out, by what really is raised."""

from __future__ import annotations

import pytest
import torch

from spinlm.errors import OutOfMemory, UserError
from spinlm.hardware import enough_memory, is_out_of_memory


def test_a_machine_without_enough_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as by_torch:
        torch.empty(10**15)
    with pytest.raises(MemoryError) as by_python:
        bytearray(10**17)
    with pytest.raises(RuntimeError) as of_another_kind:
        torch.ones(2) @ torch.ones(3)
    assert is_out_of_memory(by_torch.value) and is_out_of_memory(by_python.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(of_another_kind.value)
    assert not is_out_of_memory(OutOfMemory("a", "b", "train", "c")), "what is said already isn't said again"


def test_it_is_said_what_to_do() -> None:
    with pytest.raises(OutOfMemory) as full, enough_memory("iteration 0: train", "train", "Lower tokens_per_pass"):
        torch.empty(10**15)
    message = str(full.value)
    assert message.startswith("iteration 0: train: memory has run out ([enforce fail at alloc_cpu.cpp")
    assert message.endswith("Nothing committed is lost. Lower tokens_per_pass.")
    assert full.value.phase == "train"
    planned = str(full.value.with_estimate("spinlm plan estimates 2 GB"))
    assert planned == f"{message} spinlm plan estimates 2 GB."
    with pytest.raises(UserError, match=r"^else$"), enough_memory("", "", ""):
        raise UserError("else")

"""The meter of peak memory."""

from __future__ import annotations

import sys

import pytest

from benchmarks.memory import reset_peak, resident

MIB = 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_the_peak_is_that_since_the_reset() -> None:
    before = bytearray(b"x") * (256 * MIB)
    del before
    reset_peak()
    baseline = resident("VmRSS")
    assert resident("VmHWM") - baseline < 16 * MIB, "what was there before is forgotten"
    during = bytearray(b"x") * (64 * MIB)
    del during
    assert 60 * MIB < resident("VmHWM") - baseline < 90 * MIB

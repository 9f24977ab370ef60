"""A case that waits for ever is found."""

from __future__ import annotations

import signal

import pytest

from fuzz import cases


def test_a_case_that_only_waits_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "WALL_SECONDS", 0.01)
    with pytest.raises(cases.TooSlow):
        cases.accepted_or_refused("waiting", signal.pause)

"""How many cases, and what they came to."""

from __future__ import annotations

import os
from typing import Any

import pytest

from fuzz.cases import TOTAL, Tried


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-cases", type=int, metavar="N", help="cases of all fuzz tests together, at random")


def pytest_configure(config: pytest.Config) -> None:
    if asked := config.getoption("--fuzz-cases", default=None):
        os.environ[TOTAL] = str(asked)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if Tried.accepted or Tried.refused:
        terminalreporter.section("fuzz")
        for line in Tried.lines():
            terminalreporter.line(line)

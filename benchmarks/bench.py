"""What every measure is given."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.settings import Sizes


class Skipped(Exception):
    """A measure can't be taken on this machine; the message says why."""


@dataclass(frozen=True)
class Bench:
    """Sizes, and what is tried.

    Attributes:
        sizes: How large everything is.
        spin: Settings of SPINConfig that differ from its defaults.
        vllm_python: The interpreter that has vLLM.
    """

    sizes: Sizes
    spin: dict[str, Any] = field(default_factory=dict)
    vllm_python: Path = Path(".venv-vllm/bin/python")

    def settings(self) -> dict[str, Any]:
        """What decides a measure's figures, for the record; a measure by the same ones needn't be repeated."""
        return {**asdict(self.sizes), "spin": self.spin}

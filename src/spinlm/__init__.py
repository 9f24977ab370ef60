"""SPIN, self-play fine-tuning (arXiv 2401.01335), for any Hugging Face causal language model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spinlm.api import Run, export, run
    from spinlm.config import Recipe, load_recipe
    from spinlm.errors import UserError
    from spinlm.training.spin_trainer import SPINConfig, SPINTrainer

__version__ = "0.1.0"
__all__ = ["Recipe", "Run", "SPINConfig", "SPINTrainer", "UserError", "export", "load_recipe", "run"]

_HOMES = {
    "Recipe": "spinlm.config",
    "Run": "spinlm.api",
    "SPINConfig": "spinlm.training.spin_trainer",
    "SPINTrainer": "spinlm.training.spin_trainer",
    "UserError": "spinlm.errors",
    "export": "spinlm.api",
    "load_recipe": "spinlm.config",
    "run": "spinlm.api",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import spinlm` alone loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'spinlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

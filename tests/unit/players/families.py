"""Tiny models that have an opinion: freshly initialised ones give every token nearly the same probability."""

from __future__ import annotations

from typing import Any

import torch

import tiny


def build_model(family: str, seed: int = 0) -> Any:
    """A tiny model of a family, its weight matrices scaled up."""
    return sharpened(tiny.build_model(family, seed), 4 if family == "mamba" else 15)


def sharpened(model: Any, factor: float) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(factor)
    return model

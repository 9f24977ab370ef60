"""Adapters that change something."""

from __future__ import annotations

from typing import Any

import peft
import torch


def with_adapter(model: Any, **settings: Any) -> Any:
    """The model with a LoRA adapter on all linear layers, whose update is not zero."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval()

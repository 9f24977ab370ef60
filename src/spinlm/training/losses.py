"""The losses of SPIN as pure functions of a pair's margin (paper section 4.2, equation 4.4).

Each is convex, decreasing and has a negative slope at zero, which is what the paper's theory asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor], Tensor]


def spin_margin(
    real_logprobs: Tensor,
    synthetic_logprobs: Tensor,
    opponent_real_logprobs: Tensor,
    opponent_synthetic_logprobs: Tensor,
    beta: float,
) -> Tensor:
    """The margin of each pair: beta times the difference of the two log-ratios (equation 4.7).

    Args:
        real_logprobs: Main player's log-probs of the real responses, summed over tokens, [B].
        synthetic_logprobs: Main player's log-probs of the synthetic responses, [B].
        opponent_real_logprobs: Opponent's log-probs of the real responses, [B].
        opponent_synthetic_logprobs: Opponent's log-probs of the synthetic responses, [B].
        beta: The paper's lambda.
    """
    real_logratios = real_logprobs - opponent_real_logprobs
    synthetic_logratios = synthetic_logprobs - opponent_synthetic_logprobs
    return beta * (real_logratios - synthetic_logratios)


def logistic(margin: Tensor) -> Tensor:
    """log(1 + exp(-z)), the paper's choice."""
    return -F.logsigmoid(margin)


def hinge(margin: Tensor) -> Tensor:
    """max(0, 1 - z)."""
    return torch.relu(1 - margin)


def exponential(margin: Tensor) -> Tensor:
    """exp(-z)."""
    return torch.exp(-margin)


def correlation(margin: Tensor) -> Tensor:
    """1 - z."""
    return 1 - margin


LOSSES: Mapping[str, Loss] = {
    "logistic": logistic,
    "hinge": hinge,
    "exponential": exponential,
    "correlation": correlation,
}

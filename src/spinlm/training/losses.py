"""What the main player minimises, as pure functions (paper section 4.2, equations 4.4 and 4.7), and its variants.

Each loss of a margin is convex, decreasing and has a negative slope at zero, which is what the paper's theory asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

MarginLoss = Callable[[Tensor], Tensor]


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


MARGIN_LOSSES: Mapping[str, MarginLoss] = {
    "logistic": logistic,
    "hinge": hinge,
    "exponential": exponential,
    "correlation": correlation,
}
LOSSES = (*MARGIN_LOSSES, "noise_contrastive", "triplet")


@dataclass(frozen=True)
class PairLogprobs:
    """What an objective is a function of, for B pairs; all of it [B], log-probs summed over a response's tokens.

    Attributes:
        real: The main player's log-probs of the real responses.
        synthetic: Its log-probs of the synthetic responses.
        initial: Its log-probs of the starting player's responses, which only the triplet loss reads; where a pair has
            none, those of its synthetic response.
        reference_real: The opponent's log-probs of the real responses, or a mixture of past opponents'.
        reference_synthetic: The same of the synthetic responses.
        real_tokens: The real responses' lengths.
        synthetic_tokens: The synthetic responses' lengths.
        initial_tokens: The lengths of the starting player's.
    """

    real: Tensor
    synthetic: Tensor
    initial: Tensor
    reference_real: Tensor
    reference_synthetic: Tensor
    real_tokens: Tensor
    synthetic_tokens: Tensor
    initial_tokens: Tensor

    def per_token(self) -> PairLogprobs:
        """Log-probs as means over a response's tokens."""
        return replace(
            self,
            real=self.real / self.real_tokens,
            synthetic=self.synthetic / self.synthetic_tokens,
            initial=self.initial / self.initial_tokens,
            reference_real=self.reference_real / self.real_tokens,
            reference_synthetic=self.reference_synthetic / self.synthetic_tokens,
        )


@dataclass(frozen=True)
class Objective:
    """The loss of a pair.

    Attributes:
        loss: One of LOSSES.
        beta: The paper's lambda.
        length_normalised: Take every log-prob per token, as SimPO does (arXiv 2405.14734).
        nll_weight: Of the real response's negative log-likelihood per token, added to the loss (Iterative RPO,
            arXiv 2404.19733, equation 1).
        noise_ratio: The noise_contrastive loss's mu: how many synthetic responses there are to a real one.
        history_weight: The triplet loss's: of the synthetic response's advantage over the starting player's.
    """

    loss: str = "logistic"
    beta: float = 0.1
    length_normalised: bool = False
    nll_weight: float = 0.0
    noise_ratio: float = 1.0
    history_weight: float = 1.0

    @property
    def is_of_margins(self) -> bool:
        """Whether a pair of identical responses has no gradient, since only the margin counts."""
        return self.loss in MARGIN_LOSSES and not self.nll_weight

    def rewards(self, pairs: PairLogprobs) -> Tensor:
        """Of the real and the synthetic responses, [2, B]: beta times the log-ratio (equation 4.7).

        T-SPIN's have no reference: beta times the log-prob.
        """
        if self.length_normalised:
            pairs = pairs.per_token()
        if self.loss == "triplet":
            return self.beta * torch.stack([pairs.real, pairs.synthetic])
        log_ratios = [pairs.real - pairs.reference_real, pairs.synthetic - pairs.reference_synthetic]
        return self.beta * torch.stack(log_ratios)

    def margin(self, pairs: PairLogprobs) -> Tensor:
        """How much higher the real response's reward is, [B]."""
        rewards = self.rewards(pairs)
        return rewards[0] - rewards[1]

    def __call__(self, pairs: PairLogprobs) -> Tensor:
        """The loss of each pair, [B]."""
        loss = self._of_rewards(pairs)
        if self.nll_weight:
            loss = loss + -pairs.real / pairs.real_tokens * self.nll_weight
        return loss

    def _of_rewards(self, pairs: PairLogprobs) -> Tensor:
        real, synthetic = self.rewards(pairs)
        if self.loss == "noise_contrastive":
            return noise_contrastive(real, synthetic, self.noise_ratio)
        if self.loss == "triplet":
            initial = pairs.per_token().initial if self.length_normalised else pairs.initial
            history = logistic(synthetic - initial * self.beta)
            return logistic(real - synthetic) + history * self.history_weight
        margin_loss = MARGIN_LOSSES[self.loss]
        return margin_loss(real - synthetic)


def noise_contrastive(real_rewards: Tensor, synthetic_rewards: Tensor, noise_ratio: float) -> Tensor:
    """Is a response real? Each is classified by itself (SPACE, arXiv 2512.07175).

    With s(r) = 1 / (1 + mu exp(-r)): -log s(real) - mu log(1 - s(synthetic)).

    Args:
        real_rewards: [B].
        synthetic_rewards: [B].
        noise_ratio: mu.
    """
    log_ratio = math.log(noise_ratio)
    is_real, is_synthetic = F.softplus(log_ratio - real_rewards), F.softplus(synthetic_rewards - log_ratio)
    return is_real + is_synthetic * noise_ratio

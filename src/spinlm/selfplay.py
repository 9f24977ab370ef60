"""The loop: Algorithm 1 of the paper over the stages of a run."""

from __future__ import annotations

from collections.abc import Sequence

from spinlm.config import at
from spinlm.players.models import Player
from spinlm.stages import Answers, Evaluation, Stages


def play(stages: Stages) -> list[Evaluation]:
    """Play every iteration and measure every player; what is committed already is not done again.

    Returns:
        The evaluations of the base, the SFT model, each iteration's main player and the control.
    """
    start = opponent = stages.starting_player()
    evaluations = evaluate_starting_players(stages)
    for iteration in range(stages.recipe.iterations):
        generate(stages, iteration, opponent)
        main_player = train(stages, iteration, opponent)
        evaluations.append(evaluate(stages, iteration, main_player, evaluations[-1]))
        opponent = main_player
    if stages.recipe.evaluation.control:
        evaluations.append(stages.evaluate(stages.control(start)))
    return evaluations


def generate(stages: Stages, iteration: int, opponent: Player) -> Answers:
    """The opponent answers the prompts of the supervised dataset."""
    return stages.generate(iteration, opponent)


def train(stages: Stages, iteration: int, opponent: Player) -> Player:
    """The main player learns to prefer the real responses; replayed pairs are scored by today's opponent."""
    first = max(0, iteration - stages.recipe.training.replay)
    synthetic = {t: generate(stages, t, stages.opponent_of(t)) for t in range(first, iteration + 1)}
    pairs = stages.score(iteration, opponent, synthetic)
    return stages.train(iteration, opponent, pairs)


def evaluate(stages: Stages, iteration: int, main_player: Player, opponent: Evaluation) -> Evaluation:
    """Held-out measures of the main player, alone and against its opponent."""
    return stages.evaluate(main_player, opponent, beta=at(stages.recipe.training.beta, iteration))


def evaluate_starting_players(stages: Stages) -> list[Evaluation]:
    """The base model, and the SFT model where there is one."""
    players = dict.fromkeys([stages.base, stages.starting_player()])
    return [stages.evaluate(player) for player in players]


def evaluate_again(stages: Stages, iterations: Sequence[int]) -> list[Evaluation]:
    """Every player of the iterations that are trained, for `spinlm evaluate`."""
    evaluations = evaluate_starting_players(stages)
    for iteration in iterations:
        evaluations.append(evaluate(stages, iteration, stages.opponent_of(iteration + 1), evaluations[-1]))
    return evaluations

"""The loop: Algorithm 1 of the paper over the stages of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spinlm.config import at
from spinlm.players.models import Player
from spinlm.results import Answers, Evaluation, ScoredPairs
from spinlm.stages import Stages


def play(stages: Stages) -> list[Evaluation]:
    """Play every iteration and measure every player; what is committed already is not done again.

    A player gives all its responses, to train on and to be measured by, before any is scored: an engine that
    holds a model of its own is started once an iteration, and never beside the one that scores and trains. Only
    where the run may stop it is asked twice, since nobody trains on the responses of a run's last player.

    Returns:
        The evaluations of the base, the SFT model, each iteration's main player and the control.
    """
    start = opponent = stages.starting_player()
    stages.settle_method(start)
    synthetic: dict[int, Answers] = {0: stages.generate(0, opponent)}
    evaluations = evaluate_starting_players(stages)
    iterations = stages.recipe.iterations
    for iteration in range(iterations):
        synthetic[iteration] = stages.generate(iteration, opponent)
        pairs = score(stages, iteration, opponent, synthetic)
        if iteration > 0 and not pairs.pairs:
            stages.stop(iteration, "the opponent plays like the data; there is nothing left to learn")
            break
        main_player = stages.train(iteration, opponent, pairs)
        if iteration + 1 < iterations and not stages.recipe.stop.is_asked_for:
            synthetic[iteration + 1] = stages.generate(iteration + 1, main_player)
        evaluations.append(evaluate(stages, iteration, main_player, evaluations[-1], synthetic[iteration]))
        if iteration + 1 < iterations and (reason := stages.reason_to_stop(evaluations)):
            stages.stop(iteration + 1, reason)
            break
        opponent = main_player
    else:
        stages.forget_stop()
    if stages.recipe.evaluation.control:
        evaluations.append(stages.evaluate(stages.control(start)))
    return evaluations


def score(stages: Stages, iteration: int, opponent: Player, synthetic: Mapping[int, Answers]) -> ScoredPairs:
    """This iteration's pairs and the replayed ones, all scored by today's opponent."""
    initial = synthetic[0] if stages.recipe.training.loss == "triplet" else None
    return stages.score(iteration, opponent, {t: synthetic[t] for t in replayed(stages, iteration)}, initial)


def replayed(stages: Stages, iteration: int) -> range:
    """The iterations whose responses an iteration trains on, its own the last."""
    return range(max(0, iteration - stages.recipe.training.replay), iteration + 1)


def evaluate(
    stages: Stages, iteration: int, main_player: Player, opponent: Evaluation, synthetic: Answers
) -> Evaluation:
    """Held-out measures of the main player, alone and against its opponent; what is amiss; who is best now."""
    evaluation = stages.evaluate(main_player, opponent, beta=at(stages.recipe.training.beta, iteration))
    stages.diagnose(iteration, synthetic, evaluation, opponent)
    stages.point()
    return evaluation


def evaluate_starting_players(stages: Stages) -> list[Evaluation]:
    """The base model, and the SFT model where there is one."""
    players = dict.fromkeys([stages.base, stages.starting_player()])
    for player in reversed(players):  # an engine that holds a model of its own has the starting player's already
        stages.answer(player)
    return [stages.evaluate(player) for player in players]


def train_alone(stages: Stages, iteration: int) -> Player:
    """One iteration's training on responses that are there already, for `spinlm train`."""
    with_initial = [0] if stages.recipe.training.loss == "triplet" else []
    read = sorted({*with_initial, *replayed(stages, iteration)})
    synthetic = {t: stages.generate(t, stages.opponent_of(t)) for t in read}
    opponent = stages.opponent_of(iteration)
    return stages.train(iteration, opponent, score(stages, iteration, opponent, synthetic))


def evaluate_alone(stages: Stages, iterations: Sequence[int]) -> list[Evaluation]:
    """Every player of the iterations that are trained, and the control if it is, for `spinlm evaluate`."""
    evaluations = evaluate_starting_players(stages)
    for iteration in iterations:
        synthetic = stages.generate(iteration, stages.opponent_of(iteration))
        main_player = stages.opponent_of(iteration + 1)
        evaluations.append(evaluate(stages, iteration, main_player, evaluations[-1], synthetic))
    if stages.has_control():
        evaluations.append(stages.evaluate(stages.control(stages.starting_player())))
    return evaluations

"""What goes wrong in self-play, seen in numbers, and said in words with its cause and a remedy.

The known failure is silent: the loss falls, the margin grows, and the model gets worse. Each iteration is looked at
three ways: what tells its real and synthetic responses apart, what its training logged, and what it did to the
held-out part.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from spinlm.config import WarningsSection
from spinlm.evaluation.measures import HeldOutExample, Measured, difference, measure, repetition

EARLY, LATE = 0.2, 0.8
"""The first and the last fifth of an iteration's training."""

NO_MARGIN = 1e-3
"""A margin of rounding."""

TELLING = 0.8
"""A feature that tells so large a share of the pairs apart by itself is named as a shortcut."""


@dataclass(frozen=True)
class Said:
    """One response, as a reader would see it.

    Attributes:
        ids: Its tokens, with the one that ended it.
        truncated: Whether it was cut at the cap.
        text: With special tokens.
    """

    ids: Sequence[int]
    truncated: bool
    text: str


@dataclass(frozen=True)
class Warned:
    """Something to look at.

    Attributes:
        name: The threshold in the recipe's section `warnings`.
        title: What, in a few words.
        message: With the numbers.
        cause: What it usually comes from.
        remedy: What to do.
    """

    name: str
    title: str
    message: str
    cause: str
    remedy: str


Values = Mapping[str, float]
Group = tuple[Said, Sequence[Said]]
"""A real response, and the synthetic ones to the same prompt that differ from it."""


@dataclass(frozen=True)
class TrainingFacts:
    """What has to be known to read a training's log.

    Attributes:
        beta: The iteration's.
        length_normalised: Whether rewards are per token.
        has_reference: Whether rewards are ratios to a reference, so that margins start at 0.
        max_grad_norm: What gradients are clipped to.
        round_steps: After how many steps responses are made anew; None: never.
    """

    beta: float
    length_normalised: bool = False
    has_reference: bool = True
    max_grad_norm: float = 1.0
    round_steps: int | None = None


def of_pairs(groups: Sequence[Group], identical: int, markers: Sequence[str]) -> dict[str, float]:
    """What tells the two sides apart.

    Args:
        groups: Of the iteration's own responses, those that differ.
        identical: How many more didn't differ.
        markers: The lines that the prompt template puts around a turn.
    """
    groups = [group for group in groups if group[1]]
    pairs = [(real, one) for real, synthetic in groups for one in synthetic]
    values = {"identical_share": identical / (identical + len(pairs)) if identical or pairs else math.nan}
    if not pairs:
        return values
    real, synthetic = zip(*pairs, strict=True)
    values["truncation_rate"] = fmean(one.truncated for one in synthetic)
    for name, side in (("real", real), ("synthetic", synthetic)):
        values[f"length_{name}"] = fmean(len(one.ids) for one in side)
        values[f"repetition_{name}"] = fmean(repetition(one.ids) for one in side)
    one_a_prompt = {"real": [real.ids for real, _ in groups], "synthetic": [said[0].ids for _, said in groups]}
    for name, responses in one_a_prompt.items():
        values |= {f"distinct_{n}_{name}": distinct(responses, n) for n in (1, 2)}
    values["length_ratio"] = values["length_synthetic"] / values["length_real"]
    return values | {f"told_by_{feature}": share for feature, share in telling_features(groups, markers).items()}


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of some responses together (distinct-n of arXiv 1510.03055)."""
    grams = [tuple(ids[i : i + n]) for ids in responses for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def telling_features(groups: Sequence[Group], markers: Sequence[str]) -> dict[str, float]:
    """The share of pairs that each simple feature tells apart by itself: 0.5 is none, 1 is all."""
    features: dict[str, Callable[[Said], float]] = {
        "length": lambda said: len(said.ids),
        "ending": lambda said: said.truncated,
        "template": lambda said: sum(said.text.count(marker) for marker in markers),
        "repetition": lambda said: repetition(said.ids),
    }
    pairs = [(real, one) for real, synthetic in groups for one in synthetic]
    more = {name: _more_often([(feature(r), feature(s)) for r, s in pairs]) for name, feature in features.items()}
    either_way = {name: max(share, 1 - share) for name, share in more.items()}
    return {**either_way, "first_token": _more_often(_first_token_odds(groups))}


def _more_often(values: Sequence[tuple[float, float]]) -> float:
    """How often the real response has more of something; ties count half."""
    return fmean((real > synthetic) + (real == synthetic) / 2 for real, synthetic in values)


def _first_token_odds(groups: Sequence[Group]) -> list[tuple[float, float]]:
    """How much more often a response's first token begins a real one, counted in the other half of the prompts."""
    counts = []
    for half in (groups[::2], groups[1::2]):
        begin_real = Counter(real.ids[0] for real, synthetic in half for _ in synthetic)
        counts.append((begin_real, Counter(one.ids[0] for _, synthetic in half for one in synthetic)))

    def odds(said: Said, half: int) -> float:
        begin_real, begin_synthetic = counts[half]
        return math.log((begin_real[said.ids[0]] + 1) / (begin_synthetic[said.ids[0]] + 1))

    return [
        (odds(real, 1 - place % 2), odds(one, 1 - place % 2))
        for place, (real, synthetic) in enumerate(groups)
        for one in synthetic
    ]


def of_training(rows: Sequence[Mapping[str, float]], facts: TrainingFacts) -> dict[str, float]:
    """From what an iteration's training logged: how it began, how it ended.

    Args:
        rows: Of its `training.jsonl`.
        facts: How to read them.
    """
    skipped = max((row["skipped_nonfinite"] for row in rows if "skipped_nonfinite" in row), default=0)
    values = {"skipped_nonfinite": skipped} if skipped else {}
    steps = [row for row in rows if "margin" in row and not _is_fresh(int(row["step"]), facts.round_steps)]
    if not steps:
        return values
    last = steps[-1]["step"]
    late = [row for row in steps if row["step"] > LATE * last]
    values |= {"margin_late": fmean(row["margin"] for row in late)} | _of_gradients(steps, facts.max_grad_norm)
    if facts.has_reference:
        lengths = [1.0 if facts.length_normalised else row["length_real"] for row in late]
        ratios = [row["reward_real"] / facts.beta / length for row, length in zip(late, lengths, strict=True)]
        values["real_log_ratio_late"] = fmean(ratios)
    if facts.has_reference and facts.round_steps is None:  # else accuracy doesn't begin at a coin's, or begins anew
        early = [row for row in steps if row["step"] <= max(2, EARLY * last)]
        values |= {"reward_accuracy_early": fmean(row["reward_accuracy"] for row in early)} if early else {}
        values["reward_accuracy_late"] = fmean(row["reward_accuracy"] for row in late)
    return values


def _is_fresh(step: int, round_steps: int | None) -> bool:
    """Whether nothing has moved yet since the responses were made: all margins are 0, but for rounding."""
    return step == 1 if round_steps is None else (step - 1) % round_steps == 0


def _of_gradients(steps: Sequence[Mapping[str, float]], clipped_to: float) -> dict[str, float]:
    """The usual norm, the largest, and the largest jump: of a norm that is clipped over the median of those around it.

    An infinite one is how float16 finds its loss scale.
    """
    norms = [row["grad_norm"] for row in steps if math.isfinite(row.get("grad_norm", math.inf))]
    if not norms:
        return {}
    around = [median(norms[max(0, place - 5) : place + 6]) for place in range(len(norms))]
    ratios = [norm / usual for norm, usual in zip(norms, around, strict=True) if norm > clipped_to and usual > 0]
    return {"grad_norm_median": median(norms), "grad_norm_max": max(norms), "grad_norm_jump": max(ratios, default=1.0)}


def of_held_out(player: Sequence[HeldOutExample], opponent: Sequence[HeldOutExample]) -> dict[str, float]:
    """What the iteration did to the held-out part.

    Args:
        player: The main player's examples.
        opponent: Its opponent's.
    """
    change, measured = difference(player, opponent, "real_nll"), measure(player)
    values = {f"real_nll_change{end}": found for end, found in _ends(change).items()} if change.prompts else {}
    for name in ("discriminability", "drift"):
        if name in measured:
            values[name] = measured[name].value
    return values


def _ends(change: Measured) -> dict[str, float]:
    return {"": change.value, "_low": change.low, "_high": change.high}


@dataclass(frozen=True)
class Check:
    """One thing to warn about.

    Attributes:
        title: What, in a few words.
        says: From the values and the recipe's limit: what to say, with the numbers; None where all is well.
        cause: What it usually comes from.
        remedy: What to do.
    """

    title: str
    says: Callable[[Values, float], str | None]
    cause: str
    remedy: str


def warnings(values: Values, limits: WarningsSection) -> list[Warned]:
    """What the values say, where they are beyond the recipe's limits.

    Args:
        values: Of all three kinds above, as many as there are.
        limits: The recipe's section `warnings`.
    """
    found = []
    for name, check in CHECKS.items():
        limit: float | None = getattr(limits, name)
        message = None if limit is None else check.says(values, limit)
        if message is not None:
            found.append(Warned(name, check.title, message, check.cause, check.remedy))
    return found


def _real_falls(values: Values, limit: float) -> str | None:
    if not values.get("margin_late", 0.0) > NO_MARGIN:
        return None
    before = f"The margin grows (to {values['margin_late']:.3g}), but the real responses' log-probs fall"
    if "real_nll_change" in values:
        change, low = values["real_nll_change"], values["real_nll_change_low"]
        beyond_noise = change > limit and low > 0
        return f"{before} by {change:.3f} nats a token on held-out examples." if beyond_noise else None
    fall = -values.get("real_log_ratio_late", 0.0)
    return f"{before} by {fall:.3f} nats a token in training." if fall > limit else None


def _told_at_once(values: Values, limit: float) -> str | None:
    if not values.get("reward_accuracy_early", 0.0) > limit:
        return None
    said = f"Reward accuracy is {values['reward_accuracy_early']:.2f} within the first fifth of the steps."
    shares = {name: values.get(f"told_by_{name}", 0.5) for name in FEATURES}
    feature = max(shares, key=lambda name: shares[name])
    if shares[feature] < TELLING:
        return f"{said} None of the simple features explains it ({', '.join(FEATURES.values())})."
    alone = f"it alone tells {shares[feature]:.0%} of the pairs apart"
    return f"{said} The shortcut seems to be the {FEATURES[feature]}: {alone}."


def _not_told(values: Values, limit: float) -> str | None:
    late = values.get("reward_accuracy_late", 1.0)
    return f"Reward accuracy is still {late:.2f} in the last fifth of the steps." if late < limit else None


def _length(values: Values, limit: float) -> str | None:
    ratio = values.get("length_ratio", 1.0)
    if max(ratio, 1 / ratio) <= limit:
        return None
    return f"Synthetic responses have {values['length_synthetic']:.1f} tokens, real ones {values['length_real']:.1f}."


def _truncation(values: Values, limit: float) -> str | None:
    cut = values.get("truncation_rate", 0.0)
    return f"{cut:.0%} of the synthetic responses were cut at generation.max_new_tokens." if cut > limit else None


def _repetition(values: Values, limit: float) -> str | None:
    synthetic, real = values.get("repetition_synthetic", 0.0), values.get("repetition_real", 0.0)
    if synthetic - real <= limit:
        return None
    return f"{synthetic:.0%} of the synthetic responses' 4-grams stood in them before, {real:.0%} of the real ones'."


def _diversity(values: Values, limit: float) -> str | None:
    synthetic, real = values.get("distinct_2_synthetic", 1.0), values.get("distinct_2_real", 1.0)
    if not synthetic / real < limit:
        return None
    return f"Distinct-2 is {synthetic:.2f} for synthetic responses and {real:.2f} for real ones."


def _identical(values: Values, limit: float) -> str | None:
    share = values.get("identical_share", 0.0)
    return f"{share:.0%} of the synthetic responses equal the real one and teach nothing." if share > limit else None


def _gradient(values: Values, limit: float) -> str | None:
    jump = values.get("grad_norm_jump", 1.0)
    if jump <= limit:
        return None
    largest = values["grad_norm_max"]
    return f"A gradient norm is {jump:.0f} times the median of those around it; the largest is {largest:.3g}."


def _skipped(values: Values, limit: float) -> str | None:
    skipped = values.get("skipped_nonfinite", 0)
    if skipped <= limit:
        return None
    steps = "step was" if skipped == 1 else "steps were"
    return f"{skipped:.0f} {steps} skipped, since the loss or its gradient was NaN or infinite."


def _drift(values: Values, limit: float) -> str | None:
    drift = values.get("drift", 0.0)
    if drift <= limit:
        return None
    return f"On held-out prompts the player is {drift:.2f} nats a token (KL) away from the starting player."


FEATURES = {
    "length": "length",
    "first_token": "first token",
    "ending": "ending (cut at the cap, so without end-of-turn token)",
    "template": "prompt template's own lines in a response",
    "repetition": "repetition",
}
CHECKS: Mapping[str, Check] = {
    "real_nll_rise": Check(
        "Real responses become less likely",
        _real_falls,
        "The loss only sees the difference of two log-ratios, and pushing the synthetic one down is the easier half.",
        "`training.nll_weight` (0.1 to 1) holds the real responses up; or `training.loss: noise_contrastive`, a lower "
        "`training.learning_rate`, a higher `training.beta`, fewer epochs.",
    ),
    "early_reward_accuracy": Check(
        "Told apart at once",
        _told_at_once,
        "Something cheap separates the two sides, so the iteration learns that, and not how people answer.",
        "Teach the model the data's format first (an `sft` stage), raise `generation.max_new_tokens` if responses are "
        "cut, check the prompt template; `training.length_normalised` where length is the shortcut.",
    ),
    "late_reward_accuracy": Check(
        "Not told apart",
        _not_told,
        "The opponent plays like the data as far as this model can tell (the fixed point of the paper's theory), or "
        "the learning rate is too low to learn anything.",
        "If more epochs or a higher `training.learning_rate` change nothing, stop here: further iterations add noise "
        "(`stop.min_discriminability` stops by itself).",
    ),
    "length_ratio": Check(
        "Lengths drift apart",
        _length,
        "The model rambles or stops early; with log-probs summed over tokens, length then decides much of the margin.",
        "`training.length_normalised`; an `sft` stage that teaches where to end; a higher `generation.max_new_tokens`.",
    ),
    "truncation_rate": Check(
        "Responses are cut",
        _truncation,
        "The cap is too low for this data, or the model doesn't end its responses.",
        "Raise `generation.max_new_tokens` (and `data.max_length`); if the model never ends, train it by SFT first.",
    ),
    "repetition_excess": Check(
        "The model repeats itself",
        _repetition,
        "Loops: a small or damaged model, or sampling that is too sharp.",
        "`generation.temperature: 1` with `top_p: 1`; if it grows from one iteration to the next, a lower "
        "`training.learning_rate`.",
    ),
    "diversity_ratio": Check(
        "The model says the same everywhere",
        _diversity,
        "Mode collapse: responses to different prompts share their phrases.",
        "Go back to an earlier iteration; lower `training.learning_rate`, raise `training.beta`.",
    ),
    "identical_share": Check(
        "Many responses are the real ones",
        _identical,
        "Short answers that the model knows, or data that it has memorised.",
        "More or other prompts, a higher `generation.temperature`, fewer SFT epochs; or stop: little is left to learn.",
    ),
    "grad_norm_ratio": Check(
        "Gradients jump",
        _gradient,
        "Single pairs with an outsized margin (very long or very unlikely responses), or a learning rate at its edge.",
        "Lower `training.max_grad_norm` or `training.learning_rate`; `training.length_normalised`.",
    ),
    "skipped_nonfinite": Check(
        "Steps were skipped",
        _skipped,
        "A response so long or so unlikely that its numbers overflow, half precision, or a learning rate at its edge.",
        "Look at the pairs that the run has named; train in float32, lower `training.learning_rate` or "
        "`training.beta`; `training.length_normalised`.",
    ),
    "drift": Check(
        "Far from where it started",
        _drift,
        "Too many steps, too high a learning rate or too low a beta: what the model knew beside this data may be lost.",
        "Prefer an earlier iteration; raise `training.beta`, lower `training.learning_rate`; `training.mixture`.",
    ),
}
"""By the name of the limit in the recipe's section `warnings`."""

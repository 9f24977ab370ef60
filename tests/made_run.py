"""Run directories made by hand: the same artifacts as a run's, with texts and numbers that a test decides.

What a run computes from others (measures from examples) is computed by the same code here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spinlm.config import recipe_from
from spinlm.evaluation.measures import HeldOutExample, SampledAnswer, measure
from spinlm.files import add_to_log, write_json, write_jsonl
from spinlm.rundir import TIMINGS, RunDir

VERSIONS = {"python": "3.12.0", "spinlm": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}


@dataclass(frozen=True)
class Made:
    """What a player makes of one held-out example.

    Attributes:
        text: Its sampled response.
        right: Whether that is right; None without a verifier.
        real_logprob: Its log-prob of the real response.
        tokens: The sampled response's length.
        truncated: Whether that was cut.
        margin: Of the real response over the opponent's fresh one.
        greedy: Its greedy response, where it gave one.
        greedy_right: Whether that is right.
        logprob: Its log-prob of its own response.
    """

    text: str = "an answer"
    right: bool | None = None
    real_logprob: float = -5.0
    tokens: int = 5
    truncated: bool = False
    margin: float | None = None
    greedy: str | None = None
    greedy_right: bool | None = None
    logprob: float = -4.0
    repetition: float = 0.0


@dataclass(frozen=True)
class MadeExample:
    """A held-out example."""

    id: str
    prompt: str = "a question"
    real: str = "the answer"
    tokens: int = 10


@dataclass
class MadeRun:
    """A run directory that is filled one artifact after another."""

    path: Path
    sections: Mapping[str, Any] = field(default_factory=dict)
    examples: Sequence[MadeExample] = ()

    def __post_init__(self) -> None:
        tree = {
            "run_dir": str(self.path),
            "iterations": 2,
            "model": {"name": "org/model"},
            "data": {"source": "d.jsonl"},
        }
        self.run = RunDir(self.path)
        self.run.begin(recipe_from({**tree, **self.sections}, where="here"), VERSIONS)

    def commit(self, key: str, stage: str, content: Any, **inputs: Any) -> None:
        """A JSON artifact, or where the content is a list, a JSONL one."""
        with self.run.artifact(key, stage, inputs).staging() as place:
            write = write_jsonl if isinstance(content, list) else write_json
            write(place, content)

    def data(self, examples: Sequence[MadeExample], train: int = 8) -> MadeRun:
        self.examples = examples
        held_out = [
            {
                "id": e.id,
                "prompt_ids": [1],
                "real_ids": [1] * e.tokens,
                "prompt": e.prompt,
                "real": e.real,
                "verifier": None,
            }
            for e in examples
        ]
        with self.run.artifact("data", "data", {"files": {"": "0" * 64}}).staging() as place:
            place.mkdir()
            write_jsonl(place / "train.jsonl", [{"id": f"t{i}"} for i in range(train)])
            write_jsonl(place / "held_out.jsonl", held_out)
            write_jsonl(place / "dropped.jsonl", [])
        return self

    def player(self, name: str, made: Sequence[Made]) -> MadeRun:
        """A player, measured on every held-out example."""
        folder = f"evaluation/{name}"
        self.commit(f"{folder}/sampled/00000.jsonl", "evaluate", [self._responses(e, m) for e, m in self._each(made)])
        if all(m.greedy is not None for m in made):
            rows = [self._responses(e, m, m.greedy) for e, m in self._each(made)]
            self.commit(f"{folder}/greedy/00000.jsonl", "evaluate", rows)
        judged = [self._judged(e, m, name) for e, m in self._each(made)]
        self.commit(f"{folder}/examples.jsonl", "evaluate", [asdict(example) for example in judged])
        measures = {measure: asdict(value) for measure, value in measure(judged).items()}
        self.commit(f"{folder}/measures.json", "evaluate", measures)
        return self

    def training(self, player: str, rows: Sequence[Mapping[str, float]]) -> MadeRun:
        folder = f"iterations/{player.removeprefix('iteration-')}" if player.startswith("iteration-") else player
        self.commit(f"{folder}/training.jsonl", "train", [dict(row) for row in rows])
        self.commit(f"{folder}/adapter", "train", {"weights": player})
        return self

    def generated(self, iteration: int) -> MadeRun:
        for kind, stage in (("synthetic", "generate"), ("opponent_logprobs", "score")):
            self.commit(f"iterations/{iteration}/{kind}/00000.jsonl", stage, [{"id": "t0"}])
        return self

    def diagnostics(self, iteration: int, values: Mapping[str, float], *warnings: Mapping[str, str]) -> MadeRun:
        content = {"values": dict(values), "warnings": [dict(warning) for warning in warnings]}
        self.commit(f"iterations/{iteration}/diagnostics.json", "diagnose", content)
        return self

    def stopped(self, iterations: int, reason: str) -> MadeRun:
        self.commit("stopped.json", "evaluate", {"iterations": iterations, "reason": reason})
        return self

    def took(self, what: str, seconds: float, tokens: int | None = None) -> MadeRun:
        row = {"what": what, "seconds": seconds} | ({} if tokens is None else {"tokens": tokens})
        add_to_log(self.path / TIMINGS, row)
        return self

    def _each(self, made: Sequence[Made]) -> list[tuple[MadeExample, Made]]:
        return list(zip(self.examples, made, strict=True))

    @staticmethod
    def _responses(example: MadeExample, made: Made, text: str | None = None) -> dict[str, Any]:
        response = {
            "token_ids": [1] * made.tokens,
            "text": made.text if text is None else text,
            "finish_reason": "length" if made.truncated else "stop",
            "logprob": made.logprob,
        }
        return {"id": example.id, "responses": [response]}

    @staticmethod
    def _judged(example: MadeExample, made: Made, name: str) -> HeldOutExample:
        start = made.logprob - 0.3 if name.startswith("iteration-") else None
        answer = SampledAnswer(made.tokens, made.truncated, made.repetition, made.logprob, start, made.right)
        margins = [] if made.margin is None else [made.margin]
        return HeldOutExample(example.id, made.real_logprob, example.tokens, [answer], made.greedy_right, margins)


WARNING = {
    "name": "real_logprob_falls",
    "title": "Real responses become less likely while the margin grows",
    "message": "The real responses' log-prob a token fell from -0.52 to -0.61 while the margin grew to 1.8.",
    "cause": "The player lowers both responses and the synthetic one faster: a learning rate or beta that is too high.",
    "remedy": "Lower training.learning_rate, or anchor the real response.",
}

_WORDS = [
    "river",
    "stone",
    "lantern",
    "copper",
    "orchard",
    "window",
    "harbour",
    "meadow",
    "ribbon",
    "thunder",
    "candle",
    "marble",
    "feather",
    "garden",
    "silver",
    "bridge",
    "planet",
    "saddle",
    "whisper",
    "velvet",
    "mirror",
    "canyon",
    "island",
    "timber",
    "pocket",
    "winter",
    "bottle",
    "forest",
    "letter",
    "needle",
    "basket",
    "engine",
]


def plausible(
    path: Path, examples: int = 48, iterations: int = 3, words: int = 24, seed: int = 0, steps: int = 60
) -> MadeRun:
    """A whole run with made-up numbers as they could be: to be looked at, not to be believed."""
    draw = random.Random(seed)
    sections = {
        "iterations": iterations,
        "sft": {"num_train_epochs": 1.0},
        "evaluation": {"control": True},
    }
    made = MadeRun(path, sections)
    made.data([_example(draw, number, words) for number in range(examples)])
    skills = {
        "base": 0.05,
        "sft": 0.45,
        **{f"iteration-{t}": 0.6 + 0.08 * min(t, 1) for t in range(iterations)},
        "control": 0.5,
    }
    for name, skill in skills.items():
        _train(made, name, draw, steps)
        made.player(name, [_made(draw, example, name, skill) for example in made.examples])
        made.took(f"evaluation/{name}/sampled", 20 + 5 * draw.random(), examples * words)
    made.diagnostics(iterations - 1, {"reward_accuracy": 0.97, "drift": 0.08, "grad_norm": 1.4}, WARNING)
    return made


def _example(draw: random.Random, number: int, words: int) -> MadeExample:
    chosen = draw.choices(_WORDS, k=max(2, round(words * draw.uniform(0.5, 1.5))))
    prompt = f"Reverse this list of words: {', '.join(chosen)}"
    return MadeExample(f"words:{number}", prompt, ", ".join(reversed(chosen)), len(chosen) * 2)


def _made(draw: random.Random, example: MadeExample, name: str, skill: float) -> Made:
    texts, rights = [], []
    for _ in range(2):
        words = example.real.split(", ")
        right = draw.random() < skill
        for _ in range(0 if right else draw.randint(1, 1 + len(words) // 6)):
            words[draw.randrange(len(words))] = draw.choice(_WORDS)
        text = ", ".join(words)
        texts.append(text)
        rights.append(text == example.real)
    nll = 2.4 - 2.0 * skill + draw.gauss(0, 0.12)
    tokens = max(1, round(example.tokens * draw.uniform(0.8, 1.3)))
    return Made(
        text=texts[0],
        right=rights[0],
        real_logprob=-nll * example.tokens,
        tokens=tokens,
        truncated=draw.random() > 0.7 + 0.3 * skill,
        margin=draw.gauss(0.6, 0.5) if name.startswith("iteration-") else None,
        greedy=texts[1],
        greedy_right=rights[1],
        logprob=-tokens * (0.9 + draw.gauss(0, 0.15)),
        repetition=max(0.0, draw.gauss(0.05 - 0.04 * skill, 0.02)),
    )


def _train(made: MadeRun, name: str, draw: random.Random, steps: int) -> None:
    if name == "base":
        return
    if not name.startswith("iteration-"):
        rows = [
            {"step": s, "loss": 2.2 * 0.97**s + 0.5 + draw.gauss(0, 0.05), "learning_rate": 1e-4}
            for s in range(1, steps + 1)
        ]
        made.training(name, rows).took(name, 95.0)
        return
    iteration = int(name.removeprefix("iteration-"))
    made.generated(iteration).took(f"iterations/{iteration}/synthetic", 64.2, 9800)
    made.took(f"iterations/{iteration}/opponent_logprobs", 12.5, 21000)
    rows = [{"step": 0, "start_loss": 0.6931, "start_margin": 0.0}]
    for s in range(1, steps + 1):
        margin = 0.9 * (1 - 0.96**s) + draw.gauss(0, 0.05)
        rows.append(
            {
                "step": s,
                "loss": 0.693 - 0.32 * (1 - 0.96**s) + draw.gauss(0, 0.02),
                "margin": margin,
                "reward_accuracy": min(1.0, max(0.0, 0.5 + 0.42 * (1 - 0.95**s) + draw.gauss(0, 0.06))),
                "logprob_per_token_real": -0.55 + 0.002 * s + draw.gauss(0, 0.02),
                "logprob_per_token_synthetic": -0.9 - 0.008 * s + draw.gauss(0, 0.04),
                "length_real": 44 + draw.gauss(0, 3),
                "length_synthetic": 49 + draw.gauss(0, 4),
                "grad_norm": 1.2 + draw.gauss(0, 0.2),
                "learning_rate": 5e-5 * (1 - s / steps),
                "tokens": 900.0,
            }
        )
    made.training(name, rows).took(f"iterations/{iteration}", 210.4)

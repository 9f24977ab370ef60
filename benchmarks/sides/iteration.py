"""One whole iteration, from files to a trained adapter: spinlm's stages, and the official scripts' way."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from benchmarks import models
from benchmarks.inputs import instructions
from benchmarks.record import Turn
from benchmarks.settings import Sizes
from benchmarks.sides.generation import OFFICIAL_BATCH, TransformersGeneration
from benchmarks.sides.training import dpo_training
from spinlm.api import opened
from spinlm.config import Recipe, recipe_from
from spinlm.data.pairs import Pair
from spinlm.selfplay import train_alone


def write_data(path: Path, count: int) -> None:
    """Instructions and answers, one a line."""
    rows = [{"prompt": prompt, "response": response} for prompt, response in instructions(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class SpinlmIteration:
    """Data, generate, score, train, commit, by the stages that `spinlm run` goes through; nothing is evaluated."""

    name = "spinlm"

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes

    def turn(self) -> Turn:
        with TemporaryDirectory(prefix="spinlm-bench-") as place:
            write_data(Path(place) / "data.jsonl", self._sizes.iteration_pairs)
            recipe = self._recipe(Path(place))
            started = time.perf_counter()
            with opened(recipe, console=Console(file=io.StringIO())) as stages:
                train_alone(stages, 0)
            seconds = time.perf_counter() - started
            timings = [json.loads(line) for line in (Path(recipe.run_dir) / "timings.jsonl").read_text().splitlines()]
            history = (Path(recipe.run_dir) / "iterations/0/training.jsonl").read_text().splitlines()
        detail = {"stages": {timing["what"]: timing["seconds"] for timing in timings}}
        steps = int(json.loads(history[-1])["step"])
        return Turn(self.name, seconds, 1, detail | {"steps": steps})

    def _recipe(self, place: Path) -> Recipe:
        sizes = self._sizes
        tree = {
            "run_dir": str(place / "run"),
            "iterations": 1,
            "model": {"name": str(models.smollm2().resolve()), "dtype": "float32", "device": "cpu"},
            "adapter": {"r": models.RANK, "lora_alpha": 2 * models.RANK},
            "data": {"source": str(place / "data.jsonl"), "held_out": 0},
            "generation": {"max_new_tokens": sizes.iteration_new_tokens},
            "training": {
                "num_train_epochs": float(sizes.iteration_epochs),
                "per_device_train_batch_size": sizes.optimiser_batch,
                "gradient_accumulation_steps": 1,
            },
        }
        return recipe_from(tree, where="the benchmark's recipe")


class OfficialIteration:
    """generate in batches of 16 as the prompts come -> a JSON file -> DPOTrainer with LoRA, TRL's defaults.

    The official repository's shape on today's libraries; each of its two scripts loads the model.
    """

    name = "official shape"

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes

    def turn(self) -> Turn:
        with TemporaryDirectory(prefix="spinlm-bench-") as place:
            data, generated = Path(place) / "data.jsonl", Path(place) / "generated.json"
            write_data(data, self._sizes.iteration_pairs)
            started = time.perf_counter()
            self._generate(data, generated)
            between = time.perf_counter()
            steps = self._train(generated, Path(place) / "adapter")
            ended = time.perf_counter()
        stages = {"generate": between - started, "train": ended - between}
        return Turn(self.name, ended - started, 1, {"stages": stages, "steps": steps})

    def _generate(self, data: Path, generated: Path) -> None:
        model = models.load_model(models.SMOLLM2)
        renderer = models.renderer(model)
        rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
        turns: list[list[Any]] = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        prompts = [renderer.prompt_ids(messages) for messages in turns]
        side = TransformersGeneration(model, renderer, prompts, self._sizes.iteration_new_tokens, batch=OFFICIAL_BATCH)
        side.turn()
        real = [renderer.response_ids(messages, row["response"]) for messages, row in zip(turns, rows, strict=True)]
        together = zip(prompts, real, side.answers, strict=True)
        pairs = [{"prompt": p, "real": r, "generated": s} for p, r, s in together]
        generated.write_text(json.dumps(pairs), encoding="utf-8")

    def _train(self, generated: Path, adapter: Path) -> int:
        rows = json.loads(generated.read_text(encoding="utf-8"))
        pairs = [Pair(row["prompt"], row["real"], row["generated"], 0.0, 0.0) for row in rows]
        training = dpo_training(
            models.load_model(models.SMOLLM2),
            pairs,
            self._sizes.optimiser_batch,
            num_train_epochs=self._sizes.iteration_epochs,
        )
        training.turn()
        training.trainer.model.save_pretrained(adapter)
        return int(training.trainer.state.global_step)

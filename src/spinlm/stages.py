"""The stages of a run. Each looks for its committed artifact first, and makes it only where it is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from spinlm import interruption
from spinlm.config import SFTSection, at
from spinlm.data.pairs import Pair, drop_identical
from spinlm.errors import UserError
from spinlm.evaluation.diagnostics import Said, TrainingFacts, of_held_out, of_pairs, of_training, warnings
from spinlm.evaluation.measures import (
    HeldOutExample,
    chosen_measure,
    measure,
    select_best,
)
from spinlm.evaluation.stopping import reason_to_stop
from spinlm.files import copy, digest, write_json, write_jsonl
from spinlm.generation.engine import Request, Sampling, request_seed
from spinlm.players.logprobs import Method
from spinlm.players.models import Player
from spinlm.reporting.summary import iteration_of, summarise
from spinlm.reporting.training_log import folder_of
from spinlm.results import (
    Answers,
    Evaluation,
    ScoredPairs,
    Scores,
    held_out_examples,
    held_out_margins,
    mixed,
    mixture_weights,
    regenerated,
)
from spinlm.rundir import STOPPED, Artifact, Inputs, reading
from spinlm.training.checkpoints import Arguments
from spinlm.training.losses import Objective
from spinlm.training.regeneration import RegeneratingTrainer
from spinlm.training.sft import SFTTrainer
from spinlm.training.spin_trainer import SPINConfig, SPINTrainer
from spinlm.workshop import Workshop


class Stages(Workshop):
    """The stages of one run, over one recipe, run directory and set of players."""

    # --- players ---

    @cached_property
    def base(self) -> Player:
        return self.players.base_player()

    def starting_player(self) -> Player:
        """The SFT model, where the recipe has such a stage; else the base model."""
        section = self.recipe.sft
        return self.base if section is None else self._supervised("sft", self.base, section, section.max_steps)

    def opponent_of(self, iteration: int) -> Player:
        """Who an iteration starts from: the committed main player of the one before."""
        if iteration == 0:
            return self.starting_player()
        key = self._weights_key(f"iterations/{iteration - 1}")
        if not self.is_trained(iteration - 1):
            raise UserError(f"iteration {iteration - 1} isn't trained yet: run spinlm train first")
        return self._committed(f"iteration-{iteration - 1}", key)

    def trained_players(self) -> dict[str, str]:
        """Where the weights of each player are that this run has trained, by name, in the order of play."""
        names = ["sft", *(f"iteration-{t}" for t in range(self.recipe.iterations)), "control"]
        keys = {name: self._weights_key(folder_of(name)) for name in names}
        return {name: key for name, key in keys.items() if self.run.has_record(key)}

    def player(self, name: str) -> Player:
        """A player by its name, as it is committed.

        Raises:
            UserError: It isn't there, or was trained from another base model than is there now.
        """
        keys = self.trained_players()
        first = keys.get("iteration-0" if self.recipe.sft is None else "sft")
        if first is not None and self.run.record(first)["inputs"]["start"] != self.base.hash:
            raise UserError(
                f"model.name: {self.recipe.model.name} isn't the base that {self.run.path} was trained from: put that "
                "one back"
            )
        if name == "base":
            return self.base
        if name not in keys:
            there = ", ".join(["base", *keys])
            raise UserError(f"{self.run.path}: {name} isn't trained yet: run spinlm run first; there are: {there}")
        return self._committed(name, keys[name])

    def _committed(self, name: str, key: str) -> Player:
        self.run.verify(key)
        return Player(name, self.run.path / key, self.run.hash(key))

    def is_generated(self, iteration: int) -> bool:
        """Whether every shard of an iteration's responses is committed."""
        count = -(-len(self.played) // self.recipe.generation.shard_size)
        folder = f"iterations/{iteration}/synthetic"
        return all(self.run.has_record(f"{folder}/{number:05d}.jsonl") for number in range(count))

    def is_trained(self, iteration: int) -> bool:
        """Whether an iteration's main player is committed."""
        return self.run.has_record(self._weights_key(f"iterations/{iteration}"))

    def has_control(self) -> bool:
        """Whether the control is committed."""
        return self.run.has_record(self._weights_key("control"))

    def control(self, start: Player) -> Player:
        """The starting model, trained on by SFT for as many steps as self-play took."""
        assert self.recipe.sft is not None
        trained = takewhile(self.is_trained, range(self.recipe.iterations))
        steps = sum(self._steps_taken(iteration) for iteration in trained)
        return self._supervised("control", start, self.recipe.sft, max_steps=steps)

    def _supervised(self, name: str, start: Player, section: SFTSection, max_steps: int) -> Player:
        examples = self.data.train
        settings = section.model_dump(mode="json") | {"max_steps": max_steps}
        inputs = self._inputs("seed", "adapter", settings=settings, start=start.hash, data=self._data_hash)

        def make_trainer(model: Any, directory: Path, method: Method) -> Any:
            args = self._training_arguments(
                Arguments,
                section,
                name,
                directory,
                max_steps=max_steps,
                learning_rate=section.learning_rate,
                num_train_epochs=section.num_train_epochs,
            )
            return SFTTrainer(model, args, examples, self.renderer.pad_id, method, self._tokens_per_pass(training=True))

        return self._train(name, name, name, start, inputs, make_trainer)

    # --- one iteration ---

    def generate(self, iteration: int, opponent: Player) -> Answers:
        """The opponent answers every prompt."""
        k = self.recipe.generation.responses_per_prompt
        sampling = Sampling.of(self.recipe.generation)
        folder = f"iterations/{iteration}/synthetic"
        return self._answers(folder, f"iteration {iteration}: generate", opponent, self.played, sampling, k)

    def score(
        self, iteration: int, opponent: Player, synthetic: Mapping[int, Answers], initial: Answers | None = None
    ) -> ScoredPairs:
        """The opponent's log-probs of the real responses and of this and the replayed iterations' synthetic ones.

        Args:
            iteration: Which one.
            opponent: Its opponent.
            synthetic: The responses by the iteration they come from.
            initial: The starting player's, for the triplet loss.
        """
        others = {str(source): synthetic[source] for source in sorted(synthetic, reverse=True)}
        folder, title = f"iterations/{iteration}/opponent_logprobs", f"iteration {iteration}: score"
        scores = self._scores(folder, title, opponent, self.played, others)
        reference = self._reference(iteration, scores, others)
        pairs = [
            Pair(
                prompt_ids=example.prompt_ids,
                real_ids=example.real_ids,
                synthetic_ids=response.token_ids,
                opponent_real_logprob=scores.real[place],
                opponent_synthetic_logprob=scores.others[source][place][number],
                synthetic_truncated=response.finish_reason == "length",
                reference_real_logprob=reference.real[place],
                reference_synthetic_logprob=reference.others[source][place][number],
                initial_ids=None if initial is None else initial[place][number].token_ids,
                id=f"{example.id} (iteration {source}, response {number})",
            )
            for source, answers in others.items()
            for place, example in enumerate(self.played)
            for number, response in enumerate(answers[place])
        ]
        read = [*others.values(), *([] if initial is None else [initial])]
        name = digest([reference.hash, [answers.hash for answers in read]])
        is_of_margins = Objective(**self.recipe.training.objective()).is_of_margins
        return ScoredPairs(*(drop_identical(pairs) if is_of_margins else (pairs, 0)), name)

    def _reference(self, iteration: int, scores: Scores, others: Mapping[str, Answers]) -> Scores:
        """What log-probs are measured against: the opponent's, or the recipe's mixture of this and past opponents'."""
        weights = mixture_weights(self.recipe.training.mixture, iteration)
        parts = {iteration: scores}
        for past in [past for past in weights if past != iteration]:
            folder, title = f"iterations/{iteration}/mixture/{past}", f"iteration {iteration}: score (opponent {past})"
            parts[past] = self._scores(folder, title, self.opponent_of(past), self.played, others)
        return mixed([parts[past] for past in weights], list(weights.values()))

    def train(self, iteration: int, opponent: Player, scored: ScoredPairs) -> Player:
        """The main player, from the opponent's weights."""
        section = self.recipe.training
        beta, learning_rate = at(section.beta, iteration), at(section.learning_rate or 0.0, iteration)
        epochs = at(section.num_train_epochs, iteration)
        folder = f"iterations/{iteration}"
        settings = section.model_dump(mode="json") | {
            "beta": beta,
            "learning_rate": learning_rate,
            "num_train_epochs": epochs,
        }
        inputs = self._inputs("seed", "adapter", settings=settings, start=opponent.hash, pairs=scored.hash)
        if not scored.pairs:
            raise UserError(
                f"iteration {iteration}: every synthetic response equals the real one, so there is nothing left to "
                "learn: the opponent already plays like the data"
            )

        def make_trainer(model: Any, directory: Path, method: Method) -> Any:
            args = self._training_arguments(
                SPINConfig,
                section,
                folder,
                directory,
                beta=beta,
                learning_rate=learning_rate,
                num_train_epochs=epochs,
                tokens_per_pass=self.recipe.tokens_per_pass,
                skip_nonfinite=section.skip_nonfinite,
                **section.objective(),
            )
            trainer = self._spin_trainer(folder, inputs, model, args, scored.pairs, self.renderer.pad_id, method)
            trainer.dropped_identical = scored.identical
            return trainer

        name, title = f"iteration-{iteration}", f"iteration {iteration}: train"
        if self.recipe.keep == "last":
            return self._train(folder, name, title, opponent, inputs, make_trainer)
        inputs |= {"keep": "best", "measure": self.chosen_measure, "held_out": self._data_hash}
        weights = self.run.artifact(self._weights_key(folder), "train", inputs)
        kept = self.run.artifact(f"{folder}/kept.json", "train", inputs)
        log = self.run.artifact(f"{folder}/training.jsonl", "train", inputs)
        with self.processes.main_process_first():  # which copies them, in a forked run
            missing = [artifact for artifact in (log, kept, weights) if self._needs_making(artifact)]
        if missing:
            last = self._train(folder, name, title, opponent, inputs, make_trainer, f"{folder}/candidates")
            self._commit_best(folder, title, last, kept, weights)
        self._forget(f"{folder}/candidates/", f"{folder}/choosing/")
        return Player(name, weights.path, weights.hash)

    def _commit_best(self, folder: str, title: str, last: Player, kept: Artifact, weights: Artifact) -> None:
        """Of the weights at each checkpoint and at the end, those that are best on the held-out part."""
        earlier = self._candidates(f"{folder}/candidates", weights.inputs, before=self._last_step(folder))
        players = {a.path.name: Player(a.path.name, a.path, a.hash) for a in earlier} | {"last": last}
        place = f"{folder}/choosing"
        for checkpoint, player in players.items():  # all answers first: an engine is started once
            self._answer_candidate(f"{place}/{checkpoint}", f"{title} (checkpoint {checkpoint})", player)
        measures = {
            checkpoint: self._measure_candidate(f"{place}/{checkpoint}", f"{title} (checkpoint {checkpoint})", player)
            for checkpoint, player in players.items()
        }
        best = select_best(measures, self.chosen_measure)
        values = {checkpoint: measured[self.chosen_measure] for checkpoint, measured in measures.items()}
        self.progress.say(f"{title}: kept checkpoint {best} by {self.chosen_measure}")
        if self.processes.is_main_process:
            with kept.staging() as staged:
                write_json(staged, {"checkpoint": best, "measure": self.chosen_measure, "values": values})
            with weights.staging() as staged:
                copy(self.run.path / f"{folder}/candidates/{best}", staged)
        self.processes.wait_for_everyone()

    def _answer_candidate(self, folder: str, title: str, player: Player) -> tuple[Answers, Answers | None]:
        """The responses that the measure which chooses is of: sampled ones, greedy ones, or none."""
        nothing = Answers([[] for _ in self.data.held_out], "")
        if self.chosen_measure == "real_nll":
            return nothing, None
        if self.chosen_measure == "accuracy_greedy":
            return nothing, self._greedy(folder, title, player)
        return self._sampled(folder, title, player), None

    def _measure_candidate(self, folder: str, title: str, player: Player) -> dict[str, dict[str, Any]]:
        sampled, greedy = self._answer_candidate(folder, title, player)
        scores = self._scores(f"{folder}/logprobs", title, player, self.data.held_out, {"own": sampled})
        measured = measure(held_out_examples(self.data.held_out, sampled, greedy, scores))
        return {name: asdict(value) for name, value in measured.items()}

    def _forget(self, *beginnings: str) -> None:
        """What has served."""
        if self.processes.is_main_process:
            for beginning in beginnings:
                for key in self.run.keys(beginning):
                    self.run.forget(key)
                shutil.rmtree(self.run.path / beginning, ignore_errors=True)

    def _spin_trainer(
        self, folder: str, inputs: Inputs, model: Any, args: SPINConfig, pairs: list[Pair], pad_id: int, method: Method
    ) -> SPINTrainer:
        every = self.recipe.training.regenerate_every
        if every is None:
            return SPINTrainer(model, args, pairs, pad_id=pad_id, method=method)
        sampling = Sampling.of(self.recipe.generation)

        def answer(model: Any, number: int, pairs: Sequence[Pair]) -> list[Pair]:
            seed, engine = self.recipe.seed, self._transformers_engine(model)
            requests = [Request(p.prompt_ids, request_seed(seed, folder, number, i)) for i, p in enumerate(pairs)]
            responses = engine.generate(requests, sampling, lambda *_: interruption.check())
            return [regenerated(pair, response, number) for pair, response in zip(pairs, responses, strict=True)]

        def keep(number: int, make: Callable[[], list[Pair]]) -> list[Pair]:
            artifact = self.run.artifact(f"{folder}/rounds/{number:05d}.jsonl", "train", {**inputs, "round": number})
            if self._needs_making(artifact):
                rows = [asdict(pair) for pair in make()]
                with artifact.staging() as place:
                    write_jsonl(place, rows)
            return self._committed_rows(Pair, artifact.key)

        return RegeneratingTrainer(
            model, args, pairs, pad_id=pad_id, method=method, every=every, answer=answer, keep=keep
        )

    def _steps_taken(self, iteration: int) -> int:
        """Optimiser steps of an iteration's training."""
        return self._last_step(f"iterations/{iteration}")

    # --- evaluation ---

    @property
    def chosen_measure(self) -> str:
        """The measure that chooses the best, of checkpoints and of iterations."""
        has_verifier = any(example.verifier is not None for example in self.data.held_out)
        return chosen_measure(self.recipe.evaluation.select_by, ["accuracy_sampled"] if has_verifier else [])

    def answer(self, player: Player) -> tuple[Answers, Answers | None]:
        """A player's responses on the held-out part: sampled, and greedy where the recipe wants them."""
        folder, title = f"evaluation/{player.name}", f"{player.name}: evaluate"
        sampled = self._sampled(folder, title, player)
        return sampled, self._greedy(folder, title, player) if self.recipe.evaluation.greedy else None

    def _sampled(self, folder: str, title: str, player: Player) -> Answers:
        sampling, k = Sampling.of(self.recipe.generation), self.recipe.evaluation.samples_per_prompt
        return self._answers(f"{folder}/sampled", f"{title} (sampled)", player, self.data.held_out, sampling, k)

    def _greedy(self, folder: str, title: str, player: Player) -> Answers:
        sampling = Sampling.of(self.recipe.generation, greedy=True)
        return self._answers(f"{folder}/greedy", f"{title} (greedy)", player, self.data.held_out, sampling, 1)

    def evaluate(self, player: Player, opponent: Evaluation | None = None, beta: float = 1.0) -> Evaluation:
        """Measure a player on the held-out part; a main player also against its opponent's fresh responses."""
        folder, title, held_out = f"evaluation/{player.name}", f"{player.name}: evaluate", self.data.held_out
        sampled, greedy = self.answer(player)
        others = {} if opponent is None else {"opponent": opponent.sampled}
        scores = self._scores(f"{folder}/logprobs", f"{title} (log-probs)", player, held_out, {"own": sampled} | others)
        per_token = self.recipe.training.length_normalised
        start_scores = None
        if opponent is not None:
            start, own = self.starting_player(), {"own": sampled}
            start_scores = self._scores(f"{folder}/start_logprobs", f"{title} (drift)", start, held_out, own)
        scored = [scores, None if opponent is None else opponent.scores, start_scores]
        inputs = {
            "answers": [answers.hash for answers in (sampled, greedy) if answers is not None],
            "scores": [None if part is None else part.hash for part in scored],
            "beta": beta,
            "length_normalised": per_token,
        }
        rows = self.run.artifact(f"{folder}/examples.jsonl", "evaluate", inputs)
        measures = self.run.artifact(f"{folder}/measures.json", "evaluate", inputs)
        if self.processes.is_main_process and (self._needs_making(rows) or self._needs_making(measures)):
            margins = None if opponent is None else held_out_margins(held_out, opponent, scores, beta, per_token)
            examples = held_out_examples(held_out, sampled, greedy, scores, start_scores, margins)
            with rows.staging() as place:
                write_jsonl(place, [asdict(example) for example in examples])
            with measures.staging() as place:
                write_json(place, {name: asdict(value) for name, value in measure(examples).items()})
            self.page.update(now=True)
        self.processes.wait_for_everyone()
        examples = self._committed_rows(HeldOutExample, rows.key)
        return Evaluation(player, sampled, greedy, scores, examples, self.run.committed_json(measures.key))

    def diagnose(self, iteration: int, answers: Answers, player: Evaluation, opponent: Evaluation) -> None:
        """What an iteration's pairs, its training and its held-out examples say, kept and, where it is amiss, shown."""
        folder = f"iterations/{iteration}"
        inputs = {
            "answers": answers.hash,
            "training": self.run.hash(f"{folder}/training.jsonl"),
            "examples": [self.run.hash(f"evaluation/{e.player.name}/examples.jsonl") for e in (opponent, player)],
            "limits": self.recipe.warnings.model_dump(),
        }
        artifact = self.run.artifact(f"{folder}/diagnostics.json", "evaluate", inputs)
        if not self.processes.is_main_process or not self._needs_making(artifact):
            return
        groups, identical = self._said(answers)
        values = of_pairs(groups, identical, self.renderer.markers())
        log = self.run.committed_rows(f"{folder}/training.jsonl")
        values |= of_training(log, self._training_facts(iteration))
        values |= of_held_out(player.examples, opponent.examples)
        warned = warnings(values, self.recipe.warnings)
        with artifact.staging() as place:
            write_json(place, {"values": values, "warnings": [asdict(one) for one in warned]})
        self.page.update(now=True)
        for one in warned:
            self.progress.say(f"warning, iteration {iteration}: {one.title}. {one.message} What helps: {one.remedy}")

    def point(self) -> None:
        """Let `latest` and `best` point to the main players that are so by now."""
        if self.processes.is_main_process:
            latest = len(list(takewhile(self.is_trained, range(self.recipe.iterations)))) - 1
            with reading(self.run.path):
                best = summarise(self.run).best
            for name, iteration in (("latest", latest), ("best", latest if best is None else iteration_of(best))):
                self.run.point(name, self._weights_key(f"iterations/{iteration}"))

    def _training_facts(self, iteration: int) -> TrainingFacts:
        section = self.recipe.training
        return TrainingFacts(
            beta=at(section.beta, iteration),
            length_normalised=section.length_normalised,
            has_reference=section.loss != "triplet",
            max_grad_norm=section.max_grad_norm,
            round_steps=section.regenerate_every,
        )

    def _said(self, answers: Answers) -> tuple[list[tuple[Said, list[Said]]], int]:
        """Each real response with the synthetic ones that differ from it, and how many don't."""
        text = self.renderer.text_with_specials
        groups, identical = [], 0
        for example, responses in zip(self.played, answers.responses, strict=True):
            differing = [response for response in responses if response.token_ids != example.real_ids]
            synthetic = [Said(r.token_ids, r.finish_reason == "length", text(r.token_ids)) for r in differing]
            groups.append((Said(example.real_ids, False, text(example.real_ids)), synthetic))
            identical += len(responses) - len(differing)
        return groups, identical

    def reason_to_stop(self, evaluations: Sequence[Evaluation]) -> str | None:
        """Why there should be no further iteration after the one that was evaluated last, if so."""
        start = 0 if self.recipe.sft is None else 1
        return reason_to_stop(self.recipe.stop, [e.examples for e in evaluations[start:]], self.chosen_measure)

    def stop(self, iterations: int, reason: str) -> None:
        """Put down that the run ends after so many iterations, and why."""
        self.progress.say(f"stopped after {iterations} iterations: {reason}")
        artifact = self.run.artifact(STOPPED, "evaluate", {"iterations": iterations, "reason": reason})
        if self.processes.is_main_process and not artifact.is_committed():
            with artifact.staging() as place:
                write_json(place, {"iterations": iterations, "reason": reason})

    def forget_stop(self) -> None:
        """What stopped the run once doesn't any more."""
        if self.processes.is_main_process and self.run.has_record(STOPPED):
            self.run.forget(STOPPED)

"""What the stages of a run share: its data, its players and engine, and how anything is made once and committed."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from pydantic import TypeAdapter, ValidationError
from transformers.integrations import WandbCallback, get_reporting_integration_callbacks

from spinlm import interruption
from spinlm.config import DataSection, Recipe, SFTSection, TrainingSection
from spinlm.data.examples import Dropped
from spinlm.data.formats import load_examples
from spinlm.data.pairs import Group
from spinlm.data.prepare import Split, TokenizedExample, prepare
from spinlm.data.render import Renderer
from spinlm.data.sources import commit_of, files_in, local
from spinlm.errors import UserError
from spinlm.files import (
    add_to_log,
    canonical,
    digest,
    file_hash,
    file_hashes,
    make_directory,
    read_json,
    remove,
    sealed,
    unsealed,
    write_json,
    write_jsonl,
)
from spinlm.generation.choice import EngineName, choose
from spinlm.generation.engine import Engine, OnProgress, Request, Response, Sampling, request_seed
from spinlm.generation.transformers_engine import TransformersEngine
from spinlm.generation.vllm_engine import VLLMEngine
from spinlm.hardware import enough_memory
from spinlm.players.layouts import LAYOUTS, count_tokens, tokens_per_pass
from spinlm.players.logprobs import Method, choose_method, score_groups
from spinlm.players.models import Player, Players, check_vocabulary, context_length
from spinlm.reporting.html import LivePage
from spinlm.reporting.progress import Progress
from spinlm.results import Answers, Scores
from spinlm.rundir import ORIGIN, TIMINGS, TRACKERS, Artifact, CorruptArtifact, Inputs, RunDir, reading, refuse_way_out
from spinlm.training.checkpoints import Arguments, EachCheckpoint, last_checkpoint, step_of, train_resumably

COMMANDS = {"data": "generate", "sft": "generate", "score": "train", "control": "run"}
"""The command that runs a stage, where it isn't called after it."""


@dataclass(frozen=True)
class _Answered:
    """A row of a shard of responses."""

    id: str
    responses: list[Response]


@dataclass(frozen=True)
class _Scored:
    """A row of a shard of log-probs."""

    id: str
    real: float
    others: dict[str, list[float]]


Read = TypeVar("Read")
Row = TypeVar("Row", _Answered, _Scored)


class Workshop:
    """One recipe, one run directory, one set of players; every stage looks for its committed artifact first."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDir,
        progress: Progress,
        only: Collection[str] | None = None,
        repair: bool = False,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            recipe: What to do.
            run: Where.
            progress: What to show.
            only: The stages that may make something; what the others make must be there. None: all.
            repair: Make anew what was made from inputs that have changed since.
        """
        self._only = only
        self._repair = repair
        self.recipe = recipe
        self.run = run
        self.progress = progress
        run.say = progress.say
        self.processes = PartialState()
        self.page = LivePage(run, progress.say, writes=self.processes.is_main_process)
        self._precision = recipe.training.precision
        commit = self._recorded_commit("model", "model")
        self.players = Players(recipe.model, recipe.adapter, self._precision, commit)
        self._chosen_method: Method | None = None
        self._vllm: VLLMEngine | None = None
        self._check_trainer_settings()
        self._engine_name = self._choose_engine()

    def close(self) -> None:
        """Give back the memory of an engine that holds a model of its own."""
        if self._vllm is not None:
            self._vllm.close()
        self._vllm = None

    # --- data ---

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self.players.tokenizer, self.recipe.prompt, self.players.stop_ids())

    @cached_property
    def data(self) -> Split:
        """The dataset, tokenised and split; read from the run directory once it is there."""
        source = local(self.recipe.data)
        files = _dataset_hashes(source) if source else None
        artifact = self.run.artifact("data", "data", self._inputs("data", "prompt", "model", "seed", files=files))
        check_context(self.recipe, context_length(self.players.config))
        if self.processes.is_main_process and self._needs_making(artifact):
            dataset = self.dataset
            recipe = self.recipe.model_copy(update={"data": dataset})
            split = prepare_data(recipe, self.players, self.renderer)
            with self.timed("data"), artifact.staging() as place:
                place.mkdir()
                for part in ("train", "held_out", "dropped"):
                    write_jsonl(place / f"{part}.jsonl", [asdict(row) for row in getattr(split, part)])
                origin = {"model": self.players.commit, "dataset": commit_of(dataset)}
                if any(origin.values()):
                    write_json(place / ORIGIN, origin)
        self.processes.wait_for_everyone()
        split = Split(
            train=self._committed_rows(TokenizedExample, "data", "train.jsonl"),
            held_out=self._committed_rows(TokenizedExample, "data", "held_out.jsonl"),
            dropped=self._committed_rows(Dropped, "data", "dropped.jsonl"),
        )
        _check_measure(self.recipe, split)  # again: a forked run measures the same data by another recipe
        self._say_data(split)
        self._data_hash = artifact.hash
        return split

    @property
    def dataset(self) -> DataSection:
        """The recipe's, at the commit on the hub that it has been read at, where it has."""
        commit = self._recorded_commit("data", "dataset")
        return self.recipe.data.model_copy(update={"revision": commit}) if commit else self.recipe.data

    def _recorded_commit(self, section: str, what: str) -> str | None:
        """Of this run's model or dataset, or of the forked run's, where this section of the recipe was the same."""
        run = self.run if self.run.has_record("data") else self.run.forked_from
        if run is None or not run.has_record("data"):
            return None
        with suppress(CorruptArtifact):  # which is said when the data is asked for
            if run.record("data")["inputs"].get(section) == canonical(self._inputs(section)[section]):
                return run.origin().get(what)
        return None

    @property
    def played(self) -> list[TokenizedExample]:
        """The training examples whose prompts the opponents answer."""
        return self.data.train[: self.recipe.generation.max_prompts]

    def _say_data(self, split: Split) -> None:
        dropped = "".join(f"; dropped {count}: {reason}" for reason, count in split.drop_counts().items())
        measured = "" if split.held_out else ", so nothing will be measured (data.held_out)"
        self.progress.say(
            f"data: {len(split.train)} examples to train on, {len(split.held_out)} held out{measured}{dropped}"
        )

    def _committed_rows(self, kind: type[Read], key: str, name: str = "") -> list[Read]:
        """The rows of a committed file as what they were written from; see `RunDir.committed_rows`.

        Raises:
            UserError: They are something else, though their record fits.
        """
        return self._read(kind, self.run.committed_rows(key, name), f"{key}/{name}".rstrip("/"))

    def _read(self, kind: type[Read], rows: list[Any], key: str) -> list[Read]:
        reader: TypeAdapter[list[Read]] = TypeAdapter(list[kind])  # type: ignore[valid-type]
        try:
            return reader.validate_python(rows)
        except ValidationError as error:
            first = error.errors()[0]
        (row, *keys), what = first["loc"], first["msg"]
        where = f"{self.run.path / key}[{row}]{': ' if keys else ''}{'.'.join(map(str, keys))}"
        raise UserError(f"{where}: holds something that no run writes: {what}")

    def _check_rows(self, folder: str, all_fit: bool) -> None:
        if not all_fit:
            raise UserError(f"{self.run.path / folder}: holds something that no run writes: too many rows, or too few")

    # --- answers and scores ---

    def answer_prompts(self, folder: str, title: str, player: Player, prompts: Sequence[TokenizedExample]) -> Answers:
        """A player's response to each of other prompts than the data's: greedy, where the recipe wants greedy ones."""
        sampling = Sampling.of(self.recipe.generation, greedy=self.recipe.evaluation.greedy)
        name = digest([[prompt.id, prompt.prompt_ids] for prompt in prompts])
        return self._answers(folder, title, player, prompts, sampling, 1, data=name)

    def _answers(
        self,
        folder: str,
        title: str,
        player: Player,
        examples: Sequence[TokenizedExample],
        sampling: Sampling,
        k: int,
        data: str | None = None,
    ) -> Answers:
        """A player's k responses to each example's prompt, shard by shard; `data` names prompts of another origin."""
        inputs = self._inputs(
            "seed",
            sampling=asdict(sampling),
            k=k,
            player=player.hash,
            data=data or self._data_hash,
            precision=self._precision,
            engine=self._engine_name,
        )

        def make(shard: range, on_progress: OnProgress) -> list[_Answered]:
            asked = [examples[place] for place in shard]
            requests = [
                Request(e.prompt_ids, request_seed(self.recipe.seed, folder, e.id, i)) for e in asked for i in range(k)
            ]
            memory = enough_memory(title, "generate", "Lower generation.batch_size or generation.max_new_tokens")
            with memory, self.players.autocast():
                responses = iter(self._engine(player).generate(requests, sampling, on_progress))
            return [_Answered(e.id, list(islice(responses, k))) for e in asked]

        rows, name = self._shards(_Answered, folder, title, len(examples), k, inputs, make)
        self._check_rows(folder, all(len(row.responses) == k for row in rows))
        return Answers([row.responses for row in rows], name)

    def _choose_engine(self) -> EngineName:
        """Refused now, not when much is done already; but where nothing is generated, nothing is refused."""
        used: EngineName | None = self.run.recorded_input("engine")
        if self._only is not None and not {"generate", "evaluate"} & set(self._only):
            return used or "transformers"
        kind, processes = self.players.device.type, self.processes.num_processes
        return choose(self.recipe, kind, processes, lambda: self.players.config, used, self.progress.say)

    def _engine(self, player: Player) -> Engine:
        """The player, ready to answer. One model is in memory: vLLM's, or that of the players."""
        if self._engine_name == "transformers":
            return self._transformers_engine(self.players.opponent(player))
        if self._vllm is None:
            self.players.forget()
            self._vllm = VLLMEngine(
                self.recipe,
                str(self.players.compute_dtype).removeprefix("torch."),
                self.players.device.type,
                self.renderer,
                self.players.revision,
            )
        self._vllm.seat(player)
        return self._vllm

    def _transformers_engine(self, model: Any) -> TransformersEngine:
        """It decodes as many responses together as the recipe says, or as still fitted when memory ran out."""
        note = self.run.path / "batch_size" / f"{self.processes.process_index}.json"
        size = self._noted_size(note) if note.exists() else self.recipe.generation.batch_size

        def halved(size: int) -> None:
            # A run that is interrupted here goes on with the same batches.
            write_json(note, sealed({"batch_size": size}))
            self.progress.say(f"generation: memory has run out; from here on {size} responses are decoded together")

        return TransformersEngine(model, self.renderer, size, halved)

    def _noted_size(self, note: Path) -> int | None:
        with suppress(ValueError, IsADirectoryError):
            size = unsealed(read_json(note)).get("batch_size")
            if isinstance(size, int) and size > 0:
                return size
        if not self._repair:
            raise UserError(
                f"{note}: not what was written; spinlm run with --repair removes it, and generation.batch_size holds "
                "again"
            )
        remove(note)
        self.progress.say(f"{note}: not what was written, so generation.batch_size holds again")
        return self.recipe.generation.batch_size

    def _scores(
        self,
        folder: str,
        title: str,
        player: Player,
        examples: Sequence[TokenizedExample],
        others: Mapping[str, Answers],
    ) -> Scores:
        """A player's log-probs, by the forward pass of training, shard by shard."""
        inputs = self._inputs(
            player=player.hash,
            data=self._data_hash,
            others={source: answers.hash for source, answers in others.items()},
            precision=self._precision,
        )
        each = 1 + sum(len(answers[0]) for answers in others.values() if answers)

        def make(shard: range, on_progress: OnProgress) -> list[_Scored]:
            rows = []
            for place in shard:
                ids = {source: [r.token_ids for r in answers[place]] for source, answers in others.items()}
                rows.append((examples[place], ids))
            with enough_memory(title, "score", self._less_to_score()):
                return self._score_shard(player, rows, on_progress)

        rows, name = self._shards(_Scored, folder, title, len(examples), each, inputs, make)
        scored = [
            (row.others.get(source, []), answers[place])
            for source, answers in others.items()
            for place, row in enumerate(rows)
        ]
        self._check_rows(folder, all(len(logprobs) == len(responses) for logprobs, responses in scored))
        return Scores(
            real=[row.real for row in rows],
            others={source: [row.others[source] for row in rows] for source in others},
            hash=name,
        )

    def _score_shard(
        self,
        player: Player,
        rows: Sequence[tuple[TokenizedExample, dict[str, list[list[int]]]]],
        on_progress: OnProgress,
    ) -> list[_Scored]:
        """Each different response of an example once."""
        different = [
            list(dict.fromkeys(map(tuple, [example.real_ids, *chain.from_iterable(others.values())])))
            for example, others in rows
        ]
        groups = [Group(example.prompt_ids, ids) for (example, _), ids in zip(rows, different, strict=True)]
        logprobs: list[dict[tuple[int, ...], float]] = [{} for _ in rows]
        self.close()
        method, model = self.settle_method(player), self.players.opponent(player)
        tokens_per_pass = self._tokens_per_pass(training=False)
        with self.players.autocast():
            for places, values in score_groups(model, groups, method, tokens_per_pass, self.renderer.pad_id):
                for place, scored in zip(places, values, strict=True):
                    logprobs[place] = dict(zip(different[place], scored, strict=True))
                tokens = count_tokens([groups[place] for place in places], method.layout)
                on_progress(tokens, sum(map(len, values)))
        return [
            _Scored(
                example.id,
                known[tuple(example.real_ids)],
                {source: [known[tuple(ids)] for ids in answers] for source, answers in others.items()},
            )
            for (example, others), known in zip(rows, logprobs, strict=True)
        ]

    def _tokens_per_pass(self, training: bool) -> int:
        return tokens_per_pass(self.recipe.tokens_per_pass, self.players.device.type != "cpu", training)

    def _less_to_score(self) -> str:
        """What to do where scoring has run out of memory, or the search for a layout before it."""
        longest = self.recipe.generation.max_new_tokens
        return self._smaller_passes(False, f"lower generation.max_new_tokens (now {longest})")

    def _smaller_passes(self, training: bool, *others: str) -> str:
        """What to do where the memory for passes has run out."""
        tokens, longest = self._tokens_per_pass(training), self.recipe.data.max_length
        remedies = [f"Lower tokens_per_pass (now {tokens})", f"lower data.max_length (now {longest})", *others]
        return f"{', or '.join(remedies)}; a run goes on with another recipe by --fork NEW_RUN"

    def _less_to_train(self, stage: str) -> str:
        """What to do where training has run out of memory."""
        recipe, adapter = self.recipe, self.recipe.adapter
        name, section = ("training", recipe.training) if stage == "train" else ("sft", recipe.sft)
        assert section is not None
        remedies = []
        if not (section.model_extra or {}).get("gradient_checkpointing"):
            remedies.append(f"set {name}.gradient_checkpointing=true")
        if adapter is None:
            remedies.append(f"set {name}.optim (now {section.optim}) to one that keeps less, or train an adapter")
        else:
            remedies.append(f"lower adapter.r (now {adapter.r})")
            if not recipe.model.load_in_4bit and self.players.device.type == "cuda":
                remedies.append("set model.load_in_4bit=true")
        return self._smaller_passes(True, *remedies)

    def settle_method(self, player: Player) -> Method:
        """How log-probs are computed: the fastest way that is right for the model, found out once in a run."""
        if self._chosen_method is None:
            examples = self.data.train
            inputs = self._inputs("model", "adapter", "layout", data=self._data_hash, precision=self._precision)
            artifact = self.run.artifact("layout.json", "data", inputs)
            with self.processes.main_process_first():  # which copies it, in a forked run
                is_settled = artifact.is_committed()
            settled = [self.run.committed_json(artifact.key)] if is_settled else []
            (method,) = self._read(Method, settled, artifact.key) or [self._choose_method(player, examples)]
            self.processes.wait_for_everyone()
            if self.processes.is_main_process and not is_settled:
                with artifact.staging() as place:
                    write_json(place, asdict(method))
            self.processes.wait_for_everyone()
            self.progress.say(f"layout: {method.layout}{f' ({method.reason})' if method.reason else ''}")
            self._chosen_method = method
        return self._chosen_method

    def _choose_method(self, player: Player, examples: Sequence[TokenizedExample]) -> Method:
        layouts = LAYOUTS if self.recipe.layout == "auto" else (self.recipe.layout,)
        groups = _telling_groups(examples, self.recipe.generation.max_new_tokens)
        model = self.players.opponent(player)
        with enough_memory("layout", "score", self._less_to_score()), self.players.autocast():
            return choose_method(model, groups, self.renderer.pad_id, self.players.compute_dtype, layouts)

    def _shards(
        self,
        kind: type[Row],
        folder: str,
        title: str,
        count: int,
        each: int,
        inputs: Inputs,
        make: Callable[[range, OnProgress], list[Row]],
    ) -> tuple[list[Row], str]:
        """Rows for `count` examples with `each` responses, and their hash; the processes share out the shards."""
        size, stage = self.recipe.generation.shard_size, _stage(title)
        shards = [range(start, min(start + size, count)) for start in range(0, count, size)]
        artifacts = [
            self.run.artifact(f"{folder}/{number:05d}.jsonl", stage, {**inputs, "shard": [number, size]})
            for number in range(len(shards))
        ]
        mine = range(self.processes.process_index, len(shards), self.processes.num_processes)
        missing = [number for number in mine if self._needs_making(artifacts[number])]
        if missing:
            total = each * sum(len(shards[number]) for number in missing)
            with self.timed(folder) as timing, self.progress.task(title, total, "responses") as task:
                for number in missing:
                    finished = task.done + each * len(shards[number])
                    rows = make(shards[number], task.advance)
                    with artifacts[number].staging() as place:
                        write_jsonl(place, [asdict(row) for row in rows])
                    task.advance(0, finished - task.done)
                    self.page.update()
                timing["tokens"] = task.tokens
        self.processes.wait_for_everyone()
        rows = [row for artifact in artifacts for row in self._committed_rows(kind, artifact.key)]
        self._check_rows(folder, len(rows) == count)
        return rows, digest([artifact.hash for artifact in artifacts])

    def _train(
        self,
        folder: str,
        name: str,
        title: str,
        start: Player,
        inputs: Inputs,
        make_trainer: Callable[[Any, Path, Method], Any],
        candidates: str | None = None,
    ) -> Player:
        """Train from a player's weights, or go on at the last checkpoint, and commit the result.

        Args:
            folder: Where, in the run directory.
            name: The player's.
            title: What is shown.
            start: Whose weights.
            inputs: What the result is made from.
            make_trainer: From the model, where checkpoints go, and how log-probs are computed.
            candidates: Commit the weights at each checkpoint here, and the result as the last of them.
        """
        stage = _stage(title)
        log = self.run.artifact(f"{folder}/training.jsonl", stage, inputs)
        weights = self.run.artifact(f"{candidates}/last" if candidates else self._weights_key(folder), stage, inputs)
        checkpoints = self.run.checkpoints(folder) / digest(inputs)[:12]
        with self.processes.main_process_first():  # which copies them, in a forked run
            missing = [artifact for artifact in (log, weights) if self._needs_making(artifact)]
            if candidates is not None:
                missing += self._missing_candidates(folder, candidates, inputs, checkpoints, is_trained=not missing)
        if missing:
            self.close()
            memory = enough_memory(title, "train" if stage == "train" else "sft", self._less_to_train(stage))
            with memory, self.timed(folder), self._tracked(folder) as trackers:
                method = self.settle_method(start)
                model = self.players.main_player(start, seed=self._seed(folder))
                if self.processes.is_main_process:
                    make_directory(checkpoints)  # or the Trainer would, and its name might not stay
                trainer = make_trainer(model, checkpoints, method)
                trainer.watch.say = lambda skipped: self.progress.say(f"{title} {skipped}")
                self._start_wandb(trainer, trackers)
                if candidates is not None:
                    trainer.add_callback(EachCheckpoint(partial(self._commit_candidate, trainer, candidates, inputs)))
                rows = train_resumably(trainer, lambda *logged: self._show_training(title, *logged), self.progress.say)
                self._commit_training(trainer, rows, log, weights)
                sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
            del trainer  # with its optimiser, before anything else is loaded
            if sharded:
                self.players.forget()
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            self.run.remove_checkpoints(folder)
        return Player(name, weights.path, weights.hash)

    def _show_training(self, title: str, step: int, steps: int, logs: dict[str, float]) -> None:
        self.progress.training(title, step, steps, logs)
        self.page.update()

    def _commit_training(self, trainer: Any, rows: list[dict[str, Any]], log: Artifact, weights: Artifact) -> None:
        if self.processes.is_main_process:
            with log.staging() as place:
                write_jsonl(place, rows)
        self._commit_weights(trainer, weights)

    def _last_step(self, folder: str) -> int:
        """Of a training that is committed."""
        rows = self.run.committed_rows(f"{folder}/training.jsonl")
        with reading(self.run.path / folder / "training.jsonl"):
            return int(rows[-1]["step"])

    def _candidates(self, folder: str, inputs: Inputs, before: int) -> list[Artifact]:
        """The weights at each checkpoint before a step."""
        every = self.recipe.training.save_steps
        return [
            self.run.artifact(f"{folder}/{step:06d}", "train", {**inputs, "step": step})
            for step in range(every, before, every)
        ]

    def _missing_candidates(
        self, folder: str, candidates: str, inputs: Inputs, checkpoints: Path, is_trained: bool
    ) -> list[Artifact]:
        """Those that should be there by now. Training doesn't come by them again from a later checkpoint."""
        checkpoint = last_checkpoint(checkpoints)
        reached = self._last_step(folder) if is_trained else 0 if checkpoint is None else step_of(checkpoint) + 1
        missing = [one for one in self._candidates(candidates, inputs, before=reached) if self._needs_making(one)]
        if missing and self.processes.is_main_process:
            shutil.rmtree(checkpoints, ignore_errors=True)
        return missing

    def _commit_candidate(self, trainer: Any, candidates: str, inputs: Inputs, step: int) -> None:
        """The weights at a checkpoint, but for one that is there only because the run is to end."""
        if step % self.recipe.training.save_steps:
            return
        artifact = self.run.artifact(f"{candidates}/{step:06d}", "train", {**inputs, "step": step})
        if self.processes.is_main_process and not artifact.is_committed():
            self._commit_weights(trainer, artifact)

    def _commit_weights(self, trainer: Any, weights: Artifact) -> None:
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        if self.processes.is_main_process:
            with weights.staging() as place:
                self.players.save(model, place, state_dict)

    def _weights_key(self, folder: str) -> str:
        """Of the artifact that holds what was trained there."""
        return f"{folder}/{self.recipe.weights}"

    def _training_arguments(
        self, kind: type[Any], section: SFTSection | TrainingSection, folder: str, directory: Path, **settings: Any
    ) -> Any:
        return kind(
            **section.arguments()
            | settings
            | {
                "output_dir": str(directory),
                "seed": self._seed(folder),
                "use_cpu": self.players.device.type == "cpu",
                "logging_strategy": "steps",
                "save_strategy": "steps",
                "disable_tqdm": True,
            }
        )

    def _check_trainer_settings(self) -> None:
        """Refuse now what a trainer would refuse when much is done already."""
        if self.recipe.training.regenerate_every is not None and self.processes.num_processes > 1:
            raise UserError(
                f"training.regenerate_every: works in one process, and this run has {self.processes.num_processes}: "
                "leave it out, or start without torchrun"
            )
        for name, section in (("sft", self.recipe.sft), ("training", self.recipe.training)):
            if section is not None:
                try:
                    args = self._training_arguments(
                        Arguments, section, name, self.run.path, learning_rate=1.0, num_train_epochs=1.0
                    )
                    get_reporting_integration_callbacks(args.report_to)
                    _refuse_sharded_checkpoints(args)
                except (ValueError, TypeError, ImportError, RuntimeError) as error:
                    raise UserError(f"{name}: transformers' Trainer refuses these settings: {error}") from None

    def _seed(self, folder: str) -> int:
        """Of one training: of its adapter, its order of pairs, its dropout."""
        return request_seed(self.recipe.seed, folder) % 2**31

    def _inputs(self, *sections: str, **values: Any) -> dict[str, Any]:
        """What an artifact is made from: recipe sections and other values."""
        return self.recipe.model_dump(include=set(sections), mode="json") | values

    def _needs_making(self, artifact: Artifact) -> bool:
        interruption.check()
        if artifact.is_committed():
            return False
        if self.run.has_record(artifact.key):
            self._changed(artifact)
        if self._only is not None and artifact.stage not in self._only:
            command = COMMANDS.get(artifact.stage, artifact.stage)
            raise UserError(
                f"{artifact.path}: missing; the stage {artifact.stage!r} makes it: run spinlm {command} first"
            )
        return True

    def _changed(self, artifact: Artifact) -> None:
        """A committed artifact's inputs are others now: nothing is replaced unless that was asked for."""
        keys = ", ".join(artifact.changed_inputs())
        changed = f"{artifact.path}: was made from something else than what is there now ({keys})"
        if not self._repair:
            raise UserError(
                f"{changed}: has the model or the dataset been changed? Put it back, or start a new run "
                "(--fork NEW_RUN keeps what still holds); --repair makes it anew here."
            )
        self.progress.say(f"{changed}, so it is made anew")

    @contextmanager
    def _tracked(self, folder: str) -> Iterator[Path]:
        """Where trackers write their files: in the run directory, where they stay when checkpoints go."""
        place = self.run.path / TRACKERS / folder
        for written in (place, place / "wandb"):
            refuse_way_out(written, self.run.path)
        before = os.environ.get("TENSORBOARD_LOGGING_DIR")
        os.environ["TENSORBOARD_LOGGING_DIR"] = before or str(place)
        try:
            yield place
        finally:
            if before is None:
                del os.environ["TENSORBOARD_LOGGING_DIR"]
            wandb = sys.modules.get("wandb")
            if wandb is not None and wandb.run is not None:
                wandb.finish()

    def _start_wandb(self, trainer: Any, place: Path) -> None:
        """To Weights & Biases each training is a run of its own, the same one again after an interruption.

        What its environment variables say goes before.
        """
        callbacks = trainer.callback_handler.callbacks
        if not self.processes.is_main_process or not any(isinstance(c, WandbCallback) for c in callbacks):
            return
        import wandb

        place.mkdir(parents=True, exist_ok=True)
        interrupted = [path.name.rpartition("-")[2] for path in sorted(place.glob("wandb/*run-*-*"))]
        name = f"{self.run.path.name}/{place.relative_to(self.run.path / TRACKERS)}"
        wandb.init(
            dir=os.environ.get("WANDB_DIR", str(place.absolute())),  # its service may have begun elsewhere
            project=os.environ.get("WANDB_PROJECT", "spinlm"),
            group=os.environ.get("WANDB_RUN_GROUP", self.run.path.name),
            name=os.environ.get("WANDB_NAME", name),
            id=os.environ.get("WANDB_RUN_ID", interrupted[0] if interrupted else None),
            resume="allow",
        )

    @contextmanager
    def timed(self, what: str) -> Iterator[dict[str, Any]]:
        """Add a line to timings.jsonl, which is the only file where two equal runs differ."""
        timing: dict[str, Any] = {"what": what}
        started = time.perf_counter()
        try:
            yield timing
        finally:
            if self.processes.is_main_process:
                timing["seconds"] = round(time.perf_counter() - started, 3)
                try:
                    add_to_log(self.run.path / TIMINGS, timing)
                except OSError as error:  # never in the way of what happened above
                    self.progress.say(f"{self.run.path / TIMINGS}: not written: {error.strerror}")
        self.page.update()


def prepare_data(recipe: Recipe, players: Players, renderer: Renderer) -> Split:
    """The dataset as a run uses it, read from its source.

    Raises:
        UserError: It can't be read, or doesn't fit the recipe.
    """
    check_vocabulary(players.tokenizer, players.config)
    examples, dropped = load_examples(recipe.data)
    split = prepare(examples, dropped, renderer, recipe.data, recipe.seed)
    _check_measure(recipe, split)
    return split


def _dataset_hashes(source: Path) -> dict[str, str]:
    """Of the files that its rows are read from: others may come and go beside them."""
    if not source.is_dir():
        return file_hashes(source)
    return {path.name: file_hash(path) for path in files_in(source) if path.is_file()}


def check_context(recipe: Recipe, context: int | None) -> None:
    """Refuse lengths that the model can't take.

    Raises:
        UserError: With all numbers, and some that would do.
    """
    data, new = recipe.data, recipe.generation.max_new_tokens
    if context is not None and max(data.max_length, data.max_prompt_tokens + new) > context:
        raise UserError(
            f"data.max_length: {data.max_length}, and data.max_prompt_tokens + generation.max_new_tokens: "
            f"{data.max_prompt_tokens} + {new}, but {recipe.model.name} takes {context} tokens, prompt and response "
            f"together. These would do: data.max_length={context} data.max_prompt_tokens={context // 2} "
            f"generation.max_new_tokens={context - context // 2}"
        )


def _check_measure(recipe: Recipe, split: Split) -> None:
    select_by = recipe.evaluation.select_by
    if select_by.startswith("accuracy") and any(example.verifier is None for example in split.held_out):
        raise UserError(
            f"evaluation.select_by: {select_by} can't be measured, since {recipe.data.source} has no verifier; "
            "choose real_nll, truncation_rate or repetition_rate"
        )
    if not split.held_out and (recipe.keep == "best" or recipe.stop.is_asked_for):
        what = "keep: best" if recipe.keep == "best" else "stop"
        raise UserError(f"{what} needs held-out examples, but data.held_out: {recipe.data.held_out} gives none")


def _refuse_sharded_checkpoints(args: Any) -> None:
    by_recipe = args.fsdp_config.get("state_dict_type") if isinstance(args.fsdp_config, dict) else None
    for kind in (by_recipe, os.environ.get("FSDP_STATE_DICT_TYPE")):
        if kind not in (None, "FULL_STATE_DICT"):
            raise ValueError(
                f"FSDP's {kind} checkpoints hold a pickle, which could run code when a run goes on from one: leave "
                "state_dict_type (FSDP_STATE_DICT_TYPE) out, or set it to FULL_STATE_DICT"
            )


def _telling_groups(examples: Sequence[TokenizedExample], longest_response: int) -> list[Group]:
    """Each prompt with its real response and, as a second one, what fits of another example's.

    The longest group's is as long as a response can be: there a model's window may begin to tell.
    """
    partners = [*examples[1:], *examples[:1]]
    groups = [
        Group(one.prompt_ids, [one.real_ids, other.real_ids[: len(one.real_ids)]])
        for one, other in zip(examples, partners, strict=True)
    ]
    longest = max(range(len(groups)), key=lambda place: count_tokens([groups[place]], "shared"))
    prompt, (real, _) = groups[longest].prompt_ids, groups[longest].responses
    groups[longest] = Group(prompt, [real, list(islice(cycle(partners[longest].real_ids), longest_response))])
    return groups


def _stage(title: str) -> str:
    """`iteration 0: generate` and `base: evaluate (greedy)` name the stages generate and evaluate."""
    return title.rpartition(": ")[2].partition(" (")[0]

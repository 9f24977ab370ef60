"""What a recipe will take on a machine: memory by part, work and time by stage, found without the model's weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from rich.table import Table

from spinlm.config import Recipe, TrainerSection, at
from spinlm.data.pairs import Group
from spinlm.data.prepare import Split, TokenizedExample
from spinlm.data.render import Renderer
from spinlm.generation.continuous import LOGITS_COPIES, PREFILL_TOKENS, PREFILL_TOKENS_ON_GPU, columns_needed
from spinlm.generation.memory import rows_that_fit
from spinlm.hardware import Machine, check_gpu, named_gpu, this_machine, total_memory
from spinlm.players.layouts import count_tokens, into_passes, tokens_per_pass
from spinlm.players.linear import rows_to_spare
from spinlm.players.models import Players, context_length
from spinlm.sketch import Extent, Sketch, Work, extent_of
from spinlm.workshop import check_context, prepare_data

SHARES = {"cpu": {"train": 0.5, "score": 0.6, "decode": 0.4}, "gpu": {"train": 0.4, "score": 0.4, "decode": 0.4}}
"""Of the peak, what passes are assumed to attain; on a CPU, about what docs/performance.md has measured."""

BANDWIDTH_SHARE = 0.6
"""Of the bandwidth, what decoding is assumed to attain: every step reads all weights."""


@dataclass(frozen=True)
class Phase:
    """What is in a process's memory at the fullest moment of training, scoring or generating; parts in bytes."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def words(self) -> str:
        """`2.50 GB: weights 2.00 GB, …`."""
        parts = ", ".join(f"{part} {_size(size)}" for part, size in self.parts.items() if size)
        return f"{_size(self.total)}: {parts}"


@dataclass(frozen=True)
class StageCost:
    """Of one stage over all processes.

    Attributes:
        name: The stage.
        tokens: That go through the model: generated ones, in generation.
        work: Floating-point operations.
        seconds: Estimated.
    """

    name: str
    tokens: float
    work: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a recipe will take.

    Attributes:
        machine: On which.
        processes: How many of it.
        layout: Of training passes.
        dtype: Of the forward pass.
        rows: Responses decoded together.
        trained: Parameters that are trained.
        phases: Memory, of one process.
        stages: Work and time.
        warnings: What won't fit, and what to change.
        assumptions: Behind the estimates.
    """

    machine: Machine
    processes: int
    layout: str
    dtype: str
    rows: int
    trained: int
    phases: list[Phase]
    stages: list[StageCost]
    warnings: list[str]
    assumptions: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes, operations and seconds."""
        fields = asdict(self)
        fields["phases"] = [asdict(phase) | {"total": phase.total} for phase in self.phases]
        fields["seconds"] = sum(stage.seconds for stage in self.stages)
        fields["work"] = sum(stage.work for stage in self.stages)
        return fields

    def tables(self) -> list[Table]:
        """For the terminal: memory, then stages."""
        memory = Table(title=f"memory of a process on {self.machine.name}")
        memory.add_column("")
        for phase in self.phases:
            memory.add_column(phase.name, justify="right")
        for part in dict.fromkeys(part for phase in self.phases for part in phase.parts):
            memory.add_row(part, *(_size(phase.parts.get(part, 0)) for phase in self.phases))
        memory.add_section()
        memory.add_row("together", *(_size(phase.total) for phase in self.phases), style="bold")
        memory.caption = f"of {_size(self.machine.memory)}"
        stages = Table(title="work and time")
        stages.add_column("stage")
        for heading in ("tokens", "TFLOP", "time"):
            stages.add_column(heading, justify="right")
        for stage in self.stages:
            stages.add_row(stage.name, f"{stage.tokens:,.0f}", f"{stage.work / 1e12:,.3g}", _duration(stage.seconds))
        stages.add_section()
        together = (sum(stage.work for stage in self.stages), sum(stage.seconds for stage in self.stages))
        stages.add_row("together", "", f"{together[0] / 1e12:,.3g}", _duration(together[1]), style="bold")
        return [memory, stages]


def plan(recipe: Recipe, gpu: str | None = None, processes: int = 1) -> Plan:
    """Estimate a run. The model's weights aren't read, and nothing is written.

    Args:
        recipe: What would be run.
        gpu: One of `hardware.GPUS`; None: this machine.
        processes: Devices of that kind.

    Raises:
        UserError: An unknown GPU, or what a run would refuse: the model's configuration, its tokenizer or the dataset
            can't be read, or doesn't fit the recipe.
    """
    return _Planner(recipe, gpu, processes).plan()


def estimate(recipe: Recipe, phase: str, split: Split, processes: int) -> str:
    """The memory that one phase is planned to take on this machine, in a sentence.

    Args:
        recipe: What is run.
        phase: `sft`, `train`, `score` or `generate`.
        split: The recipe's data.
        processes: Devices.
    """
    planner = _Planner(recipe, None, processes, split)
    return (
        f"spinlm plan estimates for {phase}, in each process, {planner.phase(phase).words()}; {planner.device} has "
        f"{_size(planner.memory)} in all"
    )


class _Planner:
    """The parts of a plan, each computed once."""

    def __init__(self, recipe: Recipe, gpu: str | None, processes: int, split: Split | None = None) -> None:
        self._recipe = recipe
        self._gpu = None if gpu is None else check_gpu(gpu)
        self._known_split = split
        self._processes = processes
        self._precision = recipe.training.precision
        self._players = Players(self._model_section(), recipe.adapter, self._precision)
        self._is_gpu = gpu is not None or self._players.device.type != "cpu"
        check_context(recipe, context_length(self._players.config))

    def _model_section(self) -> Any:
        """What stands for the model here: on a CPU if the GPU is only a name, in 4 bits by arithmetic alone."""
        section = self._recipe.model.model_copy(update={"load_in_4bit": False})
        if self._gpu is None:
            return section
        adapted = self._recipe.adapter is not None
        dtype = ("bfloat16" if adapted else "float32") if section.dtype == "auto" else section.dtype
        return section.model_copy(update={"device": "cpu", "dtype": dtype})

    def plan(self) -> Plan:
        data = self._data_stage()
        stages = [data, *self._stages()]
        phases = [*self._training_phases(), self._scoring_phase(), self._generation_phase()]
        return Plan(
            machine=self._machine,
            processes=self._processes,
            layout=self._sketch.method.layout,
            dtype=str(self._sketch.dtype).removeprefix("torch."),
            rows=self._rows,
            trained=sum(parameter.numel() for parameter in self._sketch.trained),
            phases=phases,
            stages=stages,
            warnings=self._warnings(phases),
            assumptions=self._assumptions(),
        )

    def phase(self, name: str) -> Phase:
        """One of them, without the others."""
        if name == "score":
            return self._scoring_phase()
        if name == "generate":
            return self._generation_phase()
        return next(one for one in self._training_phases() if one.name == name)

    @cached_property
    def memory(self) -> int:
        """Bytes of the device, known without measuring what else it can do."""
        return total_memory(self._players.device) if self._gpu is None else self._machine.memory

    @property
    def device(self) -> str:
        """This machine's, for people."""
        return "the GPU" if self._is_gpu else "the machine"

    @cached_property
    def _sketch(self) -> Sketch:
        return Sketch(self._recipe, self._players, self._precision, self._recipe.model.load_in_4bit, self._is_gpu)

    @cached_property
    def _machine(self) -> Machine:
        if self._gpu is not None:
            return named_gpu(self._gpu, self._sketch.dtype)
        return this_machine(self._players.device, self._sketch.dtype)

    @cached_property
    def _split(self) -> Split:
        if self._known_split is not None:
            return self._known_split
        renderer = Renderer(self._players.tokenizer, self._recipe.prompt, self._players.stop_ids())
        return prepare_data(self._recipe, self._players, renderer)

    @property
    def _played(self) -> list[TokenizedExample]:
        return self._split.train[: self._recipe.generation.max_prompts]

    # --- who goes through the model together: of responses, lengths stand for tokens ---

    def _synthetic(self, example: TokenizedExample, count: int) -> list[range]:
        """The opponent's responses: as long as the real one, up to the cap."""
        return [range(min(len(example.real_ids), self._recipe.generation.max_new_tokens))] * count

    def _groups(self, examples: Sequence[TokenizedExample], synthetic: int) -> list[Group]:
        return [Group(e.prompt_ids, [range(len(e.real_ids)), *self._synthetic(e, synthetic)]) for e in examples]

    def _pair_groups(self, iteration: int) -> list[Group]:
        sources = min(iteration, self._recipe.training.replay) + 1
        return self._groups(self._played, sources * self._recipe.generation.responses_per_prompt)

    def _tokens(self, groups: Sequence[Group]) -> int:
        return count_tokens(groups, self._sketch.method.layout)

    def _training_passes(self, groups: Sequence[Group]) -> list[list[Group]]:
        return into_passes(groups, self._tokens, self._tokens_per_pass(training=True))

    def _scoring_passes(self, groups: Sequence[Group]) -> list[list[Group]]:
        return into_passes(groups, self._tokens, self._tokens_per_pass(training=False))

    def _tokens_per_pass(self, training: bool) -> int:
        return tokens_per_pass(self._recipe.tokens_per_pass, self._is_gpu, training)

    def _fitting(self, groups: Sequence[Group]) -> Iterator[Group]:
        """Groups of pairs, divided where their responses together are too many for a pass."""
        for one in groups:
            real, *synthetic = one.responses
            prompt = one.prompt_ids
            if len(synthetic) < 2 or self._tokens([one]) <= self._tokens_per_pass(training=True):
                yield one
            else:
                for part in self._training_passes([Group(prompt, [real, other]) for other in synthetic]):
                    yield Group(prompt, [real, *(other.responses[1] for other in part)])

    def _steps(self, section: TrainerSection, groups: Sequence[Group], pairs: int) -> list[list[list[Group]]]:
        """The passes of each optimiser step of one process in an epoch, with `pairs` rows in a group."""
        size = section.per_device_train_batch_size
        count = max(1, size // pairs)
        return [self._training_passes(list(self._fitting(groups[i : i + count]))) for i in range(0, len(groups), count)]

    def _extent(self, passes: Sequence[Sequence[Group]]) -> Extent:
        return sum((extent_of(one, self._sketch.method.layout) for one in passes), Extent())

    # --- memory ---

    def _training_phases(self) -> list[Phase]:
        recipe, phases = self._recipe, []
        if recipe.sft is not None:
            phases.append(self._training_phase("sft", recipe.sft, self._groups(self._split.train, 0), 1))
        groups = self._pair_groups(recipe.iterations - 1)
        return [*phases, self._training_phase("train", recipe.training, groups, len(groups[0].responses) - 1)]

    def _training_phase(self, name: str, section: TrainerSection, groups: Sequence[Group], pairs: int) -> Phase:
        """The largest pass of a step: of those in the data's order, and of the one of the longest."""
        longest = sorted(groups, key=lambda one: -self._tokens([one]))[: section.per_device_train_batch_size]
        steps = [*self._steps(section, groups, pairs), *self._steps(section, longest, pairs)]
        several = any(len(passes) > 1 for passes in steps) or section.gradient_accumulation_steps > 1
        largest = max((one for passes in steps for one in passes), key=self._tokens)
        kept = self._sketch.training_step(section, largest, several)
        parts = self._weights() | {
            "gradients": kept.gradients,
            "optimiser state": kept.optimizer,
            "activations and temporaries": kept.activations,
        }
        return Phase(name, self._shared_out(section, parts))

    def _shared_out(self, section: TrainerSection, parts: dict[str, int]) -> dict[str, int]:
        """By FSDP or ZeRO over the processes; the latter keeps float32 copies of what it trains in half precision."""
        extra = section.model_extra or {}
        if extra.get("deepspeed"):
            trained = sum(parameter.numel() for parameter in self._sketch.trained)
            copies = 4 * trained if self._sketch.dtype != torch.float32 else 0
            parts = parts | {"optimiser state": 8 * trained + copies}
        elif not extra.get("fsdp"):
            if self._processes > 1:  # DistributedDataParallel's buckets
                parts = parts | {"gradients": 2 * parts["gradients"]}
            return parts
        whole = {"activations and temporaries"}
        return {part: size if part in whole else size // self._processes for part, size in parts.items()}

    def _weights(self) -> dict[str, int]:
        parts = {"weights": self._sketch.weight_bytes()}
        return parts | ({"adapter": self._sketch.adapter_bytes()} if self._sketch.has_adapter else {})

    def _scoring_phase(self) -> Phase:
        groups = self._pair_groups(self._recipe.iterations - 1)
        largest = max(self._scoring_passes(groups[: self._recipe.generation.shard_size]), key=self._tokens)
        longest = max(groups, key=lambda one: self._tokens([one]))
        largest = max(largest, [longest], key=self._tokens)
        return Phase("score", self._weights() | {"activations and temporaries": self._sketch.scoring_pass(largest)})

    # --- generation ---

    @cached_property
    def _decoding(self) -> tuple[int, int, int]:
        asked = (*self._played, *self._split.held_out)
        most = PREFILL_TOKENS_ON_GPU if self._is_gpu else PREFILL_TOKENS
        return self._sketch.decoding(max(1, min(len(asked), most // self._longest_prompt)), self._longest_prompt)

    @property
    def _longest_prompt(self) -> int:
        return max(len(e.prompt_ids) for e in (*self._played, *self._split.held_out))

    @property
    def _row_bytes(self) -> tuple[int, int]:
        """Of one response's keys and values, and of its logits while a token is drawn."""
        a_token, logits, _ = self._decoding
        columns = columns_needed(self._longest_prompt, self._recipe.generation.max_new_tokens)
        return columns * a_token, LOGITS_COPIES * logits

    @cached_property
    def _packed_bytes(self) -> int:
        packs = not (self._is_gpu or self._precision or self._recipe.model.load_in_4bit)
        return self._sketch.packed_bytes(self.memory) if packs else 0

    @cached_property
    def _rows(self) -> int:
        section = self._recipe.generation
        requests = section.shard_size * section.responses_per_prompt
        held = self._sketch.weight_bytes() + self._packed_bytes
        fitting = rows_that_fit(self.memory, held, sum(self._row_bytes), self._is_gpu)
        return min(section.batch_size or fitting, requests)

    def _generation_phase(self) -> Phase:
        kept, logits = self._row_bytes
        rows = self._rows + (0 if self._is_gpu else rows_to_spare(self._rows))
        parts = self._weights() | {
            "packed copies": self._packed_bytes,
            "keys and values": rows * kept,
            "activations and temporaries": max(rows * logits, self._decoding[2]),
        }
        return Phase("generate", parts)

    # --- work and time ---

    def _data_stage(self) -> StageCost:
        """Reading and tokenising: as long as it has taken here."""
        begin = time.perf_counter()
        split = self._split
        tokens = sum(len(e.prompt_ids) + len(e.real_ids) for e in (*split.train, *split.held_out))
        return StageCost("data", tokens, 0, time.perf_counter() - begin)

    def _stages(self) -> Iterator[StageCost]:
        recipe = self._recipe
        steps = 0.0
        yield self._evaluation("base", against_opponent=False)
        if recipe.sft is not None:
            yield self._supervised("sft", None)
            yield self._evaluation("sft", against_opponent=False)
        for iteration in range(recipe.iterations):
            title, k = f"iteration {iteration}", recipe.generation.responses_per_prompt
            yield replace(self._generation(self._played, k), name=f"{title}: generate")
            yield replace(self._scoring(self._pair_groups(iteration)), name=f"{title}: score")
            stage, taken = self._training(title, iteration)
            steps += taken
            yield stage
            yield self._evaluation(title, against_opponent=True)
        if recipe.evaluation.control:
            yield self._supervised("control", steps)
            yield self._evaluation("control", against_opponent=False)

    def _supervised(self, name: str, steps: float | None) -> StageCost:
        section = self._recipe.sft
        assert section is not None
        groups = self._groups(self._split.train, 0)
        return self._trained(name, section, groups, 1, section.num_train_epochs, steps)[0]

    def _training(self, title: str, iteration: int) -> tuple[StageCost, float]:
        section, groups = self._recipe.training, self._pair_groups(iteration)
        epochs = at(section.num_train_epochs, iteration)
        return self._trained(f"{title}: train", section, groups, len(groups[0].responses) - 1, epochs, None)

    def _trained(
        self,
        name: str,
        section: TrainerSection,
        groups: Sequence[Group],
        pairs: int,
        epochs: float,
        steps: float | None,
    ) -> tuple[StageCost, float]:
        """And the number of its optimiser steps."""
        passes = [one for step in self._steps(section, groups, pairs) for one in step]
        rows = pairs * len(groups)
        batch = section.per_device_train_batch_size * section.gradient_accumulation_steps * self._processes
        in_epoch = max(1, -(-rows // batch))
        if steps is None:
            steps = section.max_steps if section.max_steps > 0 else epochs * in_epoch
        extent = self._extent(passes) * (steps / in_epoch)
        work = self._training_work(section).of(extent)
        return StageCost(name, extent.tokens, work, self._seconds(work, "train")), steps

    def _scoring(self, groups: Sequence[Group]) -> StageCost:
        extent = self._extent(self._scoring_passes(groups))
        work = self._forward_work.of(extent)
        return StageCost("score", extent.tokens, work, self._seconds(work, "score"))

    def _generation(self, examples: Sequence[TokenizedExample], k: int) -> StageCost:
        """Shard by shard, which the processes share out: prompts once, then a token for each row in every step."""
        size = self._recipe.generation.shard_size
        shards = [examples[i : i + size] for i in range(0, len(examples), size)]
        costs = [self._shard(shard, k) for shard in shards]
        seconds = sum(sorted((cost.seconds for cost in costs), reverse=True)[:: self._processes])
        return StageCost("generate", sum(c.tokens for c in costs), sum(c.work for c in costs), seconds)

    def _shard(self, examples: Sequence[TokenizedExample], k: int) -> StageCost:
        prompts, decoded = Extent(), Extent()
        longest = 0
        for example in examples:
            prompt, new = len(example.prompt_ids), len(self._synthetic(example, 1)[0])
            prompts += Extent(prompt, 1, prompt**2)
            decoded += Extent(new, new, new * prompt + new * (new + 1) / 2) * k
            longest = max(longest, new)
        prefill, decode = self._forward_work.of(prompts), self._forward_work.of(decoded)
        steps = max(longest, decoded.tokens / self._rows)
        read = steps * self._sketch.weight_bytes() + decoded.couples * self._decoding[0]
        by_traffic = read / (self._machine.bandwidth * BANDWIDTH_SHARE)
        seconds = self._alone(prefill, "score") + max(self._alone(decode, "decode"), by_traffic)
        return StageCost("shard", decoded.tokens, prefill + decode, seconds)

    def _evaluation(self, player: str, against_opponent: bool) -> StageCost:
        section, held_out = self._recipe.evaluation, self._split.held_out
        samples = section.samples_per_prompt
        parts = [
            self._generation(held_out, samples),
            self._scoring(self._groups(held_out, samples * (1 + against_opponent))),
        ]
        if section.greedy:
            parts.append(self._generation(held_out, 1))
        return StageCost(
            f"{player}: evaluate",
            sum(part.tokens for part in parts),
            sum(part.work for part in parts),
            sum(part.seconds for part in parts),
        )

    @cached_property
    def _forward_work(self) -> Work:
        return self._sketch.work()

    def _training_work(self, section: TrainerSection) -> Work:
        """Counted once for each way of checkpointing."""
        settings = section.model_extra or {}
        checkpointed = bool(settings.get("gradient_checkpointing") or settings.get("activation_checkpointing"))
        known: dict[bool, Work] = self.__dict__.setdefault("_known_work", {})
        if checkpointed not in known:
            known[checkpointed] = self._sketch.work(section)
        return known[checkpointed]

    def _seconds(self, work: float, kind: str) -> float:
        return self._alone(work, kind) / self._processes

    def _alone(self, work: float, kind: str) -> float:
        return work / (self._machine.peak * SHARES["gpu" if self._is_gpu else "cpu"][kind])

    # --- what to say ---

    def _warnings(self, phases: Sequence[Phase]) -> list[str]:
        memory = self._machine.memory
        return [
            f"{phase.name} needs {_size(phase.total)}, but {self._machine.name} has {_size(memory)}: "
            + self._advice(phase)
            for phase in phases
            if phase.total > memory
        ]

    def _advice(self, phase: Phase) -> str:
        recipe = self._recipe
        advice = ["lower generation.batch_size"] if phase.name == "generate" else ["lower tokens_per_pass"]
        if phase.name in ("sft", "train"):
            advice.append("set gradient_checkpointing")
            if recipe.adapter is None:
                advice.append("train an adapter")
        if not recipe.model.load_in_4bit and recipe.adapter is not None:
            advice.append("set model.load_in_4bit")
        return " or ".join(advice)

    def _assumptions(self) -> list[str]:
        machine, shares = self._machine, SHARES["gpu" if self._is_gpu else "cpu"]
        source = "measured now" if machine.measured else "from its data sheet"
        return [
            f"{machine.name}: {machine.peak / 1e12:,.3g} TFLOP/s in {str(self._sketch.dtype).removeprefix('torch.')}, "
            f"{machine.bandwidth / 1e9:,.0f} GB/s, {source}",
            f"assumed, not measured: {shares['train']:.0%} of that in training, {shares['score']:.0%} in scoring, "
            f"{shares['decode']:.0%} in decoding, where {BANDWIDTH_SHARE:.0%} of the bandwidth is a second limit",
            "the opponent's responses are taken to be as long as the real ones, up to generation.max_new_tokens",
            f"layout {self._sketch.method.layout}, unless a run finds that the model computes it wrongly",
            "not counted: the program itself (about 0.5 GB), what the allocator holds back, loading and saving",
        ]


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count / 1e3:,.0f} kB" if count else ""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 60 else f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"

"""The recipe: one strict schema for everything a run can be told.

A recipe is a YAML file; `section.key=value` overrides change single keys. Unknown keys are refused with
the nearest known one, so that a misspelt setting can't be ignored in silence.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from spinlm.errors import UserError, nearest

Schedule = float | list[float]
"""One value for every iteration, or a list with a value for each."""


class Section(BaseModel):
    """A part of the recipe. Frozen: a run never changes its own recipe.

    An error doesn't repeat what doesn't fit, which may be secret.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    @field_validator("*", mode="after")
    @classmethod
    def _without_nul(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("holds a NUL character")
        return value


SectionType = TypeVar("SectionType", bound=Section)


class ModelSection(Section):
    """Which base model, and how it is loaded.

    Attributes:
        name: A directory, a `.gguf` file, or a name on the hub.
        revision: Branch, tag or commit on the hub.
        gguf_file: The GGUF file inside a hub repository or directory.
        dtype: Of the base weights. `auto`: bfloat16 on a GPU that has it, else float32.
        device: `auto` takes the GPU where there is one.
        attn_implementation: Passed on to transformers (`sdpa`, `eager`, `flash_attention_2`, a kernel on the hub, …).
        load_in_4bit: QLoRA: base weights in 4-bit NF4, by bitsandbytes.
        trust_remote_code: Run code that comes with the model, or a kernel on the hub.
    """

    name: str
    revision: str | None = None
    gguf_file: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    attn_implementation: str | None = None
    load_in_4bit: bool = False
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _kernels_are_code(self) -> ModelSection:
        if "/" in (self.attn_implementation or "") and not self.trust_remote_code:
            raise ValueError(
                f"attn_implementation: {self.attn_implementation} is code from the hub, which isn't run. Where you "
                "trust it, set trust_remote_code=true"
            )
        return self


class AdapterSection(Section):
    """The LoRA adapter, in peft's own words. `adapter: null` fine-tunes the whole model."""

    r: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    target_modules: str | list[str] = "all-linear"
    use_dora: bool = False
    use_rslora: bool = False


class PromptSection(Section):
    """How a prompt becomes text, where the tokenizer's own chat template is not to be used.

    Attributes:
        template: Plain text around one user turn, with `{prompt}` in it.
        chat_template: A Jinja chat template; in a recipe's file or an override, also the path of a file with one.
    """

    template: str | None = None
    chat_template: str | None = None

    @field_validator("chat_template")
    @classmethod
    def _text_itself(cls, value: str | None) -> str | None:
        """No file is opened by a name in it: a recipe may come from anybody's run directory."""
        if value is not None and "{" not in value:
            raise ValueError("no Jinja template: it has no { in it")
        return value

    @model_validator(mode="after")
    def _one_of_them(self) -> PromptSection:
        if self.template is not None and self.chat_template is not None:
            raise ValueError("set template or chat_template, not both")
        if self.template is not None and self.template.count("{prompt}") != 1:
            raise ValueError("template must contain {prompt} exactly once")
        return self


class ReasoningGymSection(Section):
    """Arguments of a `reasoning_gym:TASK` source; `args` are the task's own."""

    size: int = Field(1000, ge=1)
    seed: int = 0
    args: dict[str, Any] = {}


class DataSection(Section):
    """The supervised dataset.

    Attributes:
        source: A JSON, JSONL, CSV or Parquet file, a directory of them, `reasoning_gym:TASK`, or a
            dataset on the hub.
        config: Configuration of a hub dataset.
        split: Split of a hub dataset.
        revision: Branch, tag or commit of a hub dataset.
        columns: Where the columns have other names: any of `messages`, `system`, `prompt`, `input`,
            `response` to the dataset's own column.
        turns: Which assistant turns of a conversation are responses.
        limit: Use this many examples at most, the first ones.
        held_out: Never trained on: a number of examples, or a share below 1.
        max_prompt_tokens: A longer prompt is over-long.
        max_length: Prompt and response together, in tokens.
        overlong: What to do with an over-long example.
        reasoning_gym: Arguments of a `reasoning_gym:` source.
    """

    source: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: dict[Literal["messages", "system", "prompt", "input", "response"], str] = {}
    turns: Literal["last", "first", "all"] = "last"
    limit: int | None = Field(None, ge=1)
    held_out: int | float = 0.05
    max_prompt_tokens: int = Field(512, ge=1)
    max_length: int = Field(1024, ge=2)
    overlong: Literal["drop", "truncate_prompt_left"] = "drop"
    reasoning_gym: ReasoningGymSection = ReasoningGymSection()

    @field_validator("held_out")
    @classmethod
    def _count_or_share(cls, value: int | float) -> int | float:
        if value < 0 or (isinstance(value, float) and value >= 1):
            raise ValueError("give a number of examples (10) or a share below 1 (0.05)")
        return value

    @model_validator(mode="after")
    def _prompt_within_length(self) -> DataSection:
        if self.max_prompt_tokens >= self.max_length:
            raise ValueError("max_prompt_tokens must be below max_length, which counts the response too")
        return self


class GenerationSection(Section):
    """How the opponent answers.

    Attributes:
        engine: What generates. `auto`: vLLM on a GPU where it is installed and can serve the model and its
            adapters, else transformers.
        temperature: Of sampling.
        top_p: Nucleus sampling; 1 is off.
        top_k: Sampling from the k likeliest tokens; 0 is off.
        responses_per_prompt: Synthetic responses, and so pairs, for each prompt.
        max_new_tokens: A response is cut there, and gets no end-of-sequence token.
        batch_size: Responses decoded together; by default as many as fit into memory and are of use.
        shard_size: Prompts in one committed file: what an interruption can lose.
        max_prompts: Answer this many of the training prompts at most, the first ones.
    """

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    temperature: float = Field(1.0, gt=0.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0)
    responses_per_prompt: int = Field(1, ge=1)
    max_new_tokens: int = Field(256, ge=1)
    batch_size: int | None = Field(None, ge=1)
    shard_size: int = Field(128, ge=1)
    max_prompts: int | None = Field(None, ge=1)


class TrainerSection(Section):
    """Settings of transformers' Trainer, under the names they have in its TrainingArguments.

    Those declared here have defaults of ours; any other field of TrainingArguments may be given too,
    but for those that a run has to decide itself.
    """

    model_config = ConfigDict(extra="allow")

    DECIDED_BY_THE_RUN: ClassVar[frozenset[str]] = frozenset(
        {
            "output_dir",
            "seed",
            "data_seed",
            "do_train",
            "do_eval",
            "do_predict",
            "resume_from_checkpoint",
            "remove_unused_columns",
            "logging_strategy",
            "logging_nan_inf_filter",
            "save_strategy",
            "save_total_limit",
            "save_only_model",
            "eval_strategy",
            "eval_steps",
            "eval_delay",
            "eval_on_start",
            "load_best_model_at_end",
            "metric_for_best_model",
            "greater_is_better",
            "label_names",
            "auto_find_batch_size",
            "push_to_hub",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
            "use_cpu",
            "local_rank",
            "disable_tqdm",
            "ignore_data_skip",
            "label_smoothing_factor",
            "train_sampling_strategy",
            "dataloader_drop_last",
            "length_column_name",
            "per_device_eval_batch_size",
            "prediction_loss_only",
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "batch_eval_metrics",
            "include_for_metrics",
        }
    )

    per_device_train_batch_size: int = Field(64, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    max_steps: int = -1
    optim: str = "adamw_torch"
    weight_decay: float = 0.0
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0.1
    max_grad_norm: float = 1.0
    logging_steps: int = Field(1, ge=1)
    save_steps: int = Field(50, ge=1)
    report_to: str | list[str] = "none"

    @model_validator(mode="after")
    def _names_of_training_arguments(self) -> TrainerSection:
        for name, value in (self.model_extra or {}).items():
            if name in self.DECIDED_BY_THE_RUN:
                raise ValueError(f"{name} is decided by the run, take it out")
            types = _training_arguments()
            if name not in types:
                known = types.keys() | type(self).model_fields.keys()
                raise ValueError(f"unknown key {name!r}{_nearest(name, known - self.DECIDED_BY_THE_RUN)}")
            try:
                TypeAdapter(types[name]).validate_python(value, strict=True)
            except ValidationError as error:
                raise ValueError(f"{name}: {error.errors()[0]['msg']}, got {value!r}") from None
        if self.save_steps % self.logging_steps:
            raise ValueError("save_steps must be a multiple of logging_steps, so that a resumed run logs the same")
        return self

    @property
    def precision(self) -> str:
        """`bf16` or `fp16`, where the forward pass is computed in that; else empty."""
        return next((name for name in ("bf16", "fp16") if (self.model_extra or {}).get(name)), "")

    def arguments(self) -> dict[str, Any]:
        """The section as keyword arguments of TrainingArguments."""
        return {k: v for k, v in self.model_dump().items() if k not in SPIN_KEYS}


class SFTSection(TrainerSection):
    """The supervised stage before self-play. `sft: null` starts from the model as it is."""

    learning_rate: float = Field(2e-4, gt=0)
    num_train_epochs: float = Field(1.0, gt=0)


class TrainingSection(TrainerSection):
    """The main player's training; the lists have a value for each iteration.

    Attributes:
        beta: The paper's lambda.
        loss: Logistic is the paper's; the first four are covered by its theory, the other two are SPACE's and T-SPIN's.
        replay: Add the pairs of this many previous iterations (the paper: 1).
        learning_rate: Peak. Default: 5e-5 with an adapter, 5e-7 (the paper's) without.
        num_train_epochs: Passes over the pairs.
        nll_weight: Add the real response's negative log-likelihood a token, times this.
        length_normalised: Take log-probs per token.
        noise_ratio: The noise_contrastive loss's mu.
        history_weight: The triplet loss's weight of the historical advantage.
        mixture: Measure the main player against a geometric mixture of this and past opponents: weights, this
            iteration's opponent first, or `uniform` over all of them.
        regenerate_every: Let the main player answer anew for every so many steps.
        skip_nonfinite: Skip so many steps, in each iteration, whose loss or gradient is NaN or infinite; the next one
            ends the run.
    """

    beta: Schedule = 0.1
    loss: Literal["logistic", "hinge", "exponential", "correlation", "noise_contrastive", "triplet"] = "logistic"
    replay: int = Field(1, ge=0)
    learning_rate: Schedule | None = None
    num_train_epochs: Schedule = 1.0
    nll_weight: float = Field(0.0, ge=0)
    length_normalised: bool = False
    noise_ratio: float = Field(1.0, gt=0)
    history_weight: float = Field(1.0, ge=0)
    mixture: list[float] | Literal["uniform"] | None = None
    regenerate_every: int | None = Field(None, ge=1)
    skip_nonfinite: int = Field(0, ge=0)

    @field_validator("beta", "learning_rate", "num_train_epochs")
    @classmethod
    def _positive(cls, value: Schedule | None) -> Schedule | None:
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            if number <= 0:
                raise ValueError("must be above 0")
        return value

    @field_validator("mixture")
    @classmethod
    def _weights(cls, value: list[float] | str | None) -> list[float] | str | None:
        if isinstance(value, list) and (not value or min(value) < 0 or value[0] == 0):
            raise ValueError("give weights of at least 0, the first (this iteration's opponent's) above 0")
        return value

    @model_validator(mode="after")
    def _read_by_the_loss(self) -> TrainingSection:
        for key, loss in (("noise_ratio", "noise_contrastive"), ("history_weight", "triplet")):
            if key in self.model_fields_set and getattr(self, key) != 1.0 and self.loss != loss:
                raise ValueError(f"{key} is read with loss: {loss} only")
        is_scaled = self.precision == "fp16" and not self.max_grad_norm
        deepspeed = (self.model_extra or {}).get("deepspeed")
        if self.skip_nonfinite and (reason := unskippable(self.optim, deepspeed, is_scaled)):
            raise ValueError(f"skip_nonfinite: {reason}")
        if self.loss == "triplet" and self.mixture is not None:
            raise ValueError("mixture: the triplet loss has no opponent's log-probs that could be mixed")
        if self.regenerate_every is not None and self.mixture is not None:
            raise ValueError("mixture: past opponents don't score what regenerate_every makes: choose one of them")
        return self

    def objective(self) -> dict[str, Any]:
        """What decides the loss of a pair, `beta` aside."""
        return {key: getattr(self, key) for key in OBJECTIVE_KEYS}


OBJECTIVE_KEYS = ("loss", "nll_weight", "length_normalised", "noise_ratio", "history_weight")
SPIN_KEYS = frozenset({"beta", "replay", "mixture", "regenerate_every", "skip_nonfinite", *OBJECTIVE_KEYS})
"""The keys of `training` that are ours and not the Trainer's."""

Measure = Literal["accuracy_sampled", "accuracy_greedy", "real_nll", "truncation_rate", "repetition_rate"]


class EvaluationSection(Section):
    """What is measured on the held-out part, for the starting model and after every iteration.

    Attributes:
        select_by: The measure that names the best iteration. `auto`: sampled accuracy where the data
            has a verifier, else the real responses' negative log-likelihood.
        greedy: Generate greedily too (the sampled responses are always made: they are what
            discriminability is measured on).
        samples_per_prompt: Sampled responses for each held-out prompt.
        control: Train the starting model by SFT for the same number of steps, and measure that too.
    """

    select_by: Measure | Literal["auto"] = "auto"
    greedy: bool = True
    samples_per_prompt: int = Field(1, ge=1)
    control: bool = False


class StopSection(Section):
    """When the loop ends before its last iteration.

    Attributes:
        patience: After so many iterations in a row that didn't better the measure of `evaluation.select_by` beyond
            noise, against the last player that did.
        min_discriminability: When a main player tells its opponent from people on a smaller share of held-out pairs.
    """

    patience: int | None = Field(None, ge=1)
    min_discriminability: float | None = Field(None, gt=0, lt=1)

    @property
    def is_asked_for(self) -> bool:
        return self.patience is not None or self.min_discriminability is not None


class WarningsSection(Section):
    """From where on an iteration is warned about; null switches a warning off.

    Attributes:
        real_nll_rise: Nats a token that the held-out real responses may become less likely by.
        early_reward_accuracy: Above this in the first fifth of the steps, there is a shortcut.
        late_reward_accuracy: Below this in the last fifth, nothing is told apart.
        length_ratio: Of synthetic and real lengths, whichever is longer.
        truncation_rate: Share of synthetic responses cut at the cap.
        repetition_excess: Repeated 4-grams in synthetic responses beyond those in real ones.
        diversity_ratio: Distinct-2 of synthetic responses over that of real ones, below which they are too alike.
        identical_share: Of synthetic responses that equal the real one.
        grad_norm_ratio: Of a gradient norm that is clipped to the median of those around it.
        skipped_nonfinite: Steps skipped for a NaN or an infinity.
        drift: Nats a token from the starting player, on held-out prompts.
    """

    real_nll_rise: float | None = Field(0.0, ge=0)
    early_reward_accuracy: float | None = Field(0.95, gt=0, lt=1)
    late_reward_accuracy: float | None = Field(0.55, gt=0, lt=1)
    length_ratio: float | None = Field(1.5, gt=1)
    truncation_rate: float | None = Field(0.1, ge=0, lt=1)
    repetition_excess: float | None = Field(0.1, ge=0, lt=1)
    diversity_ratio: float | None = Field(0.7, gt=0)
    identical_share: float | None = Field(0.5, gt=0, lt=1)
    grad_norm_ratio: float | None = Field(10.0, gt=1)
    skipped_nonfinite: int | None = Field(0, ge=0)
    drift: float | None = Field(0.5, gt=0)


class Recipe(Section):
    """Everything a run is told.

    Attributes:
        run_dir: Where everything that the run makes is kept.
        iterations: T, rounds of self-play.
        seed: Of every random choice.
        tokens_per_pass: Tokens that go through the model together, in training and in scoring; by default 2,048, on
            a CPU 384 and 1,024.
        layout: How they are laid out; `auto` is the fastest that the model computes rightly.
        keep: Which of an iteration's checkpoints is its main player: the last, or the one that is best by the measure
            of `evaluation.select_by`.
    """

    run_dir: str
    iterations: int = Field(3, ge=1)
    seed: int = 0
    tokens_per_pass: int | None = Field(None, ge=1)
    layout: Literal["auto", "shared", "packed", "plain"] = "auto"
    keep: Literal["last", "best"] = "last"
    model: ModelSection
    data: DataSection
    adapter: AdapterSection | None = AdapterSection()
    prompt: PromptSection = PromptSection()
    sft: SFTSection | None = None
    generation: GenerationSection = GenerationSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    stop: StopSection = StopSection()
    warnings: WarningsSection = WarningsSection()

    @model_validator(mode="before")
    @classmethod
    def _default_learning_rate(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("training", {}), dict):
            training = dict(values.get("training", {}))
            if training.get("learning_rate") is None:
                training["learning_rate"] = 5e-7 if values.get("adapter", "lora") is None else 5e-5
            values = {**values, "training": training}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for key in ("beta", "learning_rate", "num_train_epochs"):
            value = getattr(self.training, key)
            if isinstance(value, list) and len(value) != self.iterations:
                raise ValueError(
                    f"training.{key} has {len(value)} values for {self.iterations} iterations: give one each"
                )
        if self.model.load_in_4bit and self.adapter is None:
            raise ValueError("model.load_in_4bit needs an adapter: 4-bit weights can't be trained themselves")
        if self.evaluation.control and self.sft is None:
            raise ValueError("evaluation.control continues the SFT stage: give the sft section too")
        if not self.evaluation.greedy and self.evaluation.select_by == "accuracy_greedy":
            raise ValueError("evaluation.select_by is accuracy_greedy, but evaluation.greedy is off")
        return self

    @model_validator(mode="after")
    def _whole_models(self) -> Recipe:
        sharded = {"deepspeed", "fsdp"} & (self.training.model_extra or {}).keys()
        for key, is_on in (("keep: best", self.keep == "best"), ("training.regenerate_every", self._regenerates)):
            if is_on and sharded:
                raise ValueError(f"{key} needs a whole model in each process: leave training.{sharded.pop()} out")
        return self

    @property
    def _regenerates(self) -> bool:
        return self.training.regenerate_every is not None

    @property
    def weights(self) -> Literal["adapter", "model"]:
        """What a training leaves, and what it is called in the run directory."""
        return "model" if self.adapter is None else "adapter"

    def differences(self, other: Recipe) -> list[str]:
        """The keys whose values differ, `run_dir` aside, as `key: mine -> theirs`."""
        mine, theirs = _flat(self.model_dump()), _flat(other.model_dump())
        return [
            f"{key}: {mine.get(key)!r} -> {theirs.get(key)!r}"
            for key in sorted(mine.keys() | theirs.keys())
            if key != "run_dir" and mine.get(key) != theirs.get(key)
        ]


def unskippable(optim: str, deepspeed: Any, is_scaled: bool) -> str | None:
    """Why no step can be skipped once its gradient is known. None: it can.

    Args:
        optim: The optimiser's name.
        deepspeed: Its configuration, where it is used.
        is_scaled: Whether the gradient is still scaled then, as float16 needs it.
    """
    if deepspeed or any(kind in optim.lower() for kind in ("lomo", "layerwise")):
        by = "deepspeed" if deepspeed else f"optim: {optim}"
        return f"{by} changes the weights before a step can be skipped: choose one of them"
    return "with fp16 it needs max_grad_norm above 0, for which the loss scale is taken out" if is_scaled else None


def at(schedule: Schedule, iteration: int) -> float:
    """A schedule's value in one iteration."""
    return schedule[iteration] if isinstance(schedule, list) else schedule


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: the file's keys, where there is one, then the overrides.

    Raises:
        UserError: The file can't be read, isn't YAML, or doesn't fit the schema.
    """
    path = None if path is None else Path(path)
    tree: dict[str, Any] = {} if path is None else read_yaml(path, "recipe")
    for override in overrides:
        tree = _merged(tree, _parse_override(override))
    tree.setdefault("run_dir", _default_run_dir(path, tree))
    where = str(path) if path else "the command line"
    return recipe_from(_with_chat_template(tree, where), where)


def _with_chat_template(tree: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The tree with the template's text in place of its file's name: the recipe holds what the run depends on."""
    prompt = tree.get("prompt")
    name = prompt.get("chat_template") if isinstance(prompt, Mapping) else None
    if not isinstance(name, str) or "{" in name:
        return tree
    try:
        return _merged(tree, {"prompt": {"chat_template": _read_text(Path(name))}})
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: prompt.chat_template: {name}: can't be read: {error}") from None


def recipe_from(tree: Mapping[str, Any], where: str) -> Recipe:
    """Validate a recipe's tree of values.

    Raises:
        UserError: With one line for each key that doesn't fit.
    """
    refuse_secrets(tree, where)
    return validated(Recipe, tree, where)


_SECRET_KEY = re.compile(r"(api_?key|(^|hub_|hf_|auth_|access_|api_)token|password|secret)$", re.IGNORECASE)
_URL_WITH_SECRET = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]*@", re.IGNORECASE)


def refuse_secrets(value: Any, where: str, key: str = "") -> None:
    """A recipe is kept in the run directory and shown in the report.

    Raises:
        UserError: Something in it is a key, a token or a password, which isn't repeated.
    """
    if isinstance(value, Mapping | list):
        for name, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            refuse_secrets(each, where, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str) and (
        (value and _SECRET_KEY.search(key.rpartition(".")[2])) or _URL_WITH_SECRET.match(value)
    ):
        raise UserError(
            f"{where}: {key}: holds a secret, and a recipe is kept in the run and shown in its report: take it out, "
            "and give it in the environment (HF_TOKEN for the hub, WANDB_API_KEY for Weights & Biases)"
        )


def validated(schema: type[SectionType], tree: Mapping[str, Any], where: str) -> SectionType:
    """A tree of values as a schema has them.

    Raises:
        UserError: With one line for each key that doesn't fit.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(dict(problem), schema) for problem in error.errors()]
        raise UserError(f"{where}: " + "\n".join(dict.fromkeys(lines))) from None


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Args:
        path: The file.
        what: What it is meant to be, for messages: `recipe`, …

    Raises:
        UserError: It can't be read, or holds something else.
    """
    try:
        text = _read_text(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what} file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    tree = _parsed_yaml(text, f"{path}:")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a {what} is a mapping of sections; this is {type(tree).__name__}")
    return tree


LARGEST_FILE = 100_000
"""Bytes of a recipe or a template; one of some kilobytes is long."""

MOST_VALUES = 100_000
"""In a YAML document, what its aliases stand for counted as often as it stands there."""


def _read_text(path: Path) -> str:
    """A small file. A pipe or a device, which may have no end, isn't waited for.

    Raises:
        OSError: It can't be read.
        ValueError: It is no file, is too large, or isn't UTF-8.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError("it is neither a file nor a directory")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"it has more than {LARGEST_FILE:,} bytes")
    return path.read_text(encoding="utf-8")


def _parsed_yaml(text: str, where: str) -> Any:
    """What a YAML document says; `where` begins the messages.

    Raises:
        UserError: It isn't valid, or holds more than any recipe.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST_VALUES:
            raise UserError(f"{where} too large: more than {MOST_VALUES:,} values, or an alias in what it stands for")
        return loader.construct_document(node)
    except RecursionError:
        raise UserError(f"{where} not valid YAML: nested too deeply") from None
    except UserError:
        raise
    except Exception as error:  # besides YAMLError what its constructors come to: a date like 2024-02-31, !!bool x
        raise UserError(f"{where} not valid YAML: {error}") from None


def _size(node: yaml.Node, known: dict[yaml.Node, float]) -> float:
    """How many values a node holds, aliases written out; infinite where one stands inside itself."""
    if node not in known:
        known[node] = math.inf
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = children if isinstance(node, yaml.MappingNode) else [(child,) for child in children]
        known[node] = 1 + sum(_size(child, known) for pair in pairs for child in pair)
    return known[node]


class _Loader(yaml.SafeLoader):
    """The safe loader, but one that reads 5e-7 as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{override!r}: an override is written section.key=value, for example training.beta=0.2")
    value = _parsed_yaml(text, f"{override!r}: the value is")
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return dict(value)


def _merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _default_run_dir(path: Path | None, tree: Mapping[str, Any]) -> str:
    if path is not None:
        return f"runs/{path.stem}"
    given = _flat(tree)
    names = [Path(str(given.get(key, key)).replace(":", "-")).name for key in ("model.name", "data.source")]
    return "runs/" + "-".join(re.sub(r"\.(gguf|jsonl?|ndjson|csv|parquet)$", "", name) for name in names)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _explain(problem: dict[str, Any], schema: type[BaseModel]) -> str:
    """One pydantic problem in plain words."""
    place = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        known = _known_keys(schema, place[:-1])
        return f"{'.'.join(place)}: unknown key{_nearest(place[-1], known)}"
    if problem["type"] == "missing":
        return f"{'.'.join(place)}: missing, and there is no default"
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = "" if problem["type"] == "value_error" else f", got {problem['input']!r}"
    path = ".".join(part for part in place if not _is_type_name(part))
    return f"{path}: {message}{given}" if path else message


def _is_type_name(part: str) -> bool:
    """Whether pydantic put this part there to say which member of a union it tried, or that a key is meant."""
    return part in {"int", "float", "str", "none", "[key]"} or part.startswith(("list[", "literal[", "dict["))


def _known_keys(schema: type[BaseModel], place: Sequence[str]) -> Iterable[str]:
    for part in place:
        field = schema.model_fields.get(part)
        if field is None:
            continue
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        schema = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), schema)
    return schema.model_fields


def _nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    return nearest(name, known) or "; known keys: " + ", ".join(known)


def _training_arguments() -> dict[str, Any]:
    """The Trainer's own settings and their types; imports torch, so only where one of them is given."""
    from transformers import TrainingArguments

    types = typing.get_type_hints(TrainingArguments)
    return {field.name: types[field.name] for field in dataclasses.fields(TrainingArguments)}

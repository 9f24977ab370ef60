"""One base model in memory, and the adapter that says who it is.

The opponent is the base with the adapter that an iteration committed; the main player continues from
the same adapter. Base weights are never copied, written or merged. In full fine-tuning a player is a
whole model, and the one in memory is dropped before the next is loaded.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from spinlm.config import AdapterSection, ModelSection
from spinlm.errors import UserError, first_line
from spinlm.files import digest, file_hash, read_json
from spinlm.hardware import release_memory
from spinlm.paths import found
from spinlm.players.weights import commit_of, refuse_pickled_adapter, refuse_pickles

transformers.utils.logging.disable_progress_bar()

WEIGHT_FILES = ("*.safetensors", "*.gguf", "config.json")


@dataclass(frozen=True)
class Player:
    """A set of weights, named by its hash.

    Attributes:
        name: For people: `base`, `sft`, `iteration-0`, …
        path: A committed adapter, or in full fine-tuning a committed model; None is the base model.
        hash: Of the artifact, or of the base model.
    """

    name: str
    path: Path | None
    hash: str


class Players:
    """Loads the base once and seats one player at a time on it.

    Attributes:
        device: Where the model is.
    """

    def __init__(
        self, model: ModelSection, adapter: AdapterSection | None, precision: str = "", commit: str | None = None
    ) -> None:
        """Nothing is loaded yet.

        Args:
            model: Which base model.
            adapter: None for full fine-tuning.
            precision: Of the training forward pass, `bf16` or `fp16` autocast: scoring then has it, too.
            commit: Of a model on the hub, where it is known which one its name and revision stood for.

        Raises:
            UserError: The device isn't there, or an extra isn't installed.
        """
        self._section = model
        self._adapter = adapter
        self._precision = precision
        self._asked_for = commit or model.revision
        self._model: Any = None
        self._seated: str | None = None
        self._use_cache: bool | None = None
        self._has_said = False
        self.device = find_device(model.device)
        if model.load_in_4bit:
            _require_bitsandbytes()

    # --- who plays ---

    def opponent(self, player: Player) -> Any:
        """The model as this player, in evaluation mode."""
        if self._seated != player.hash:
            self._seat(player, trainable=False)
        self._model.eval()
        return self._model

    @contextmanager
    def as_exported(self, player: Player) -> Iterator[Any]:
        """The player, answering for a while by the model's own generation settings, as one that is exported does."""
        model = self.opponent(player)
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        plain, whole.generation_config = whole.generation_config, self._generation_config()
        try:
            yield model
        finally:
            whole.generation_config = plain

    def main_player(self, start: Player, seed: int) -> Any:
        """The model as this player, ready to be trained on from there."""
        self._seat(start, trainable=True, seed=seed)
        self._seated = None  # its weights are about to change
        return self._model

    def forget(self) -> None:
        """Drop the model: the next player is loaded afresh."""
        self._model = self._seated = None
        release_memory()

    def autocast(self) -> torch.autocast:
        """The precision of the training forward pass, for whoever has to compute the same."""
        dtype = torch.float16 if self._precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=bool(self._precision))

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the forward pass rounds to."""
        if self._section.load_in_4bit:
            return torch.bfloat16
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._precision) or self._dtype()

    def _seat(self, player: Player, trainable: bool, seed: int = 0) -> None:
        if self._adapter is None:
            self.forget()
            self._model = self._load_base(player.path)
            self._model.requires_grad_(trainable)
        else:
            self._seat_adapter(player, trainable, seed)
        self._seated = player.hash

    def _seat_adapter(self, player: Player, trainable: bool, seed: int) -> None:
        from peft import PeftModel

        base = self._bare_base()
        if player.path is not None:
            refuse_pickled_adapter(player.path)
            self._model = PeftModel.from_pretrained(
                base, str(player.path), is_trainable=trainable, config=self._lora_config(base)
            )
        elif trainable:
            torch.manual_seed(seed)
            self._model = self._new_adapter(base)
        else:
            self._model = base

    def _new_adapter(self, base: Any) -> Any:
        """A fresh adapter: it changes nothing until it is trained."""
        from peft import get_peft_model

        try:
            return get_peft_model(base, self._lora_config(base))
        except ValueError as error:
            raise UserError(f"adapter: peft refuses these settings for {self._section.name}: {error}") from None

    def _lora_config(self, base: Any) -> Any:
        """The recipe's; what a file beside an adapter's weights says isn't read."""
        from peft import LoraConfig

        assert self._adapter is not None
        return LoraConfig(task_type="CAUSAL_LM", **_lora_arguments(self._adapter, base))

    def _bare_base(self) -> Any:
        from peft import PeftModel

        if isinstance(self._model, PeftModel):
            base = self._model.unload()
            if hasattr(base, "peft_config"):
                del base.peft_config
            self._model = base
        if self._model is None:
            self._model = self._load_base(None)
        self._model.requires_grad_(False)
        return self._model

    def sketch(self) -> Any:
        """The main player at its start, of shapes alone: on the meta device, without weights.

        Raises:
            UserError: The configuration can't be read, or the adapter doesn't fit the model.
        """
        wanted = self._section.attn_implementation
        try:
            with torch.device("meta"):
                base = AutoModelForCausalLM.from_config(
                    self.config,
                    dtype=self._dtype(),
                    trust_remote_code=self._section.trust_remote_code,
                    attn_implementation=wanted if wanted == "eager" else None,  # of the others each takes as much
                )
                switch_off_dropout(base)
                base.requires_grad_(self._adapter is None)
                return base if self._adapter is None else self._new_adapter(base)
        except (ValueError, KeyError, ImportError) as error:
            raise UserError(f"model.name: {self._section.name} can't be built: {first_line(error)}") from None

    # --- loading ---

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer.

        Raises:
            UserError: It can't be loaded.
        """
        return self._read(AutoTokenizer, "the tokenizer of ")

    @cached_property
    def config(self) -> Any:
        """The base model's configuration, read without its weights.

        Raises:
            UserError: It can't be loaded.
        """
        config = self._read(AutoConfig)
        self._refuse_pickles()
        return config

    def _refuse_pickles(self) -> None:
        name, arguments = self._source()
        if "gguf_file" not in arguments:
            refuse_pickles(name, self.revision)

    def _read(self, kind: Any, what: str = "") -> Any:
        name, arguments = self._source()
        self._say_that_code_runs()
        try:
            return kind.from_pretrained(name, **arguments)
        except Exception as error:  # whatever its files hold
            at = f" at {self.revision}" if self.revision else ""
            raise self._unloadable(f"{what}{self._section.name}{at}", error) from None

    def _unloadable(self, what: str, error: Exception) -> Exception:
        """What to say of a model that can't be loaded; the error itself, where that isn't the model's fault."""
        if isinstance(error, (UserError, MemoryError, torch.OutOfMemoryError)):
            return error
        if "trust_remote_code" in str(error):
            return UserError(
                f"model.name: {what} comes with code of its own, which isn't run. Read it; where you trust it, and "
                "what it may become (pin model.revision to a commit), set model.trust_remote_code=true"
            )
        return UserError(f"model.name: {what} can't be loaded: {first_line(error)}")

    def _say_that_code_runs(self) -> None:
        """Once, before it does, on standard error: standard output may be read by programs."""
        if self._section.trust_remote_code and not self._has_said and os.environ.get("LOCAL_RANK", "0") == "0":
            self._has_said = True
            name = self._section.name
            at = "" if found(name) else f" at {self.revision or 'its newest revision'}"
            print(f"model.trust_remote_code: runs code that comes with the model: {name}{at}", file=sys.stderr)

    def stop_ids(self) -> list[int]:
        """The tokens that the model's own generation settings stop at."""
        eos = self._generation_config().eos_token_id
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    def base_player(self) -> Player:
        """The base model as a player, hashed by its weights (by its commit, on the hub)."""
        directory = Path(self._section.name)
        if directory.is_file():
            identity: Any = file_hash(directory)
        elif directory.is_dir():
            files = sorted({path for pattern in WEIGHT_FILES for path in directory.glob(pattern)})
            identity = {path.name: file_hash(path) for path in files}
        else:
            identity = [self._section.name, self.commit]
        return Player("base", None, digest([identity, self._section.dtype, self._section.load_in_4bit]))

    @cached_property
    def commit(self) -> str | None:
        """The commit that a model on the hub is read at, whatever its branch becomes; None for one that isn't there."""
        name, file = self._section.name, self._section.gguf_file or "config.json"
        return None if found(name) else commit_of(name, self._asked_for, file)

    @property
    def revision(self) -> str | None:
        """What each of the model's files is asked for by: its commit, or where that isn't known what stands for it."""
        return self.commit or self._asked_for

    def _source(self) -> tuple[str, dict[str, Any]]:
        """What to hand to transformers' from_pretrained."""
        section = self._section
        arguments: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
        path = Path(section.name)
        if path.suffix == ".gguf":
            if not path.is_file():
                raise UserError(f"model.name: {path}: no such file")
            return str(path.parent), arguments | {"gguf_file": path.name}
        if section.gguf_file is not None:
            arguments["gguf_file"] = section.gguf_file
        if section.name.startswith(("/", "./", "../", "~")) and not path.is_dir():
            raise UserError(f"model.name: {section.name}: no such directory")
        if self.revision is not None:
            arguments["revision"] = self.revision
        return section.name, arguments

    def _load_base(self, path: Path | None) -> Any:
        unset_hf_deepspeed_config()  # always loaded whole: ZeRO shards it when a trainer takes it
        name, arguments = self._source()
        if path is not None:
            name, arguments = str(path), {"trust_remote_code": self._section.trust_remote_code}
            refuse_pickles(name)
        else:
            self._refuse_pickles()
        self._say_that_code_runs()
        if self._section.attn_implementation is not None:
            arguments["attn_implementation"] = self._section.attn_implementation
        if self._section.load_in_4bit:
            arguments["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        try:
            model, loaded = AutoModelForCausalLM.from_pretrained(
                name, dtype=self._dtype(), output_loading_info=True, use_safetensors=True, **arguments
            )
        except Exception as error:  # whatever its files hold
            raise self._unloadable(name, error) from None
        if loaded["missing_keys"]:
            missing = ", ".join(sorted(loaded["missing_keys"])[:3])
            raise UserError(f"model.name: {name} has no weights for {missing}, …: they would be random numbers")
        switch_off_dropout(model)
        self._use_cache = getattr(model.config, "use_cache", None)
        if not self._section.load_in_4bit:
            model = model.to(self.device)
        model.generation_config = _plain_generation_config(model.generation_config)
        _forget_quantisation_of_the_file(model)
        return model

    def _generation_config(self) -> GenerationConfig:
        name, arguments = self._source()
        arguments.pop("gguf_file", None)
        try:
            return GenerationConfig.from_pretrained(name, **arguments)
        except OSError:
            return GenerationConfig.from_model_config(self.config)
        except Exception as error:  # whatever its file holds
            raise self._unloadable(f"the generation settings of {name}", error) from None

    def _dtype(self) -> torch.dtype:
        if self._section.dtype != "auto":
            return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self._section.dtype]
        frozen_on_gpu = self._adapter is not None and self.device.type == "cuda"
        return torch.bfloat16 if frozen_on_gpu and torch.cuda.is_bf16_supported() else torch.float32

    # --- saving ---

    def save(self, model: Any, directory: Path, state_dict: dict[str, Any] | None = None) -> None:
        """Write a player: its adapter, or in full fine-tuning the whole model. The same weights, the same bytes."""
        if self._use_cache is not None:
            model.config.use_cache = self._use_cache  # the Trainer turns it off
        unneeded = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
        model.save_pretrained(directory, state_dict=state_dict, **unneeded)
        (directory / "README.md").unlink(missing_ok=True)
        config = directory / "adapter_config.json"
        if config.exists():
            config.write_text(json.dumps(_sorted_lists(read_json(config)), indent=2, sort_keys=True) + "\n")

    def merged(self, player: Player) -> Any:
        """The player as a model without adapter, for export. Ends the use of these Players."""
        model = self.opponent(player)
        merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        merged.generation_config = self._generation_config()
        merged.config.use_cache = self._use_cache
        return merged


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def context_length(config: Any) -> int | None:
    """The most tokens a model takes, where it has such a limit (Mamba has none)."""
    text_config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def check_vocabulary(tokenizer: Any, config: Any) -> None:
    """Refuse a tokenizer with tokens that the model has no embedding for.

    Raises:
        UserError: With both sizes.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if size is not None and highest >= size:
        raise UserError(
            f"model.name: the tokenizer has token ids up to {highest}, but the model's vocabulary has {size} entries: "
            "they don't belong together. Use the tokenizer that the model was trained with."
        )


def find_device(name: str) -> torch.device:
    """The device that `model.device` means on this machine.

    Raises:
        UserError: It isn't there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device: {name!r} is not a device; give auto, cpu, cuda or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"model.device: {name} asked for, but this machine shows {torch.cuda.device_count()} GPUs; "
            "set model.device=auto, or install a torch build for your GPU"
        )
    if device.type == "cuda" and device.index is not None:
        raise UserError(f"model.device: give cuda, and choose the GPU by CUDA_VISIBLE_DEVICES={device.index}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("model.device: mps asked for, but it is not available here; set model.device=auto")
    return device


def _require_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError("model.load_in_4bit needs bitsandbytes: pip install 'spinlm[4bit]'") from None


def _lora_arguments(adapter: AdapterSection, base: Any) -> dict[str, Any]:
    arguments = adapter.model_dump()
    if adapter.target_modules == "all-linear" and base.config.model_type in {"mamba", "falcon_mamba", "mamba2"}:
        # Mamba's kernels read the weights of the other projections directly, past any adapter.
        arguments["target_modules"] = ["in_proj"]
    return arguments


def switch_off_dropout(model: Any) -> None:
    """The base's own, not an adapter's: a main player has to start as its opponent, not beside it."""
    for place, module in model.named_modules():
        for name, value in vars(module).items():
            is_rate = "drop" in name or (name == "p" and isinstance(module, torch.nn.Dropout))
            if is_rate and isinstance(value, float) and "lora_dropout" not in place:
                setattr(module, name, 0.0)


def _plain_generation_config(config: GenerationConfig) -> GenerationConfig:
    """Only the special tokens: sampling is the recipe's, not what a model's authors recommend for chatting."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(config, name) for name in names})


def _forget_quantisation_of_the_file(model: Any) -> None:
    """A GGUF file's weights are plain floats once loaded; what is left of its format would forbid saving."""
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    if method is None and isinstance(getattr(model.config, "quantization_config", None), dict):
        method = model.config.quantization_config.get("quant_method")
    if str(method).endswith("gguf") or "GGUF" in str(method):
        del model.config.quantization_config
        model.hf_quantizer = None
        if hasattr(model, "is_quantized"):
            model.is_quantized = False


def _sorted_lists(config: dict[str, Any]) -> dict[str, Any]:
    """peft writes sets as lists in an order that changes from one process to the next."""
    return {
        key: sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
        for key, value in config.items()
    }

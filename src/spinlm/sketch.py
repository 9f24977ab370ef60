"""A run's model as shapes without numbers, on which its passes are run to count what they take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

from spinlm.config import Recipe, TrainerSection
from spinlm.data.pairs import Group
from spinlm.errors import UserError, first_line
from spinlm.generation.packed_linear import packed_bytes
from spinlm.generation.slot_cache import supports_slots
from spinlm.players.attention import takes_segments
from spinlm.players.layouts import LAYOUTS, Layout, count_tokens, lay_out, opening_of
from spinlm.players.logprobs import (
    NO_SEGMENTS,
    Method,
    causal_lm,
    logits_argument,
    response_logprobs,
    scoring,
)
from spinlm.players.models import Players
from spinlm.players.tally import Tally
from spinlm.training.checkpoints import Arguments

NF4_BYTES = 0.5 + 4 / 64
"""Of a 4-bit weight: half a byte, and a float32 scale for 64 of them."""


@dataclass(frozen=True)
class Extent:
    """What the work of a forward pass depends on.

    Attributes:
        tokens: That go through the layers, padding included.
        responses: Those of responses, which go through the head.
        couples: Of a query and a key.
    """

    tokens: float = 0
    responses: float = 0
    couples: float = 0

    def __add__(self, other: Extent) -> Extent:
        return Extent(self.tokens + other.tokens, self.responses + other.responses, self.couples + other.couples)

    def __mul__(self, times: float) -> Extent:
        return Extent(self.tokens * times, self.responses * times, self.couples * times)


def extent_of(groups: Sequence[Group], layout: Layout) -> Extent:
    """Of one pass."""
    responses = sum(len(response) for one in groups for response in one.responses)
    tokens = count_tokens(groups, layout)
    if layout == "plain":
        rows = sum(len(one.responses) for one in groups)
        return Extent(tokens, responses, tokens * tokens / rows)
    opening = opening_of(groups, layout)
    couples = opening**2
    for one in groups:
        prompt = len(one.prompt_ids)
        prompts = 1 if layout == "shared" else len(one.responses)
        read = (max(0, len(response) - 1) for response in one.responses)
        couples += prompts * (prompt - opening) * prompt + sum(own * (prompt + own) for own in read)
    return Extent(tokens, responses, couples)


@dataclass(frozen=True)
class Work:
    """Floating-point operations for a token, a response token and a couple of query and key."""

    token: float
    response: float
    couple: float

    def of(self, extent: Extent) -> float:
        return self.token * extent.tokens + self.response * extent.responses + self.couple * extent.couples


@dataclass(frozen=True)
class Kept:
    """Bytes that a training step takes beyond the weights.

    Attributes:
        gradients: Of what is trained.
        optimizer: Its state.
        activations: And temporaries, at their most.
    """

    gradients: int
    optimizer: int
    activations: int


class Sketch:
    """The main player on fake tensors: torch follows shapes, dtypes and lifetimes, and allocates nothing.

    Attributes:
        method: The fastest that the model can compute at all; a run also checks that it is right.
        dtype: Of the forward pass.
    """

    def __init__(self, recipe: Recipe, players: Players, precision: str, load_in_4bit: bool, is_gpu: bool) -> None:
        """Build the model from its configuration.

        Raises:
            UserError: It can't be built, or its forward pass can't be followed without numbers.
        """
        self._precision = precision
        self._in_4bit = load_in_4bit
        self._is_gpu = is_gpu
        self._fake = FakeTensorMode()
        self._model = players.sketch()
        with self._fake:
            _fill(self._model)
        self._base = causal_lm(self._model)
        self.dtype = torch.bfloat16 if load_in_4bit else players.compute_dtype
        # Under ZeRO-3 the head can't be called by itself; lower stages are taken for it.
        by_deepspeed = bool((recipe.training.model_extra or {}).get("deepspeed"))
        self._fuses = self._base.get_output_embeddings() is not None and not by_deepspeed
        layouts = LAYOUTS if recipe.layout == "auto" else (recipe.layout,)
        self.method = self._find_method(layouts)

    # --- weights ---

    @property
    def trained(self) -> list[Tensor]:
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    @property
    def has_adapter(self) -> bool:
        return self._base is not self._model

    def adapter_bytes(self) -> int:
        """Of the adapter's weights."""
        return sum(parameter.nbytes for parameter in self.trained) if self.has_adapter else 0

    def weight_bytes(self) -> int:
        """Of the model's weights and buffers without the adapter."""
        whole: int = sum(tensor.nbytes for tensor in self._tensors()) - self.adapter_bytes()
        if not self._in_4bit:
            return whole
        head = self._base.get_output_embeddings()
        quantised: list[Tensor] = [module.weight for module in self._linears() if module is not head]
        return whole - sum(w.nbytes for w in quantised) + int(sum(NF4_BYTES * w.numel() for w in quantised))

    def packed_bytes(self, memory: int) -> int:
        """Of copies of the linear layers, as generation packs them on a CPU with so much memory."""
        return packed_bytes(self._model, memory) if supports_slots(self._model) else 0

    def _linears(self) -> Iterator[Any]:
        for name, module in self._model.named_modules():
            if type(module) in (nn.Linear, Conv1D) and "lora_" not in name:
                yield module

    def _tensors(self) -> list[Tensor]:
        return [*self._model.parameters(), *self._model.buffers()]

    # --- passes ---

    def training_step(self, section: TrainerSection, groups: Sequence[Group], several: bool) -> Kept:
        """What a step takes whose largest pass has these groups.

        Args:
            section: Settings of the Trainer.
            groups: Prompts and responses.
            several: Whether the step has other passes, so that gradients are there already.
        """
        settings, batch = section.arguments(), self._batch(groups)
        with self._checkpointing(settings), self._fake:
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter) if several else None
            with Tally([*self._tensors(), *(p.grad for p in self.trained if p.grad is not None)]) as tally:
                self._pass(batch, backward=True)
            peak = tally.peak
            for parameter in self.trained:  # an unused expert's, too
                parameter.grad = torch.empty_like(parameter) if parameter.grad is None else parameter.grad
            gradients = sum(p.grad.nbytes for p in self.trained if p.grad is not None)
            state, temporary = self._optimizer_step(settings)
            for parameter in self.trained:
                parameter.grad = None
        return Kept(gradients, state, max(peak if several else peak - gradients, temporary, 0))

    def scoring_pass(self, groups: Sequence[Group]) -> int:
        """Bytes of activations and temporaries."""
        batch = self._batch(groups)
        with self._fake, Tally(self._tensors()) as tally:
            self._pass(batch, backward=False)
        return int(tally.peak)

    def work(self, section: TrainerSection | None = None) -> Work:
        """Of a forward pass, or with a section of a forward and a backward pass with its settings."""
        # Nothing of these is padding: p + r - 1 tokens are read, r predicted.
        samples = [Group(range(p), [range(r)]) for p, r in ((9, 8), (25, 8), (9, 24), (41, 8))]
        rows, counted = [], []
        for sample in samples:
            batch = self._batch([sample])
            with self._checkpointing({} if section is None else section.arguments()), self._fake, Tally() as tally:
                self._pass(batch, backward=section is not None)
                for parameter in self.trained:
                    parameter.grad = None
            extent = extent_of([sample], self.method.layout)
            rows.append([1.0, extent.tokens, extent.responses, extent.couples])
            counted.append(float(tally.work))
        _, *by_extent = np.linalg.solve(
            np.array(rows), np.array(counted)
        ).tolist()  # the first: of a pass, next to none
        return Work(*by_extent)

    def decoding(self, prompts: int, tokens: int) -> tuple[int, int, int]:
        """Of generation: bytes kept for a token, its logits in float32, and what a pass over prompts takes beside.

        Args:
            prompts: In one pass.
            tokens: Of each.
        """
        a_token, vocabulary, _ = self._prefill(1, 1)  # sliding layers are kept whole: no window cuts a single token
        kept, _, peak = self._prefill(prompts, tokens)
        return a_token, 4 * vocabulary, peak - kept

    def _prefill(self, rows: int, tokens: int) -> tuple[int, int, int]:
        """Bytes of keys and values that a pass leaves, the vocabulary's size, and the pass's peak with those."""
        self._model.eval()
        with self._fake, torch.no_grad(), Tally(self._tensors()) as tally, self._autocast():
            ids = torch.zeros(rows, tokens, dtype=torch.long)
            output = self._model(input_ids=ids, use_cache=True, **logits_argument(self._model, 1))
        layers = getattr(getattr(output, "past_key_values", None), "layers", [])
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if hasattr(layer, "keys"))
        return kept, int(output.logits.shape[-1]), int(tally.peak)

    def _batch(self, groups: Sequence[Group]) -> Any:
        return {
            name: self._fake.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in lay_out(groups, self.method.layout, pad_id=0).items()
        }

    def _pass(self, batch: Any, backward: bool) -> None:
        self._model.train(backward)
        with scoring(self._model, self.method), torch.set_grad_enabled(backward):
            with self._autocast():
                loss = response_logprobs(self._model, batch).sum()
            if backward:
                loss.backward()  # type: ignore[no-untyped-call]

    def _optimizer_step(self, settings: dict[str, Any]) -> tuple[int, int]:
        """Bytes of the state, and the most that is there beside it."""
        names = ("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon")
        chosen = {name: settings[name] for name in names if name in settings}
        try:
            args = Arguments("unused", learning_rate=1.0, use_cpu=True, report_to="none", **chosen)
            kind, arguments = Trainer.get_optimizer_cls_and_kwargs(args, self._model)
        except (ValueError, TypeError) as error:
            raise UserError(f"optim: transformers' Trainer refuses these settings: {error}") from None
        except ImportError:
            return self._state_by_arithmetic(str(chosen.get("optim")))
        known = [*self.trained, *(p.grad for p in self.trained if p.grad is not None)]
        try:
            optimizer = kind(self.trained, **arguments)
            for group in optimizer.param_groups:
                if self._is_gpu and group.get("foreach", 0) is None and not group.get("fused"):
                    group["foreach"] = True  # torch's default there
            with Tally(known) as tally:
                optimizer.step()
        except (NotImplementedError, RuntimeError, TypeError):
            return self._state_by_arithmetic(str(chosen.get("optim")))
        return tally.live, tally.peak - tally.live

    def _state_by_arithmetic(self, name: str) -> tuple[int, int]:
        """Two moments, in 4 bytes or in one: for optimisers that can't be had or run without numbers."""
        return (2 if "8bit" in name else 8) * sum(parameter.numel() for parameter in self.trained), 0

    def _autocast(self) -> torch.autocast:
        dtype = torch.float16 if self._precision == "fp16" else torch.bfloat16
        return torch.autocast("cpu", dtype=dtype, enabled=bool(self._precision))

    @contextmanager
    def _checkpointing(self, settings: dict[str, Any]) -> Iterator[None]:
        """As the Trainer switches it on."""
        if not (settings.get("gradient_checkpointing") or settings.get("activation_checkpointing")):
            yield
            return
        with ExitStack() as stack:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
            stack.callback(self._model.gradient_checkpointing_disable)
            yield

    def _find_method(self, layouts: Sequence[Layout]) -> Method:
        problem = ""
        for layout in layouts:
            if layout != "plain" and not takes_segments(self._base):
                problem = f"layout {layout}: {NO_SEGMENTS}"
                continue
            self.method = Method(layout, fused_head=self._fuses)
            try:
                self.scoring_pass([Group(range(2), [range(2)])])
                return self.method
            except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
                problem = first_line(error)
        raise UserError(f"plan: this model's forward pass can't be followed without its weights: {problem}")


def _fill(model: nn.Module) -> None:
    """Fake tensors on a CPU in place of meta tensors, shared where those are."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    filled = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(filled, tensor.requires_grad) if is_parameter else filled
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]

"""Log-probs of responses in every layout, against transformers' own logits read one row at a time."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

import tiny
from spinlm.data.pairs import Group
from spinlm.errors import UserError
from spinlm.players import head
from spinlm.players import logprobs as logprobs_module
from spinlm.players.layouts import LAYOUTS, Layout, lay_out
from spinlm.players.logprobs import (
    Method,
    all_scores,
    choose_method,
    logprobs_from_logits,
    response_logprobs,
    score_groups,
    scoring,
    tolerance,
)
from spinlm.players.models import switch_off_dropout
from unit.players.families import RELATIVES, adapted, build_model, sharpened

ATTENTIVE = [family for family in tiny.FAMILIES if family != "mamba"]
TAKEN = [(family, layout) for family in ATTENTIVE for layout in LAYOUTS] + [("mamba", "plain")]
"""Each family with each layout that it takes."""

SHAPES = [(3, [1]), (20, [40, 7]), (1, [25, 1, 60]), (30, [2, 33]), (7, [7, 7, 90])]
"""Tokens of prompts and of their responses: very uneven; beyond GPT-Neo's window of 32 and Gemma3's of 16."""


def _groups(shapes: Sequence[tuple[int, list[int]]] = SHAPES, vocabulary: int = 256) -> list[Group]:
    generator = torch.Generator().manual_seed(5)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=generator).tolist()

    return [Group(tokens(prompt), [tokens(length) for length in responses]) for prompt, responses in shapes]


def _naive(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """The sum, token by token, without padding and without a mask."""
    logits = model(torch.tensor([prompt + response])).logits[0]
    total = torch.zeros((), dtype=logits.dtype)
    for place, token in enumerate(response, start=len(prompt)):
        total = total + torch.log_softmax(logits[place - 1], dim=-1)[token]
    return total


def _naive_all(model: Any, groups: Sequence[Group]) -> Tensor:
    return torch.stack([_naive(model, list(g.prompt_ids), list(r)) for g in groups for r in g.responses])


def _gradients(model: Any, logprobs: Tensor) -> dict[str, Tensor]:
    """Of a sum in which every response has another weight: a wrong one can't cancel out."""
    value = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype) @ logprobs
    used = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(value, list(used.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(used.items(), gradients, strict=True)
    }


def _ours(model: Any, groups: Sequence[Group], method: Method) -> tuple[Tensor, dict[str, Tensor]]:
    with scoring(model, method):
        logprobs = response_logprobs(model, lay_out(groups, method.layout, pad_id=tiny.END_OF_TEXT))
        return logprobs.detach(), _gradients(model, logprobs)


Result = tuple[Tensor, dict[str, Tensor]]


def _expected(model: Any, groups: Sequence[Group]) -> Result:
    """In float64, so that all rounding is ours."""
    model = copy.deepcopy(model).double()
    logprobs = _naive_all(model, groups)
    gradients = _gradients(model, logprobs)
    return logprobs.detach().float(), {name: gradient.float() for name, gradient in gradients.items()}


def _assert_same(ours: Result, theirs: Result) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs[1].values())
    assert largest > 0.1
    for name, gradient in theirs[1].items():
        scale = max(float(gradient.abs().max()), 0.1 * largest)
        torch.testing.assert_close(
            ours[1][name] / scale, gradient / scale, atol=1e-5, rtol=0, msg=f"{name}: {{}}".format
        )


_BUILD: dict[str, Callable[[str], Any]] = {
    "full": build_model,
    "lora": lambda family: adapted(build_model(family)),
}


def _model(family: str, training: str) -> Any:
    model = _BUILD[training](family)
    switch_off_dropout(model)
    return model


@functools.cache
def _expected_of(family: str, training: str) -> Result:
    return _expected(_model(family, training), _groups())


# --- the same log-probs and gradients in every layout ---


@pytest.mark.parametrize("training", _BUILD)
@pytest.mark.parametrize(("family", "layout"), TAKEN)
def test_equals_a_naive_loop_over_rows(family: str, layout: Layout, training: str) -> None:
    """Together the groups are longer than what any position embedding goes to."""
    model = _model(family, training)
    assert getattr(model.config, "max_position_embeddings", 128) == 128
    assert layout == "plain" or lay_out(_groups(), layout, 0)["input_ids"].shape[1] > 300
    _assert_same(_ours(model, _groups(), Method(layout)), _expected_of(family, training))


def _with_an_opening(groups: Sequence[Group]) -> list[Group]:
    """20 tokens before each prompt, of which no more than that is common."""
    opening = [(7 * place) % 250 for place in range(20)]
    return [replace(one, prompt_ids=[*opening, *one.prompt_ids[-40:]]) for one in groups]


@pytest.mark.parametrize("training", _BUILD)
@pytest.mark.parametrize("family", ATTENTIVE)
def test_a_common_opening_is_run_once_and_gets_the_gradients_of_all(family: str, training: str) -> None:
    groups, model = _with_an_opening(_groups()), _model(family, training)
    batch = lay_out(groups, "shared", 0)
    assert batch["segments"][0] == (20, -1) and [before for _, before in batch["segments"]].count(0) == len(groups)
    _assert_same(_ours(model, groups, Method("shared")), _expected(_model(family, training), groups))


@pytest.mark.parametrize(("family", "layout"), [("gpt_neo", "shared"), ("llama", "packed"), ("mamba", "plain")])
def test_logits_of_response_positions_are_as_good_as_a_fused_head(family: str, layout: Layout) -> None:
    method = Method(layout, fused_head=False)
    _assert_same(_ours(_model(family, "full"), _groups(), method), _expected_of(family, "full"))


@pytest.mark.parametrize("training", _BUILD)
@pytest.mark.parametrize(("family", "layout"), [*((family, "shared") for family in ATTENTIVE), ("mamba", "plain")])
def test_layers_computed_again_in_the_backward_pass_give_the_same(family: str, layout: Layout, training: str) -> None:
    model = _model(family, training)
    model.gradient_checkpointing_enable()
    model.train()
    _assert_same(_ours(model, _groups(), Method(layout)), _expected_of(family, training))


@pytest.mark.parametrize(("family", "layout"), TAKEN)
def test_what_is_around_a_group_and_its_padding_do_not_matter(family: str, layout: Layout) -> None:
    model, groups = _model(family, "full"), _groups()
    with torch.no_grad(), scoring(model, Method(layout)):
        together = response_logprobs(model, lay_out(groups, layout, pad_id=tiny.END_OF_TEXT))
        alone = torch.cat([response_logprobs(model, lay_out([one], layout, pad_id=3)) for one in groups])
        backwards = [replace(one, responses=one.responses[::-1]) for one in groups[::-1]]
        turned = response_logprobs(model, lay_out(backwards, layout, pad_id=0)).flip(0)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(turned, together, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_summed_in_float32_for_a_model_in_bfloat16(layout: Layout) -> None:
    exact = _expected_of("llama", "full")
    model = _model("llama", "full").to(torch.bfloat16)
    logprobs, gradients = _ours(model, _groups(), Method(layout))
    lengths = torch.tensor([len(r) for one in _groups() for r in one.responses])
    with torch.no_grad():
        own = _naive_all(_Float32Logits(model), _groups())
    assert logprobs.dtype == torch.float32
    assert ((logprobs - own).abs() / lengths.sqrt()).max() < tolerance(torch.bfloat16)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.bfloat16
        assert F.cosine_similarity(gradient.float().flatten(), exact[1][name].flatten(), dim=0) > 0.98, name


class _Float32Logits(nn.Module):
    """A model whose logits are read in float32, as the log-probs are computed in it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Any:
        out = self.model(ids)
        out.logits = out.logits.float()
        return out


def test_the_slow_way_is_the_naive_one() -> None:
    model, groups = _model("llama", "lora"), _groups()
    with torch.no_grad():
        slow = torch.cat([logprobs_from_logits(model, one) for one in groups])
    torch.testing.assert_close(slow, _expected_of("llama", "lora")[0], atol=1e-5, rtol=1e-6)


# --- models that do something to their logits, and heads of every kind ---


@torch.no_grad()
def _cap_bites(model: Any) -> bool:
    """Whether a logit is so large that its slope is less than half of what it would be without a cap."""
    logits = model(torch.tensor([_groups()[1].prompt_ids])).logits
    return bool(logits.abs().max() > 0.5**0.5 * model.config.final_logit_softcapping)


HEADS: dict[str, Callable[[str, bool], Any]] = {
    "trained": lambda family, tied: build_model(family, tie_word_embeddings=tied),
    "frozen": lambda family, tied: adapted(build_model(family, tie_word_embeddings=tied), target_modules=["q_proj"]),
    "adapted": lambda family, tied: adapted(
        build_model(family, tie_word_embeddings=tied), target_modules=["v_proj", "lm_head"]
    ),
    "saved": lambda family, tied: adapted(
        build_model(family, tie_word_embeddings=tied), target_modules=["v_proj"], modules_to_save=["lm_head"]
    ),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_soft_caps_and_scales_with_every_kind_of_head(
    family: str, tied: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)  # 16 tokens at a time
    model = HEADS[kind](family, tied)
    weights = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (weights[0] is weights[1]) == (tied and kind != "saved")
    if family == "gemma2":
        assert _cap_bites(model)
    expected = _expected(model, _groups())
    for layout in ("shared", "plain"):
        _assert_same(_ours(model, _groups(), Method(layout)), expected)


class _Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that is ever made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [value for value in (out if isinstance(out, tuple | list) else [out]) if isinstance(value, Tensor)]
        self.largest = max([self.largest, *(tensor.numel() for tensor in tensors)])
        return out


@pytest.mark.parametrize("kind", HEADS)
def test_the_whole_vocabulary_is_never_there_for_more_than_a_chunk(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, groups = 16000, _groups()
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * vocabulary * 30)  # 24 tokens at a time: in multiples of 8
    monkeypatch.setitem(RELATIVES, "large", ("Llama", {**tiny.FAMILIES["llama"][1], "vocab_size": vocabulary}))
    model = HEADS[kind]("large", False)
    targets = sum(len(response) for one in groups for response in one.responses)
    with _Sizes() as ours:
        result = _ours(model, groups, Method("shared"))
    with _Sizes() as unfused:
        _assert_same(result, _ours(model, groups, Method("shared", fused_head=False)))
    assert unfused.largest >= vocabulary * targets, "the test has something to show"
    assert ours.largest == 24 * vocabulary


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_without_a_fused_head_only_response_positions_get_logits(layout: Layout) -> None:
    model, groups = build_model("llama"), _groups()
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: seen.append(logits.shape[-2]))
    _ours(model, groups, Method(layout, fused_head=False))
    assert seen == [sum(len(response) for one in groups for response in one.responses)]


# --- which layout a model gets ---

TELLING = _groups([(12, [30, 30]), (5, [6, 9]), (20, [40, 1])])

NO_ATTENTION = "the model has no attention that could be told what belongs together"


@pytest.mark.parametrize("place", [0, 1])
def test_a_layout_whose_logprobs_are_not_numbers_is_not_chosen(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever response of a group it is that comes out so."""
    right = logprobs_module.all_scores

    def wrong(model: Any, groups: Any, method: Method, **settings: Any) -> list[list[float]]:
        scores = right(model, groups, method, **settings)
        if method.layout == "shared":
            scores[-1][place] = math.nan
        return scores

    monkeypatch.setattr(logprobs_module, "all_scores", wrong)
    method = _chosen(build_model("llama"))
    assert (method.layout, method.fused_head) == ("packed", True)
    assert method.reason == "shared with a fused head: log-probs come out that are not finite"


def test_memory_that_runs_out_says_nothing_about_a_layout() -> None:
    """The model's own logits, a response at a time, still fit: what came after would be another layout tomorrow."""
    model = build_model("llama")
    passes = iter(range(1000))

    def look(module: Any, inputs: Any) -> None:
        if next(passes) >= sum(len(group.responses) for group in TELLING):
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.get_input_embeddings().register_forward_pre_hook(look)
    with pytest.raises(torch.OutOfMemoryError):
        _chosen(model)


def _chosen(model: Any, layouts: Sequence[Layout] = LAYOUTS) -> Method:
    return choose_method(model, TELLING, 0, torch.float32, layouts)


def _right(model: Any, method: Method) -> None:
    """The method gives the model's own log-probs, of groups that it wasn't chosen on too."""
    with torch.no_grad():
        wanted = [logprobs_from_logits(model, one).tolist() for one in _groups()]
    for found, values in zip(all_scores(model, _groups(), method, 150, pad_id=0), wanted, strict=True):
        assert found == pytest.approx(values, abs=1e-4, rel=1e-6)


@pytest.mark.parametrize("family", ATTENTIVE)
def test_families_with_attention_share_prompts(family: str) -> None:
    assert _chosen(build_model(family)) == Method("shared", fused_head=True, reason="")
    assert _chosen(adapted(build_model(family))) == Method("shared", fused_head=True, reason="")


def test_mamba_gets_padded_rows_and_a_reason() -> None:
    reason = f"shared with a fused head: {NO_ATTENTION}; packed with a fused head: {NO_ATTENTION}"
    assert _chosen(build_model("mamba")) == Method("plain", fused_head=True, reason=reason)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("gemma2", "shared"),
        ("granite", "shared"),
        ("cohere", "shared"),
        ("mixtral", "shared"),
        ("qwen2_moe", "shared"),
        ("bloom", "plain"),
        ("lfm2", "plain"),
        ("recurrent_gemma", "plain"),
        ("gpt_oss", "plain"),
    ],
)
def test_other_models_get_the_fastest_layout_that_is_right(family: str, layout: Layout) -> None:
    model = build_model(family)
    method = _chosen(model)
    assert (method.layout, method.fused_head) == (layout, True)
    assert (method.reason == "") == (layout == "shared")
    if family == "bloom":  # ALiBi, in an attention of its own
        assert NO_ATTENTION in method.reason
    if family in ("lfm2", "recurrent_gemma"):  # convolutions and recurrent states look across
        assert "shared with a fused head: log-probs differ by" in method.reason
        assert "packed with a fused head: log-probs differ by" in method.reason
    if family == "gpt_oss":
        assert "it can't be computed: attention with s_aux" in method.reason
    _right(model, method)


def test_convolutions_of_little_weight_are_found_out_too() -> None:
    model = sharpened(build_model("lfm2"), 0.6)
    unchecked = all_scores(model, TELLING, Method("shared"), 1000, 0)
    with torch.no_grad():
        wanted = [logprobs_from_logits(model, one).tolist() for one in TELLING]
    worst = max(
        abs(a - b) for mine, theirs in zip(unchecked, wanted, strict=True) for a, b in zip(mine, theirs, strict=True)
    )
    assert worst < 0.01, "the test has something to show"
    assert _chosen(model).layout == "plain"


def test_attention_that_looks_across_is_found_out() -> None:
    """Layers that go on with transformers' own attention, whatever they are told."""
    model = build_model("llama")
    for layer in model.model.layers:
        layer.self_attn.config = type(model.config)(**model.config.to_dict())
        layer.self_attn.config._attn_implementation = "sdpa"
    method = _chosen(model)
    assert (method.layout, method.fused_head) == ("plain", True)
    assert "shared with a fused head: log-probs differ by" in method.reason
    assert "packed with a fused head: log-probs differ by" in method.reason
    _right(model, method)


def _mix_neighbours(model: Any, until_the_prompt_begins: bool) -> None:
    """Add to each token the one before it: wherever it is, or only within a prompt and one response."""
    positions: list[Tensor | None] = []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        positions.append(kwargs.get("position_ids"))

    def mix(module: Any, args: Any, output: Tensor) -> Tensor:
        before = F.pad(output, (0, 0, 1, 0))[:, :-1]
        if until_the_prompt_begins and positions[-1] is not None:
            before = before * (positions[-1] > 0)[..., None]
        return output + before

    model.model.register_forward_pre_hook(see, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(mix)


def test_a_convolution_that_looks_across_is_found_out() -> None:
    model = build_model("llama")
    _mix_neighbours(model, until_the_prompt_begins=False)
    method = _chosen(model)
    assert (method.layout, method.fused_head) == ("plain", True)
    _right(model, method)


def test_a_model_that_knows_where_rows_begin_but_not_branches_is_packed() -> None:
    model = build_model("llama")
    _mix_neighbours(model, until_the_prompt_begins=True)
    method = _chosen(model)
    assert (method.layout, method.fused_head) == ("packed", True)
    assert method.reason.startswith("shared with a fused head: log-probs differ by")
    assert "packed" not in method.reason
    _right(model, method)


class _Doubled(LlamaForCausalLM):
    """Does to its logits what no configuration tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


def test_an_unknown_change_of_the_logits_is_found_out() -> None:
    model = build_model("llama")
    doubled = _Doubled(model.config).eval()
    doubled.load_state_dict(model.state_dict())
    method = _chosen(doubled)
    assert (method.layout, method.fused_head) == ("shared", False)
    assert "plain with a fused head: log-probs differ by" in method.reason
    _right(doubled, method)
    _assert_same(_ours(doubled, _groups(), method), _expected(doubled, _groups()))


def test_a_layout_asked_for_is_checked_too() -> None:
    assert _chosen(build_model("llama"), ["packed"]) == Method("packed")
    with pytest.raises(
        UserError, match=r"^layout: this model's log-probs come out wrong in every layout tried: shared"
    ):
        _chosen(build_model("mamba"), ["shared"])


def test_log_probs_that_are_no_numbers_are_refused() -> None:
    model = build_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"model\.name: this model's log-probs are not finite numbers"):
        _chosen(model)


# --- the model is as it was afterwards ---


def _state(model: Any) -> list[Any]:
    """Each module's own attributes and hooks: wherever scoring may have left something."""
    attributes = [
        (name, attribute, list(value) if attribute.endswith("_hooks") else id(value))
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
    ]
    return [*attributes, model.config._attn_implementation]


@pytest.mark.parametrize("training", _BUILD)
@pytest.mark.parametrize(("family", "layout"), [("gpt_neo", "shared"), ("llama", "packed"), ("mamba", "plain")])
def test_the_model_is_as_it_was_afterwards(family: str, layout: Layout, training: str) -> None:
    model = _model(family, training)
    prompt = torch.tensor([_groups()[1].prompt_ids])
    method = Method(layout)
    with torch.no_grad():
        logits = model(prompt).logits
        answer = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    states = _state(model)
    _ours(model, _groups(), method)
    assert _state(model) == states
    broken = lay_out(_groups(), layout, pad_id=0)
    broken["targets"] = broken["targets"][:-1]
    with pytest.raises((RuntimeError, ValueError)), scoring(model, method):
        response_logprobs(model, broken)
    broken["input_ids"] = broken["input_ids"] + 1000
    with pytest.raises((RuntimeError, IndexError)), scoring(model, method):
        response_logprobs(model, broken)
    assert _state(model) == states
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, logits)
        assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0), answer)


def test_a_forward_of_the_models_own_is_called_and_given_back() -> None:
    """As accelerate puts one there for autocast."""
    model, calls = _model("llama", "full"), []
    forward = model.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return forward(*args, **kwargs)

    model.forward = wrapped
    _assert_same(_ours(model, _groups(), Method("shared")), _expected_of("llama", "full"))
    assert model.forward is wrapped
    assert len(calls) == 1


def test_within_scoring_the_model_still_gives_logits_to_who_asks_for_them() -> None:
    model = _model("llama", "full")
    ids = torch.tensor([[1, 2, 3]])
    logits = model(ids).logits
    with scoring(model, Method("plain")):
        torch.testing.assert_close(model(ids).logits, logits)


# --- many groups ---


@pytest.mark.parametrize("tokens_per_pass", [1, 100, 150, 10**6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_group_is_scored_once_and_put_in_its_place(tokens_per_pass: int, layout: Layout) -> None:
    model, groups = build_model("llama"), _groups()
    found: dict[int, list[float]] = {}
    passes = list(score_groups(model, groups, Method(layout), tokens_per_pass, pad_id=0))
    for places, values in passes:
        assert not found.keys() & set(places), "nothing is scored twice"
        found.update(zip(places, values, strict=True))
    expected = iter(_expected_of("llama", "full")[0].tolist())
    wanted = [[next(expected) for _ in one.responses] for one in groups]
    assert [len(found[place]) for place in range(len(groups))] == [1, 2, 3, 2, 3]
    for place, values in enumerate(wanted):
        assert found[place] == pytest.approx(values, abs=1e-5, rel=1e-6)
    assert all_scores(model, groups, Method(layout), tokens_per_pass, pad_id=0) == [found[i] for i in range(5)]
    assert len(passes) == {1: 5, 10**6: 1}.get(tokens_per_pass, len(passes))


def test_the_longest_groups_are_scored_first() -> None:
    """Their tokens with the prompt once are 3, 65, 84, 63 and 108."""
    passes = score_groups(build_model("llama"), _groups(), Method("shared"), 140, pad_id=0)
    assert [places for places, _ in passes] == [[4], [2], [1, 3, 0]]


def test_scoring_keeps_no_gradient_and_takes_nothing() -> None:
    model = build_model("llama")
    assert all_scores(model, [], Method("shared"), 100, pad_id=0) == []
    all_scores(model, _groups(), Method("shared"), 100, pad_id=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()

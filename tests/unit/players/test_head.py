"""Log-probs straight from hidden states: by hand, and against torch's own log-softmax over the whole vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from spinlm.players import head
from spinlm.players.head import LogitScale, head_logprobs, head_size
from unit.players.families import adapted, build_model

SCALES = [
    LogitScale(),
    LogitScale(factor=0.25),
    LogitScale(cap=2.0),
    LogitScale(factor=3.0, cap=1.5),
]


def _linear(hidden: int, vocabulary: int, trained: bool, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(hidden, vocabulary, bias=bias).requires_grad_(trained)


def _whole(linear: Any, scale: LogitScale, hidden: Tensor, targets: Tensor) -> Tensor:
    """The definition."""
    logits = linear(hidden) * scale.factor
    if scale.cap is not None:
        logits = scale.cap * torch.tanh(logits / scale.cap)
    return logits.log_softmax(-1)[range(len(targets)), targets]


def _example(rows: int, hidden: int = 8, vocabulary: int = 50, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(1)
    states = 3 * torch.randn(rows, hidden, generator=generator)
    return states.to(dtype).requires_grad_(), torch.randint(0, vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_numbers_worked_by_hand(trained: bool) -> None:
    """Logits are ln 2, ln 3 and 0, so the probabilities 2/6, 3/6 and 1/6; p - onehot by the first two weights."""
    three = nn.Linear(2, 3, bias=False).requires_grad_(trained)
    three.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    hidden = torch.tensor([[math.log(2), math.log(3)]] * 3, requires_grad=True)
    logprobs = head_logprobs(three, LogitScale(), hidden, torch.tensor([0, 1, 2]))
    assert logprobs.tolist() == pytest.approx([math.log(2 / 6), math.log(3 / 6), math.log(1 / 6)])
    logprobs.backward(torch.tensor([1.0, 1.0, 6.0]))
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == pytest.approx([2 / 3, -1 / 2, -1 / 3, 1 / 2, -2, -3])


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_a_cap_and_a_factor_worked_by_hand(trained: bool) -> None:
    """Two tokens with logits z and 0, where z = 2 tanh(4 h / 2): log p = -ln(1 + e^-z), by h 4 (1 - tanh^2) (1 - p)."""
    two = nn.Linear(1, 2, bias=False).requires_grad_(trained)
    two.weight.data = torch.tensor([[1.0], [0.0]])
    hidden = torch.tensor([[0.3]], requires_grad=True)
    logprobs = head_logprobs(two, LogitScale(factor=4.0, cap=2.0), hidden, torch.tensor([0]))
    tanh = math.tanh(0.6)
    p = 1 / (1 + math.exp(-2 * tanh))
    assert logprobs.item() == pytest.approx(math.log(p))
    logprobs.backward()
    assert hidden.grad is not None
    assert hidden.grad.item() == pytest.approx(4 * (1 - tanh**2) * (1 - p))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_log_probs_and_gradients_are_the_definitions(trained: bool, scale: LogitScale, bias: bool) -> None:
    linear = _linear(8, 50, trained, bias)
    hidden, targets = _example(40)
    weights = torch.linspace(-1, 2, 40)
    leaves = [hidden, *(parameter for parameter in linear.parameters() if trained)]
    expected = _whole(linear, scale, hidden, targets)
    wanted = torch.autograd.grad(weights @ expected, leaves)
    logprobs = head_logprobs(linear, scale, hidden, targets)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(weights @ logprobs, leaves), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(head_logprobs(linear, scale, hidden, targets), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_what_a_hook_makes_of_the_logits_counts(trained: bool) -> None:
    linear, (hidden, targets) = _linear(8, 50, trained), _example(20)
    linear.register_forward_hook(lambda module, inputs, logits: logits + torch.linspace(0, 3, 50))
    expected = _whole(linear, LogitScale(), hidden, targets)
    logprobs = head_logprobs(linear, LogitScale(), hidden, targets)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-6)
    ours, theirs = (torch.autograd.grad(found.sum(), hidden)[0] for found in (logprobs, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 50])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_the_chunks_change_nothing(trained: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, (hidden, targets) = _linear(8, 50, trained), _example(rows)

    def run(chunk_bytes: int) -> list[Tensor]:
        monkeypatch.setattr(head, "CHUNK_BYTES", chunk_bytes)
        logprobs = head_logprobs(linear, LogitScale(cap=5.0), hidden, targets)
        leaves = [hidden, *(parameter for parameter in linear.parameters() if trained)]
        return [logprobs, *torch.autograd.grad(torch.arange(float(rows)) @ logprobs, leaves)]

    for whole, parts in zip(run(2**30), run(1), strict=True):  # 16 rows at a time at the least
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_logits_of_hundreds_do_not_overflow(trained: bool) -> None:
    linear, (hidden, targets) = _linear(8, 50, trained), _example(20)
    logprobs = head_logprobs(linear, LogitScale(factor=1000.0), hidden, targets)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert logprobs.min() < -500
    assert torch.isfinite(logprobs).all() and torch.isfinite(gradient).all()
    torch.testing.assert_close(logprobs, _whole(linear, LogitScale(factor=1000.0), hidden, targets))


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_in_bfloat16_the_sum_over_the_vocabulary_is_in_float32(scale: LogitScale, trained: bool) -> None:
    """With 4000 tokens of like probability a sum in bfloat16 would be far off."""
    linear = _linear(8, 4000, trained).to(torch.bfloat16)
    hidden, targets = _example(40, vocabulary=4000, dtype=torch.bfloat16)
    logprobs = head_logprobs(linear, scale, hidden, targets)
    exact = hidden.detach().float().requires_grad_()
    expected = _whole(_linear(8, 4000, trained).to(torch.bfloat16).float(), scale, exact, targets)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, atol=0.03, rtol=0)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    (wanted,) = torch.autograd.grad(expected.sum(), exact)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.float(), wanted, atol=0.02 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_nothing_as_large_as_the_logits_is_kept_for_the_backward_pass(
    trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)
    linear = _linear(8, 500, trained)
    hidden, targets = _example(200, vocabulary=500)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs = head_logprobs(linear, LogitScale(cap=2.0), hidden, targets)
        assert max(kept, default=0) <= max(hidden.numel(), linear.weight.numel())
        logprobs.sum().backward()
    assert max(kept) <= 16 * 500, "a chunk's, made again in the backward pass"
    assert hidden.grad is not None


def test_a_gradient_that_nobody_asked_for_is_not_computed() -> None:
    hidden, targets = _example(20)
    for trained in (True, False):
        with torch.no_grad():
            assert not head_logprobs(_linear(8, 50, trained), LogitScale(), hidden, targets).requires_grad


@pytest.mark.parametrize(
    ("family", "scale"),
    [
        ("llama", LogitScale()),
        ("gemma2", LogitScale(cap=1.5)),
        ("recurrent_gemma", LogitScale(cap=2.5)),
        ("granite", LogitScale(factor=1 / 3.0)),
        ("cohere", LogitScale(factor=0.25)),
    ],
)
def test_what_a_model_does_to_its_logits_is_read_from_its_configuration(family: str, scale: LogitScale) -> None:
    assert LogitScale.of(build_model(family).config) == scale


@pytest.mark.parametrize("kind", ["bare", "adapted", "saved"])
def test_the_number_of_tokens_of_any_head(kind: str) -> None:
    model = build_model("llama")
    if kind == "adapted":
        model = adapted(model, target_modules=["lm_head"])
    if kind == "saved":
        model = adapted(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert head_size(model.get_output_embeddings()) == tiny.VOCABULARY

"""The next-token loss against full logits, against transformers, and on the packaged LLMs."""

import sys
import types
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from hyma_mllm.data import prompts
from hyma_mllm.errors import HymaError
from hyma_mllm.objectives import causal_lm
from hyma_mllm.objectives.causal_lm import IGNORE, CausalConfig, CausalObjective, supervised, token_losses
from hyma_mllm.zoo import llm as zoo_llm


class Head(NamedTuple):
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0


def full_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = F.linear(hidden, head.weight, head.bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def problem(tokens: int, width: int, words: int, seed: int = 0, **head: Any) -> tuple[Tensor, Head, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(words, width, generator=generator, dtype=torch.float64)
    if head.pop("with_bias", False):
        head["bias"] = torch.randn(words, generator=generator, dtype=torch.float64)
    return hidden, Head(weight, **head), torch.randint(words, (tokens,), generator=generator)


def both(hidden: Tensor, head: Head, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and gradients, ours and torch's, for uneven weights of the tokens."""
    weights = torch.linspace(0.5, 2, len(targets), dtype=torch.float64)
    ours = token_losses(
        hidden, head.weight, targets, bias=head.bias, softcap=head.softcap, scale=head.scale, chunk=chunk
    )
    (gradient,) = torch.autograd.grad((ours * weights).sum(), hidden)
    theirs = F.cross_entropy(full_logits(hidden, head), targets, reduction="none")
    (expected,) = torch.autograd.grad((theirs * weights).sum(), hidden)
    return ours, theirs, gradient, expected


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 9),
    width=st.integers(1, 7),
    words=st.integers(1, 40),
    chunk=st.integers(1, 50),
    softcap=st.sampled_from([None, 0.7, 30.0]),
    scale=st.sampled_from([1.0, 0.25, -3.0]),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_the_full_logits(
    tokens: int,
    width: int,
    words: int,
    chunk: int,
    softcap: float | None,
    scale: float,
    with_bias: bool,
    seed: int,
) -> None:
    hidden, head, targets = problem(tokens, width, words, seed, softcap=softcap, scale=scale, with_bias=with_bias)
    ours, theirs, gradient, expected = both(hidden, head, targets, chunk)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 7, 30, 31, 100], ids=["one", "uneven last", "a word left", "exact", "too large"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_every_chunk_gives_the_same(chunk: int, softcap: float | None) -> None:
    ours, theirs, gradient, expected = both(*problem(5, 4, 31, softcap=softcap, with_bias=True), chunk)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, expected)


def test_logits_far_apart_do_not_overflow() -> None:
    hidden, head, targets = problem(4, 3, 50)
    ours, theirs, gradient, expected = both(hidden, head._replace(scale=1e4), targets, 8)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, expected)


def test_no_token_is_no_loss() -> None:
    hidden, head, targets = problem(0, 3, 5)
    losses = token_losses(hidden, head.weight, targets, chunk=2)
    losses.sum().backward()
    assert losses.shape == (0,)
    assert hidden.grad is not None and hidden.grad.shape == (0, 3)


def test_half_precision_is_accumulated_in_float32() -> None:
    hidden, head, targets = problem(16, 64, 500)
    half = hidden.detach().bfloat16().requires_grad_()
    weight = head.weight.bfloat16()
    ours = token_losses(half, weight, targets, chunk=64)
    ours.mean().backward()
    exact = half.detach().double().requires_grad_()
    expected = F.cross_entropy(exact @ weight.double().t(), targets, reduction="none")
    expected.mean().backward()
    assert ours.dtype == torch.float32
    assert half.grad is not None and half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    # On a CPU that multiplies bfloat16, softmax weights are rounded before their product: an error of the whole row.
    error = (half.grad.double() - exact.grad).norm(dim=1)  # type: ignore[operator]
    assert bool((error < 2**-8 * exact.grad.norm(dim=1)).all())  # type: ignore[union-attr]


def test_other_products_keep_the_precision_that_was_set() -> None:
    hidden, head, targets = problem(4, 8, 30)
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    half = hidden.detach().bfloat16().requires_grad_()
    token_losses(half, head.weight.bfloat16(), targets, chunk=8).sum().backward()
    assert products.fp32_precision == before
    with pytest.raises(RuntimeError):
        token_losses(half, head.weight[:, :3].bfloat16(), targets, chunk=8)
    assert products.fp32_precision == before


def test_float32_states_are_not_rounded_by_a_narrow_head() -> None:
    """Weights may be kept in 16 bits and everything else in float32."""
    torch.manual_seed(0)
    states, weight, targets = 0.1 * torch.randn(64, 256), torch.randn(4096, 256).bfloat16(), torch.randint(4096, (64,))
    states.requires_grad_()
    ours = token_losses(states, weight, targets)
    ours.mean().backward()
    exact = states.detach().double().requires_grad_()
    expected = F.cross_entropy(exact @ weight.double().t(), targets, reduction="none")
    expected.mean().backward()
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    error = (states.grad.double() - exact.grad).norm(dim=1)  # type: ignore[union-attr,operator]
    assert bool((error < 1e-5 * exact.grad.norm(dim=1)).all())  # type: ignore[union-attr]


def test_autocast_does_not_round_the_logits() -> None:
    hidden, head, targets = problem(8, 32, 100)
    rows, weight = hidden.detach().float(), head.weight.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = token_losses(rows, weight, targets, chunk=16)
    torch.testing.assert_close(inside, token_losses(rows, weight, targets, chunk=16), rtol=0, atol=0)


def test_the_frozen_head_gets_no_gradient() -> None:
    hidden, head, targets = problem(3, 4, 9)
    weight = head.weight.requires_grad_()
    token_losses(hidden, weight, targets, chunk=4).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_no_tensor_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets = problem(6, 4, 1000)
    widths = list[int]()
    made = causal_lm._logits

    def noted(*arguments: Any) -> Tensor:
        logits = made(*arguments)
        widths.append(logits.shape[1])
        return logits

    monkeypatch.setattr(causal_lm, "_logits", noted)
    token_losses(hidden, head.weight, targets, chunk=300).sum().backward()
    assert widths == [300, 300, 300, 100] * 2


def test_labels_are_predicted_by_the_position_before() -> None:
    labels = torch.tensor([[IGNORE, IGNORE, 7, 8], [5, IGNORE, IGNORE, 6]])
    rows, positions, targets = supervised(labels)
    assert list(zip(rows.tolist(), positions.tolist(), targets.tolist(), strict=True)) == [
        (0, 1, 7),
        (0, 2, 8),
        (1, 2, 6),
    ]
    assert prompts.IGNORE == IGNORE


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False).double()


def test_every_pair_has_the_loss_and_gradient_of_transformers() -> None:
    model, generator = tiny_llama(), torch.Generator().manual_seed(1)
    embeddings = torch.randn(3, 2, 9, 16, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 7:] = 0
    labels = torch.randint(61, (2, 9), generator=generator)
    labels[:, :4] = IGNORE
    labels[1, 6:] = IGNORE
    hidden = model.model(inputs_embeds=embeddings.flatten(0, 1), attention_mask=mask.repeat(3, 1)).last_hidden_state
    ours = CausalObjective(CausalConfig(vocabulary_chunk=16))(
        hidden.unflatten(0, (3, 2)), labels, Head(model.lm_head.weight)
    )
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), embeddings)
    theirs = torch.stack([model(inputs_embeds=e, attention_mask=mask, labels=labels).loss for e in embeddings])
    (expected,) = torch.autograd.grad((theirs * weights).sum(), embeddings)
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-6)
    # transformers computes the loss of its logits in float32.
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_a_batch_without_labels_is_refused() -> None:
    with pytest.raises(HymaError, match="None of the 6 labels of a batch of 2 rows"):
        CausalObjective()(torch.zeros(1, 2, 3, 4), torch.full((2, 3), IGNORE), Head(torch.zeros(5, 4)))


def test_a_chunk_holds_a_word() -> None:
    with pytest.raises(HymaError, match="vocabulary chunk 0"):
        CausalConfig(vocabulary_chunk=0)


class FusedDouble(nn.Module):
    """Stands in for Liger's module: its arguments and its sum, by full logits."""

    def __init__(self, reduction: str, softcap: float | None) -> None:
        super().__init__()
        assert reduction == "sum"
        self.softcap = softcap

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.cross_entropy(full_logits(_input, Head(lin_weight, bias, self.softcap)), target, reduction="sum")


@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "scale": 0.5, "with_bias": True}], ids=["plain", "all"])
def test_the_fused_kernel_is_called_for_the_same_loss(head: dict[str, Any]) -> None:
    hidden, head_, targets = problem(2 * 5, 4, 11, **head)
    means = causal_lm._liger_means(FusedDouble, hidden.view(2, 5, 4), targets[:5], head_)
    ours = token_losses(
        hidden, head_.weight, targets[:5].repeat(2), bias=head_.bias, softcap=head_.softcap, scale=head_.scale
    )
    torch.testing.assert_close(means, ours.view(2, 5).mean(1).float())


def test_the_fused_kernel_needs_a_gpu_and_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("liger_kernel")
    package.__path__ = []
    package.__spec__ = types.SimpleNamespace(name="liger_kernel")  # type: ignore[assignment]
    transformers = types.ModuleType("liger_kernel.transformers")
    transformers.LigerFusedLinearCrossEntropyLoss = FusedDouble  # type: ignore[attr-defined]
    for gpu, installed, expected in [(True, True, FusedDouble), (False, True, None), (True, False, None)]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setitem(sys.modules, "liger_kernel", package if installed else None)
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
        causal_lm._liger.cache_clear()
        assert causal_lm._liger() is expected
    causal_lm._liger.cache_clear()


LLMS = [
    pytest.param("smollm2-135m", marks=[pytest.mark.zoo, pytest.mark.slow]),
    pytest.param("qwen2.5-coder-0.5b", marks=[pytest.mark.zoo, pytest.mark.slow]),
    pytest.param("gemma3-270m", marks=[pytest.mark.zoo, pytest.mark.slow]),
]


@pytest.mark.parametrize("name", LLMS)
def test_each_packaged_llm_has_the_loss_and_gradient_of_transformers(name: str) -> None:
    card = zoo_llm.llm_card(name)
    if card.terms and not zoo_llm.llm_on_disk(card):
        pytest.skip(f"{name} was never fetched here; its terms are for its user to accept")
    llm = zoo_llm.load_llm(card, dtype=torch.float32, accepted_terms=[card.terms or ""])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, (2, 7), generator=generator)
    labels = ids.clone()
    labels[:, :4] = IGNORE
    labels[1, 6:] = IGNORE
    embeddings = llm.embed(ids).detach()[None].requires_grad_()
    mask = torch.ones_like(ids)
    hidden = llm.hidden(embeddings[0], mask)
    ours = CausalObjective()(hidden[None], labels, llm.head())
    (gradient,) = torch.autograd.grad(ours.sum(), embeddings)
    theirs = llm.model(inputs_embeds=embeddings[0], attention_mask=mask, labels=labels).loss
    (expected,) = torch.autograd.grad(theirs, embeddings)
    torch.testing.assert_close(ours[0], theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))

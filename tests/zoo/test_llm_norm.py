"""RMS norms of frozen LLMs: those of transformers in value and gradient, in any dtype; other norms stay."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from hyma_mllm.zoo.llm_norm import FrozenRMSNorm, lean_norms

WIDTH = 24


def published(kind: type[nn.Module], dtype: torch.dtype, eps: float = 1e-6) -> nn.Module:
    norm = kind(WIDTH, eps=eps).requires_grad_(False)
    norm.weight.data = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
    return norm.to(dtype)


def ours(norm: nn.Module) -> nn.Module:
    return lean_norms(nn.Sequential(norm))[0]  # type: ignore[arg-type,index,no-any-return]


def through(norm: nn.Module, x: Tensor, push: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = norm(x)
    y.backward(push.to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("kind", [Qwen2RMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("size", [1.0, 1e-3])  # eps is nothing, and as large as the mean square
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_those_of_transformers_to_one_rounding(
    kind: type[nn.Module], size: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    norm = published(kind, dtype)
    lean = ours(norm)
    assert isinstance(lean, FrozenRMSNorm)
    x, push = (size * torch.randn(3, 5, WIDTH)).to(dtype), torch.randn(3, 5, WIDTH).to(dtype)
    value, gradient = through(lean, x, push)
    # In float64, written out: neither implementation is the judge of the other.
    exact = x.double().requires_grad_()
    gain = norm.weight.double() + (1.0 if kind is Gemma3RMSNorm else 0.0)  # type: ignore[operator,union-attr]
    wanted = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
    wanted.backward(push.double())
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(value.double(), wanted.detach(), rtol=2 * rounding, atol=1e-6)
    scale = float(exact.grad.norm())  # type: ignore[union-attr]
    assert float((gradient.double() - exact.grad).norm()) < 4 * max(rounding, 1e-7) * scale
    assert value.dtype == gradient.dtype == dtype
    theirs = through(norm, x, push)
    torch.testing.assert_close(value, theirs[0], rtol=4 * rounding, atol=1e-6)
    assert float((gradient - theirs[1]).norm()) < 6 * max(rounding, 1e-7) * scale


def test_the_input_is_left_as_it_was() -> None:
    lean, x = ours(published(Qwen2RMSNorm, torch.float32)), torch.randn(2, WIDTH, requires_grad=True)
    before, push = x.detach().clone(), torch.randn(2, WIDTH)
    kept = push.clone()
    lean(x).backward(push)
    assert torch.equal(x.detach(), before) and torch.equal(push, kept)


class LayerRMSNorm(nn.Module):
    """A norm by that name which says something else: the mean is taken off."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, (WIDTH,), self.weight, None, self.eps)


class WrongEpsRMSNorm(Qwen2RMSNorm):  # type: ignore[misc]
    """Says one eps and adds another."""

    def __init__(self) -> None:
        super().__init__(WIDTH, eps=1e-2)
        self.eps, self.variance_epsilon = 1e-2, 1e-6
        self.added = 1e-2

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.added).rsqrt() * self.weight  # type: ignore[no-any-return]


@pytest.mark.parametrize("norm", [LayerRMSNorm(), WrongEpsRMSNorm(), nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)])
def test_a_norm_that_says_something_else_stays(norm: nn.Module) -> None:
    norm.requires_grad_(False)
    assert ours(norm) is norm


def test_an_llm_keeps_its_weights_names_and_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    plain = copy.deepcopy(model)
    ids = torch.tensor([[3, 7, 9]])
    lean = lean_norms(model)
    assert sum(isinstance(module, FrozenRMSNorm) for module in lean.modules()) == 2 * 2 + 1
    torch.testing.assert_close(lean(ids).logits, plain(ids).logits)
    lean.save_pretrained(tmp_path)
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path)(ids).logits, plain(ids).logits)

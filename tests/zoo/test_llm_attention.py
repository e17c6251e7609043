"""Attention of 16-bit LLMs on a CPU: computed in float32, rounded once, behind any mask."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hyma_mllm.zoo import llm_attention
from hyma_mllm.zoo.llm import load_llm

HALF = torch.bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llm")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(HALF).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w3"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", unk_token="w3").save_pretrained(path)
    return path


def reference(query: Tensor, key: Tensor, value: Tensor, shown: Tensor) -> Tensor:
    """[batch, length, heads, width] in float64; `shown` [length, keys]."""
    weights = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    mixed: Tensor = weights.masked_fill(~shown, -torch.inf).softmax(-1) @ value
    return mixed.transpose(1, 2)


@pytest.mark.parametrize("kind", ["boolean", "additive", "causal"])
def test_values_and_gradients_are_float64s_to_one_rounding(kind: str) -> None:
    torch.manual_seed(1)
    shown = torch.ones(6, 6, dtype=torch.bool).tril()
    masks = {"boolean": shown[None, None], "additive": torch.where(shown, 0.0, -torch.inf)[None, None].to(HALF)}
    given = [torch.randn(2, 4, 6, 8).to(HALF).requires_grad_() for _ in range(3)]
    exact = [part.detach().double().requires_grad_() for part in given]
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 1  # type: ignore[assignment]
    query, key, value = given
    found, weights = llm_attention._float32_attention(module, query, key, value, masks.get(kind))
    wanted = reference(exact[0], exact[1], exact[2], shown)
    assert found.dtype == HALF and weights is None
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-6)
    push = torch.randn_like(found)
    gradients = torch.autograd.grad(found, given, push), torch.autograd.grad(wanted, exact, push.double())
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2**-8, atol=1e-5)


def test_a_16_bit_llm_on_a_cpu_attends_in_float32(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    plain = F.scaled_dot_product_attention

    def spy(query: Tensor, *args: object, **options: object) -> Tensor:
        seen.append(query.dtype)
        return plain(query, *args, **options)  # type: ignore[arg-type]

    llm = load_llm(f"hf:{folder}", dtype=HALF)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    hidden = llm.hidden(torch.randn(2, 4, 32).to(HALF), mask, llm.prefix(torch.tensor([4, 5])))
    assert hidden.dtype == HALF
    assert seen and set(seen) == {torch.float32}


def test_what_is_saved_knows_nothing_of_it(folder: Path, tmp_path: Path) -> None:
    load_llm(f"hf:{folder}", dtype=HALF).model.save_pretrained(tmp_path)
    assert llm_attention.NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_another_attention_stays(folder: Path) -> None:
    eager = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert llm_attention.widen_attention(eager).config._attn_implementation == "eager"
    assert load_llm(f"hf:{folder}", dtype=torch.float32).model.config._attn_implementation == "sdpa"

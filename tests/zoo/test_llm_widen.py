"""LLMs kept in 16 bits: the same numbers as the same weights kept in float32, forward and backward."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hyma_mllm.objectives.causal_lm import CausalObjective
from hyma_mllm.zoo.llm import LanguageModel, load_llm
from hyma_mllm.zoo.llm_widen import linear

WORDS = 80
MASK = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])


def llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2,
        tie_word_embeddings=False, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gemma() -> PreTrainedModel:
    """Tied, and its embeddings are multiplied by a factor that 16 bits would round."""
    config = Gemma3TextConfig(
        vocab_size=WORDS, hidden_size=40, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10, bos_token_id=1, eos_token_id=2, pad_token_id=0, sliding_window=8,
        initializer_range=0.2,
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


@pytest.fixture(scope="module", params=[llama, gemma])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llm")
    torch.manual_seed(0)
    request.param().to(torch.bfloat16).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w3"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", unk_token="w3").save_pretrained(path)
    return path


@pytest.fixture
def both(folder: Path) -> tuple[LanguageModel, LanguageModel]:
    """Kept in 16 bits, kept in 32; both compute in 32."""
    kept = load_llm(f"hf:{folder}", dtype=torch.float32, quantisation="bf16")
    return kept, load_llm(f"hf:{folder}", dtype=torch.float32)


def loss_and_gradient(llm: LanguageModel) -> tuple[Tensor, Tensor]:
    embeddings = torch.randn(2, 7, llm.width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    hidden = llm.hidden(embeddings, MASK, llm.prefix(torch.tensor([1, 5])))
    labels = torch.full((2, 7), -100)
    labels[:, 5:] = torch.tensor([[4, 9], [70, 2]])
    loss = CausalObjective()(hidden[None], labels, llm.head())
    (gradient,) = torch.autograd.grad(loss.sum(), embeddings)
    return loss.detach(), gradient


def test_weights_take_half_the_memory_and_stay_tied(both: tuple[LanguageModel, LanguageModel]) -> None:
    kept, wide = both
    sizes = [sum(p.numel() * p.element_size() for p in llm.model.parameters() if p.dim() > 1) for llm in both]
    assert 2 * sizes[0] == sizes[1]
    tied = wide.model.get_input_embeddings().weight is wide.model.get_output_embeddings().weight
    assert (kept.model.get_input_embeddings().weight is kept.model.get_output_embeddings().weight) == tied


def test_embeddings_are_the_wide_models_own(both: tuple[LanguageModel, LanguageModel]) -> None:
    kept, wide = both
    for ids in (torch.tensor([[5, 0, 5], [79, 2, 1]]), torch.tensor([7])):
        assert kept.embed(ids).dtype == torch.float32
        torch.testing.assert_close(kept.embed(ids), wide.embed(ids), rtol=0, atol=0)
    assert kept.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert kept.embedding_rms == pytest.approx(wide.embedding_rms)


def test_losses_and_gradients_are_the_wide_models_own(both: tuple[LanguageModel, LanguageModel]) -> None:
    for found, wanted in zip(*map(loss_and_gradient, both), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_answers_are_the_wide_models_own(both: tuple[LanguageModel, LanguageModel]) -> None:
    embeddings = torch.randn(2, 7, both[0].width, generator=torch.Generator().manual_seed(2))
    said = [llm.generate(embeddings, MASK, 6, llm.prefix(torch.tensor([1, 5]))) for llm in both]
    assert said[0] == said[1]
    assert any(said[0])


@pytest.mark.parametrize("rows", [3, 8192, 9000])
def test_a_wide_product_is_taken_in_slices(rows: int) -> None:
    weight, bias = torch.randn(rows, 5).bfloat16(), torch.randn(rows).bfloat16()
    x = torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_()
    plain = x.detach().clone().requires_grad_()
    found, wanted = linear(x, weight, bias), plain @ weight.double().T + bias.double()
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)


def test_a_wider_weight_decides_the_dtype() -> None:
    found = linear(torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(3, 2), None)
    assert found.dtype == torch.float32 and found.tolist() == [[2.0, 2.0, 2.0]]

"""LLMs in 4 and 8 bits: the gradient that reaches the embeddings, before and after a generation."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hyma_mllm.zoo.llm import LanguageModel, Quantisation, load_llm

bnb: Any = pytest.importorskip("bitsandbytes")

MASK = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=80, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(80)}, unk_token="w3"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", unk_token="w3").save_pretrained(path)
    return path


def rows(llm: LanguageModel) -> Tensor:
    return torch.randn(2, 7, llm.width, generator=torch.Generator().manual_seed(1)) * llm.embedding_rms


def gradient(llm: LanguageModel) -> Tensor:
    embeddings = rows(llm).requires_grad_()
    hidden = llm.hidden(embeddings, MASK, llm.prefix(torch.tensor([1, 5])))
    (found,) = torch.autograd.grad((llm.logits(hidden)[..., :5]).square().sum(), embeddings)
    return found


def plain_weight(layer: nn.Module) -> Tensor:
    if isinstance(layer, bnb.nn.Linear4bit):
        weight: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return weight.float()
    return layer.state.CB.float() * layer.state.SCB.float()[:, None] / 127  # moved there by the first forward pass


def dequantised(llm: LanguageModel) -> LanguageModel:
    """The same network with the very same rounded weights in ordinary layers."""
    plain = load_llm(llm.card, dtype=torch.float32)
    for name, layer in llm.model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            plain.model.get_submodule(name).weight.data = plain_weight(layer).clone()
    return plain


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@pytest.mark.parametrize(("kind", "layer"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_the_gradient_after_a_generate_is_the_dequantised_models(kind: Quantisation, layer: str, folder: Path) -> None:
    llm = load_llm(f"hf:{folder}", dtype=torch.float32, quantisation=kind)
    assert sum(type(module).__name__ == layer for module in llm.modules()) == 14
    reference = dequantised(llm)
    expected, first = gradient(reference), gradient(llm)
    llm.generate(rows(llm), MASK, 4, llm.prefix(torch.tensor([1, 5])))
    after = gradient(llm)
    torch.testing.assert_close(after, first)
    # 8 bits round the activations as well, 4 bits the weights alone.
    assert cosine(after, expected) > {"nf4": 0.9999, "int8": 0.99}[kind]
    assert not any(parameter.requires_grad for parameter in llm.parameters())


def test_no_layer_is_repacked_even_where_the_cpu_could(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that claims AVX512-BF16, as the layers see it while they are made."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    repacked = Mock(side_effect=lambda weight, state: (weight, state))
    monkeypatch.setattr("bitsandbytes.nn.modules._convert_weight_packed_for_cpu", repacked)
    llm = load_llm(f"hf:{folder}", dtype=torch.float32, quantisation="nf4")
    layers = [module for module in llm.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    llm.generate(rows(llm), MASK, 2)
    repacked.assert_not_called()
    # The claim was believed: without the mend the first layer would be re-packed.
    layers[0].support_avx512bf16_for_cpu = True
    with torch.no_grad():
        layers[0](torch.zeros(1, 128))
    repacked.assert_called_once()


def test_eight_bits_do_not_flood_the_log(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_llm(f"hf:{folder}", quantisation="int8")
    assert not [record for record in caplog.records if "will be cast" in record.message]


def test_the_output_layer_and_the_embeddings_stay_plain(folder: Path) -> None:
    llm = load_llm(f"hf:{folder}", quantisation="nf4")
    assert llm.head().weight.dtype == llm.embed(torch.tensor([1])).dtype == torch.bfloat16
    assert llm.width == 128 and llm.vocabulary == 80

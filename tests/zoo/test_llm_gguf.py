"""GGUF files: a small one written here, and the packaged ones that need no network to be described."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from hyma_mllm.errors import HymaError
from hyma_mllm.zoo import llm_gguf
from hyma_mllm.zoo.llm import DEFAULT_LLM_IDS, LLM_CARDS, llm_card, llm_on_disk, load_llm, load_tokenizer
from hyma_mllm.zoo.packaged_llm import PACKAGED_LLMS

gguf = pytest.importorskip("gguf")

LETTERS = sorted(ByteLevel.alphabet())
TOKENS = [*LETTERS, "he", "<|endoftext|>", "<|im_end|>"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def small_qwen() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=10000.0, bos_token_id=257,
        eos_token_id=258, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def gguf_name(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in whole:
        return whole[name]
    number, rest = name.removeprefix("model.layers.").split(".", 1)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{number}.{NAMES[module]}.{kind}"


def write(path: Path, model: PreTrainedModel) -> None:
    """Write the model with Q8_0 matrices, and round its own in the same way."""
    file = gguf.GGUFWriter(path, "qwen2")
    file.add_license("a-licence")
    file.add_context_length(64)
    file.add_embedding_length(32)
    file.add_block_count(2)
    file.add_feed_forward_length(64)
    file.add_head_count(4)
    file.add_head_count_kv(2)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_rope_freq_base(10000.0)
    file.add_vocab_size(len(TOKENS))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("qwen2")
    file.add_token_list(TOKENS)
    file.add_token_types([1] * (len(TOKENS) - 2) + [3, 3])
    file.add_token_merges(["h e"])
    file.add_bos_token_id(257)
    file.add_eos_token_id(258)
    for name, tensor in model.named_parameters():
        values = tensor.detach().numpy()
        if values.ndim == 1:
            file.add_tensor(gguf_name(name), values)
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        packed = gguf.quants.quantize(values, kind)
        file.add_tensor(gguf_name(name), packed, raw_dtype=kind)
        tensor.data = torch.from_numpy(gguf.quants.dequantize(packed, kind).astype(np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, PreTrainedModel]:
    monkeypatch.setenv("HYMA_CACHE", str(tmp_path / "cache"))
    model = small_qwen()
    write(tmp_path / "small.gguf", model)
    return tmp_path / "small.gguf", model


def test_a_gguf_file_is_converted_once_and_computes_the_same(
    small: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, model = small
    card = llm_card(f"gguf:{file}")
    assert (card.width, card.parameters) == (32, sum(p.numel() for p in model.parameters()))
    assert card.revision == hashlib.sha256(file.read_bytes()).hexdigest() and card.licence == "a-licence"
    assert llm_on_disk(card)
    llm = load_llm(card, dtype=torch.float32)
    ids = torch.tensor([[3, 90, 256, 12, 100]])
    for parameter in model.parameters():  # the weights are kept in bfloat16
        parameter.data = parameter.data.bfloat16().float()
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(llm.logits(llm.hidden(llm.embed(ids), torch.ones_like(ids))), expected)
    assert 258 in llm.end_ids
    text = "he said: héhé 7"
    words = load_tokenizer(card)
    encoded = words(text, add_special_tokens=False)["input_ids"]
    assert encoded[0] == 256 and words.decode(encoded) == text
    assert words.pad_token_id is not None and words.chat_template is None
    monkeypatch.setattr(llm_gguf, "dequantise", lambda *_: pytest.fail("converted twice"))
    again = load_llm(f"gguf:{file}#2", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(llm.parameters(), again.parameters(), strict=True))


def test_a_changed_file_is_another_model(small: tuple[Path, PreTrainedModel]) -> None:
    file, model = small
    before = llm_card(f"gguf:{file}").revision
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    file.unlink()
    write(file, model)
    assert llm_card(f"gguf:{file}").revision != before


def test_other_files_are_refused(small: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("nothing of the kind, and long enough to be looked at")
    with pytest.raises(HymaError, match=r"text\.gguf is not the GGUF file of an LLM"):
        llm_card(f"gguf:{tmp_path / 'text.gguf'}")
    file = gguf.GGUFWriter(tmp_path / "other.gguf", "nonesuch")
    file.add_embedding_length(32)
    file.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    card = llm_card(f"gguf:{tmp_path / 'other.gguf'}")
    with pytest.raises(HymaError, match=r"other\.gguf cannot be read as an LLM"):
        load_llm(card)
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]


def test_gguf_files_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(HymaError, match=r"need the package gguf.*hyma_mllm\[zoo\]"):
        llm_card(f"gguf:{tmp_path / 'a.gguf'}")


def test_cards_pin_every_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(LLM_CARDS) == set(PACKAGED_LLMS) == {*DEFAULT_LLM_IDS, "gemma3-270m"}
    for name, card in LLM_CARDS.items():
        assert (card.id, card.kind) == (name, "llm") and card.licence and card.origin
        assert card.opt_in == (card.terms is not None) == (name not in DEFAULT_LLM_IDS)
        hashes = [archive.sha256 for archive, _ in PACKAGED_LLMS[name].parts]
        joined = hashlib.sha256("".join(hashes).encode()).hexdigest()
        assert card.revision == (hashes[0] if len(hashes) == 1 else joined)
    monkeypatch.setenv("HYMA_CACHE", str(tmp_path))
    assert not any(llm_on_disk(card) for card in LLM_CARDS.values())

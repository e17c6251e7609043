"""The shape of an LLM, read from its directory or guessed."""

from typing import Any

from transformers import AutoModelForCausalLM, LlamaConfig

from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.llm_shape import guessed_shape, llm_shape


def test_the_shape_of_an_llm_is_read_from_its_config(tmp_path: Any) -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    card = ModelCard(f"hf:{tmp_path}", "llm", "test", "r", 24, model.num_parameters(), "MIT")
    shape = llm_shape(card)
    assert (shape.layers, shape.width, shape.inner, shape.vocabulary) == (3, 24, 40, 50)
    assert (shape.heads_width, shape.kv_width, shape.embeddings) == (24, 12, 2 * 50 * 24)
    assert shape.body == model.num_parameters() - 2 * 50 * 24 and not shape.estimated


def test_what_is_not_here_is_guessed_and_keeps_its_weights() -> None:
    shape = guessed_shape(4096, 6_700_000_000)
    assert shape.estimated and 25 <= shape.layers <= 40
    assert shape.body + shape.embeddings == 6_700_000_000
    assert guessed_shape(8, 100).layers >= 1

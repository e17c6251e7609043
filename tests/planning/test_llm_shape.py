"""The shape of an LLM, read from its directory or guessed."""

from pathlib import Path

from transformers import LlamaForCausalLM

from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.llm_shape import guessed_shape, llm_shape


def test_the_shape_of_an_llm_is_read_from_its_config(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    card = ModelCard(f"hf:{tmp_path}", "llm", "test", "r", 64, llama.num_parameters(), "MIT")
    shape = llm_shape(card)
    assert (shape.layers, shape.width, shape.inner, shape.vocabulary) == (3, 64, 160, 100)
    assert (shape.heads_width, shape.kv_width, shape.embeddings) == (64, 32, 2 * 100 * 64)
    assert shape.body == llama.num_parameters() - 2 * 100 * 64 and not shape.estimated


def test_what_is_not_here_is_guessed_and_keeps_its_weights() -> None:
    shape = guessed_shape(4096, 6_700_000_000)
    assert shape.estimated and 25 <= shape.layers <= 40
    assert shape.body + shape.embeddings == 6_700_000_000
    assert guessed_shape(8, 100).layers >= 1

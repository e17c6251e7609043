"""Sizes that are reckoned are those of the real thing."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.hypernetwork.network import Hypernetwork, describe
from hyma_mllm.hypernetwork.presets import HypernetworkConfig
from hyma_mllm.pairs import PairGrid
from hyma_mllm.planning.network import all_weights, frozen_starts, hypernetwork_weights
from hyma_mllm.search.starts import stand_ins
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.llm_shape import guessed_shape, llm_shape

GRIDS = [
    PairGrid(("a", "b", "c"), (16, 16, 24), ("x", "y"), (12, 20)),
    PairGrid(("a", "b"), (16, 24), ("x", "y", "z"), (20, 20, 12), "vision_to_text"),
    PairGrid(("a",), (8,), ("x",), (8,)),
]
OPTIONS: list[tuple[int, dict[str, Any]]] = [
    (0, {}),
    (1, {}),
    (2, {}),
    (1, {"preset": "closed-form"}),
    (0, {"preset": "closed-form", "rank": 64}),
    (1, {"preset": "hyma"}),
    (1, {"preset": "hyma", "initialisation": "torch"}),
    (0, {"preset": "hyper-align"}),
    (1, {"head": "chunked", "chunk_rows": 5}),
    (1, {"condition": "features", "base": "shape"}),
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{len(grid)} pairs")
@pytest.mark.parametrize(("depth", "options"), OPTIONS, ids=str)
def test_weights_are_counted_as_they_are_made(grid: PairGrid, depth: int, options: dict[str, Any]) -> None:
    spec, config = ConnectorSpec(depth, 10), HypernetworkConfig(trunk=[6, 7], condition_width=5, **options)
    starts = stand_ins(grid, spec) if options.get("preset") == "closed-form" else None
    means = [torch.randn(w) for w in grid.vision_widths], [torch.randn(w) for w in grid.text_widths]
    network = Hypernetwork(grid, spec, config, *means, starts=starts)
    assert hypernetwork_weights(grid, spec, config) == describe(network)["hypernetwork_parameters"]
    assert all_weights(grid, spec) == describe(network)["connector_parameters"]
    held = sum(
        value.numel() for name, value in network.named_buffers() if name.rpartition(".")[2] in ("weight", "bias")
    )
    assert frozen_starts(grid, spec, config) == held


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

"""Sizes that are reckoned are those of the real thing."""

from typing import Any

import pytest
import torch

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.hypernetwork.network import Hypernetwork, describe
from hyma_mllm.hypernetwork.presets import HypernetworkConfig
from hyma_mllm.hypernetwork.sizes import all_weights, frozen_starts, hypernetwork_weights
from hyma_mllm.pairs import PairGrid

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
    starts = None
    if options.get("preset") == "closed-form":
        fresh = torch.Generator().manual_seed(0)
        starts = [connectors.select(connectors.initial(spec, grid.shape(k), 1, fresh), 0) for k in range(len(grid))]
    means = [torch.randn(w) for w in grid.vision_widths], [torch.randn(w) for w in grid.text_widths]
    network = Hypernetwork(grid, spec, config, *means, starts=starts)
    assert hypernetwork_weights(grid, spec, config) == describe(network)["hypernetwork_parameters"]
    assert all_weights(grid, spec) == describe(network)["connector_parameters"]
    held = sum(
        value.numel() for name, value in network.named_buffers() if name.rpartition(".")[2] in ("weight", "bias")
    )
    assert frozen_starts(grid, spec, config) == held

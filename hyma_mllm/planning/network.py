"""How large a hypernetwork will be, without making it: of large LLMs its bases alone are gigabytes."""

import torch

from hyma_mllm.connectors import ConnectorSpec, LayerShape
from hyma_mllm.hypernetwork.base import owners
from hyma_mllm.hypernetwork.conditions import build_condition
from hyma_mllm.hypernetwork.presets import HypernetworkConfig, Parts, parts
from hyma_mllm.hypernetwork.trunk import Trunk
from hyma_mllm.pairs import PairGrid


def hypernetwork_weights(grid: PairGrid, spec: ConnectorSpec, config: HypernetworkConfig) -> int:
    """Trained weights of `Hypernetwork(grid, spec, config, ...)`.

    Args:
        grid: the pairs.
        spec: the family of connectors.
        config: the parts.
    """
    chosen = parts(config, spec.depth)
    generator, normalise = torch.Generator(), config.initialisation == "hyper"
    seen, said = ([torch.randn(width) for width in widths] for widths in (grid.vision_widths, grid.text_widths))
    small = (
        build_condition(chosen.condition, grid, config.condition_width, generator, seen, said, normalise),
        Trunk(config.condition_width, config.trunk, generator, normalise),
    )
    layers = {layer for index in range(len(grid)) for layer in spec.layers(*grid.shape(index))}
    total = sum(weight.numel() for module in small for weight in module.parameters())
    total += len(layers) * config.condition_width
    for layer in layers:
        held = sum(len(set(term) - {None}) for term in owners(chosen.base, grid, spec, layer))
        total += held * layer.fan_out * (layer.fan_in + 1) + _head_weights(layer, chosen, config)
    return total


def frozen_starts(grid: PairGrid, spec: ConnectorSpec, config: HypernetworkConfig) -> int:
    """Weights of the closed-form starts that a hypernetwork holds and does not train; 0 for other bases."""
    return all_weights(grid, spec) if parts(config, spec.depth).base == "closed_form" else 0


def all_weights(grid: PairGrid, spec: ConnectorSpec) -> int:
    """Weights of all pairs' connectors together: what a grid search trains."""
    return sum(spec.parameters(*grid.shape(index)) for index in range(len(grid)))


def _head_weights(layer: LayerShape, chosen: Parts, config: HypernetworkConfig) -> int:
    width = config.trunk[-1]
    if chosen.head == "dense":
        return layer.fan_out * (layer.fan_in + 1) * width
    if chosen.head == "chunked":
        top = min(config.chunk_rows, layer.fan_out)
        rows = max(rows for rows in range(1, top + 1) if layer.fan_out % rows == 0)
        return (layer.fan_out // rows + rows * (layer.fan_in + 1)) * width
    rank = min(config.rank, layer.fan_in, layer.fan_out)
    return (layer.fan_out * (rank + 1) + layer.fan_in * rank) * width

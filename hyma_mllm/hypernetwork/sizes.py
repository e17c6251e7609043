"""How large a hypernetwork will be, without making it: of large LLMs its bases alone are gigabytes."""

from typing import NamedTuple

import torch

from hyma_mllm.connectors import ConnectorSpec, LayerShape
from hyma_mllm.hypernetwork.base import owners
from hyma_mllm.hypernetwork.conditions import build_condition
from hyma_mllm.hypernetwork.heads import rows_of_chunk
from hyma_mllm.hypernetwork.presets import HypernetworkConfig, parts
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
        head = head_sizes(layer, spec, config)
        total += held * layer.fan_out * (layer.fan_in + 1) + (sum(head.outputs) + head.blocks) * config.trunk[-1]
    return total


def frozen_starts(grid: PairGrid, spec: ConnectorSpec, config: HypernetworkConfig) -> int:
    """Weights of the closed-form starts that a hypernetwork holds and does not train; 0 for other bases."""
    return all_weights(grid, spec) if parts(config, spec.depth).base == "closed_form" else 0


def all_weights(grid: PairGrid, spec: ConnectorSpec) -> int:
    """Weights of all pairs' connectors together: what a grid search trains."""
    return sum(spec.parameters(*grid.shape(index)) for index in range(len(grid)))


def size_line(grid: PairGrid, spec: ConnectorSpec, config: HypernetworkConfig, noun: str) -> str:
    """The sizes in a line, for the bill.

    Args:
        grid: the pairs.
        spec: the family of connectors.
        config: the parts.
        noun: what the case calls its connectors, in the plural.
    """
    own, predicted = hypernetwork_weights(grid, spec, config), all_weights(grid, spec)
    return f"hypernetwork {own / 1e6:.2f} M parameters, all {noun} {predicted / 1e6:.2f} M, ratio {own / predicted:.3f}"


class HeadSizes(NamedTuple):
    """The products of a head with the codes of the pairs.

    Attributes:
        outputs: of each product.
        blocks: of rows that share the weights, each with a learned row of its own; 0 where none share.
        rank: of the product of the two factors behind them; 0 where there is none.
    """

    outputs: tuple[int, ...]
    blocks: int = 0
    rank: int = 0


def head_sizes(layer: LayerShape, spec: ConnectorSpec, config: HypernetworkConfig) -> HeadSizes:
    """What the head of a layer multiplies.

    Args:
        layer: the shape.
        spec: the family of connectors, which decides where the configuration does not.
        config: the parts.
    """
    kind = parts(config, spec.depth).head
    if kind == "dense":
        return HeadSizes((layer.fan_out * (layer.fan_in + 1),))
    if kind == "chunked":
        rows = rows_of_chunk(layer, config.chunk_rows)
        return HeadSizes((rows * (layer.fan_in + 1),), blocks=layer.fan_out // rows)
    rank = min(config.rank, layer.fan_in, layer.fan_out)
    return HeadSizes((layer.fan_out * rank, layer.fan_in * rank, layer.fan_out), rank=rank)

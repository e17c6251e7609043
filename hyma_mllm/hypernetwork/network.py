"""The hypernetwork: pairs in, stacked connectors out (HYMA, arXiv 2507.10015, section 3).

condition of the pair + learned row of the layer -> trunk -> code -> head of the layer's shape, added to its base.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorGroup, ConnectorParams, ConnectorSpec, LayerShape
from hyma_mllm.errors import HymaError
from hyma_mllm.hypernetwork.base import LayerBase, Start, owners
from hyma_mllm.hypernetwork.conditions import build_condition, unit_rms
from hyma_mllm.hypernetwork.heads import ChunkedHead, DenseHead, LowRankHead
from hyma_mllm.hypernetwork.initialise import normal
from hyma_mllm.hypernetwork.presets import HypernetworkConfig, parts
from hyma_mllm.hypernetwork.sizes import all_weights
from hyma_mllm.hypernetwork.trunk import Trunk
from hyma_mllm.pairs import PairGrid


class Hypernetwork(nn.Module):
    """Predicts the connector of every pair of a grid, of any mix of widths, in float32 even under autocast.

    Args:
        grid: the pairs.
        spec: the family of connectors.
        config: the parts.
        vision_means: for the condition `features`: mean feature [width] of each vision model over the whole set.
        text_means: the same of each text model.
        seed: of the initial weights, which do not depend on torch's global generator.
        starts: for the base `closed_form`: per pair in grid order, the plain state dict of `spec` that it starts from.

    Raises:
        HymaError: if the parts do not go together, the condition `features` lacks usable means, or the base
            `closed_form` lacks starts.
        ValueError: if there are starts for another base, or of another number, family or shape.
    """

    def __init__(
        self,
        grid: PairGrid,
        spec: ConnectorSpec,
        config: HypernetworkConfig,
        vision_means: Sequence[Tensor] | None = None,
        text_means: Sequence[Tensor] | None = None,
        seed: int = 0,
        starts: Sequence[Mapping[str, Tensor]] | None = None,
    ):
        super().__init__()
        self.grid = grid
        self.spec = spec
        self.config = config
        self.parts = parts(config, spec.depth)
        starts = _checked(starts, self.parts.base == "closed_form", grid, spec)
        self.normalise = config.initialisation == "hyper"
        self.layers = _distinct(layer for shape in _shapes(grid) for layer in spec.layers(*shape))
        generator = torch.Generator().manual_seed(seed)
        self.condition = build_condition(
            self.parts.condition, grid, config.condition_width, generator, vision_means, text_means, self.normalise
        )
        self.layer_rows = normal(len(self.layers), config.condition_width, generator=generator)
        self.trunk = Trunk(config.condition_width, config.trunk, generator, self.normalise)
        self.bases = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        for layer in self.layers:
            bound = None if self.normalise else config.trunk[-1] ** -0.5
            terms = owners(self.parts.base, grid, spec, layer)
            start = Start(layer, _having(layer, starts, grid, spec)) if starts else None
            self.bases[layer_name(layer)] = LayerBase(layer, terms, generator, bound, start)
            self.heads[layer_name(layer)] = self._head(layer, generator)

    def _head(self, layer: LayerShape, generator: torch.Generator) -> nn.Module:
        config, width = self.config, self.config.trunk[-1]
        if self.parts.head == "dense":
            return DenseHead(width, layer, None if self.normalise else generator)
        if self.parts.head == "chunked":
            return ChunkedHead(width, layer, config.chunk_rows, generator)
        return LowRankHead(width, layer, config.rank, config.alpha, generator)

    def forward(self, pairs: Tensor | Sequence[int]) -> list[ConnectorGroup]:
        """The connectors of `pairs` (indices in the grid, any order, repeats allowed), grouped by shape.

        Every pair stands in exactly one group; groups come in the order in which their shapes first appear.

        Raises:
            IndexError: for a pair that the grid does not have.
        """
        indices = [int(index) for index in pairs]
        groups = self.grid.by_shape(indices)
        if not groups:
            return []
        with torch.autocast(self.layer_rows.device.type, enabled=False):
            predicted = self._predict(indices, groups)
        return [
            ConnectorGroup(
                positions=torch.tensor(positions),
                pairs=torch.tensor([indices[position] for position in positions]),
                shape=shape,
                params=predicted[shape],
            )
            for shape, positions in groups.items()
        ]

    def _predict(
        self, indices: list[int], groups: dict[tuple[int, int], list[int]]
    ) -> dict[tuple[int, int], ConnectorParams]:
        """Weights per connector shape. Each head runs once, on all pairs that have its layer whatever their shape."""
        device = self.layer_rows.device
        shapes_of = {layer: [shape for shape in groups if layer in self.spec.layers(*shape)] for layer in self.layers}
        asked = [layer for layer in self.layers if shapes_of[layer]]
        positions = [[p for shape in shapes_of[layer] for p in groups[shape]] for layer in asked]
        sizes = [len(members) for members in positions]
        members = torch.tensor([indices[p] for layer_positions in positions for p in layer_positions], device=device)
        number = torch.tensor([self.layers.index(layer) for layer in asked], device=device)
        number = number.repeat_interleave(torch.tensor(sizes, device=device), output_size=sum(sizes))
        codes = self._codes(members, number)

        predicted: dict[tuple[int, int], ConnectorParams] = {shape: {} for shape in groups}
        for layer, code, rows in zip(asked, torch.split(codes, sizes), torch.split(members, sizes), strict=True):
            weight, bias = self.heads[layer_name(layer)](code, *self.bases[layer_name(layer)](rows))
            counts = [len(groups[shape]) for shape in shapes_of[layer]]
            split = zip(shapes_of[layer], torch.split(weight, counts), torch.split(bias, counts), strict=True)
            for shape, part, part_bias in split:
                predicted[shape][f"{layer.index}.weight"] = part
                predicted[shape][f"{layer.index}.bias"] = part_bias
        return predicted

    def _codes(self, pairs: Tensor, layers: Tensor) -> Tensor:
        """Codes [rows, trunk[-1]] of pairs [rows] at the layers with these numbers [rows]."""
        condition: Tensor = self.condition(pairs)
        rows = self.layer_rows.index_select(0, layers)
        mixed = unit_rms(condition + unit_rms(rows)) if self.normalise else condition + rows
        codes: Tensor = self.trunk(mixed)
        return codes


def describe(network: Hypernetwork) -> dict[str, float]:
    """Sizes, for the log before training.

    Returns:
        `hypernetwork_parameters`; `connector_parameters`, summed over all pairs of the grid; `ratio` of the two.
    """
    own = sum(parameter.numel() for parameter in network.parameters())
    connectors = all_weights(network.grid, network.spec)
    return {"hypernetwork_parameters": own, "connector_parameters": connectors, "ratio": own / connectors}


def _checked(
    starts: Sequence[Mapping[str, Tensor]] | None, wanted: bool, grid: PairGrid, spec: ConnectorSpec
) -> Sequence[Mapping[str, Tensor]]:
    """The starts, none where the base does not want them."""
    if not wanted:
        if starts is not None:
            raise ValueError("only a hypernetwork of the base closed_form has starts")
        return []
    if starts is None:
        raise HymaError(
            "The hypernetwork's base closed_form needs a start for every pair and got none; it is for the search of "
            "image and text encoders (recipes/vlm.py): set hypernetwork.preset to default here."
        )
    if len(starts) != len(grid):
        raise ValueError(f"a grid of {len(grid)} pairs has as many starts, not {len(starts)}")
    for index, state in enumerate(starts):
        connectors.check_state(spec, grid.shape(index), state)
    return starts


def _having(
    layer: LayerShape, starts: Sequence[Mapping[str, Tensor]], grid: PairGrid, spec: ConnectorSpec
) -> list[Mapping[str, Tensor] | None]:
    """The starts, None for a pair without the layer."""
    return [state if layer in spec.layers(*grid.shape(index)) else None for index, state in enumerate(starts)]


def _shapes(grid: PairGrid) -> list[tuple[int, int]]:
    return list(grid.by_shape(range(len(grid))))


def _distinct(layers: Iterable[LayerShape]) -> tuple[LayerShape, ...]:
    return tuple(sorted(set(layers), key=lambda layer: (layer.index, layer.fan_in, layer.fan_out)))


def layer_name(layer: LayerShape) -> str:
    """The name of a layer's base and head in a hypernetwork's state dict."""
    return f"{layer.index}_{layer.fan_in}x{layer.fan_out}"

"""A model that a trained hypernetwork has not seen: the connectors that it predicts for it, and what adapts them.

What is learnt of a pair hangs on its two models: their codes and, in a factored base, their terms. Those of the partner
are known; of the newcomer there is nothing but what can be guessed before any sample shows both sides:

- its code: with the condition `features` computed from its mean feature, with `factored` that of a trained model that
  it is `like`, or the mean of all;
- its terms of the base: those of the model that it is like, if their widths agree, or the mean of its width;
- a layer of a width that no trained model has cannot be predicted at all: no head and no base emit it. With the base
  `closed_form` the start does (it takes samples of both sides), and the delta is zero.

`Adapted` then lets a few samples correct the code and add a low-rank delta to each connector, all else frozen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from hyma_mllm.connectors import ConnectorGroup, ConnectorParams, ConnectorSpec, LayerShape
from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.hypernetwork.base import LayerBase, Term
from hyma_mllm.hypernetwork.conditions import FeatureRows, LearnedRows, ModelCondition, checked_means
from hyma_mllm.hypernetwork.initialise import normal
from hyma_mllm.hypernetwork.network import Hypernetwork, layer_name
from hyma_mllm.pairs import PairGrid

Side = Literal["vision", "text"]


@dataclass(frozen=True, eq=False)
class Newcomer:
    """A model that was not trained.

    Attributes:
        side: of the grid that it joins.
        id: its name, which no trained model of that side has.
        width: of its features.
        like: id of the trained model of that side that it is most like (`search.similarity.within` tells), or None.
        mean: for the condition `features`: its mean L2-normalised feature [width] before any centring.
    """

    side: Side
    id: str
    width: int
    like: str | None = None
    mean: Tensor | None = None

    def grid(self, trained: PairGrid) -> PairGrid:
        """Its pairs with all models of the other side; pair `k` is that with partner `k`."""
        if self.side == "vision":
            return replace(trained, vision_ids=(self.id,), vision_widths=(self.width,))
        return replace(trained, text_ids=(self.id,), text_widths=(self.width,))


def adopt(
    network: Hypernetwork, newcomer: Newcomer, starts: Sequence[Mapping[str, Tensor]] | None = None, seed: int = 0
) -> Hypernetwork:
    """A hypernetwork of the newcomer's pairs, with everything that the trained one knows of them.

    Its condition is `factored`, whatever the trained one's: the newcomer's code is a free row, the only parameter that
    asks for a gradient. The trained network is not changed.

    Args:
        network: the trained one, of the condition `factored` or `features`.
        newcomer: the model.
        starts: for the base `closed_form`: per partner in order, the connector that the pair starts from.
        seed: of the delta of layers that no trained model has, before it is learnt zero.

    Raises:
        HymaError: the network tells pairs and not models apart, the newcomer is trained, is like none, or lacks a mean;
            or its width was never trained and there are no starts to carry it.
        ValueError: if there are starts for another base, or of another number, family or shape.
    """
    condition = _condition(network, newcomer)
    chosen = network.parts
    if chosen.base == "closed_form" and starts is None:
        raise HymaError(
            f"The base closed_form needs a start for every pair of {newcomer.id} and got none; compute closed forms "
            "from samples of both sides, or borrow connectors over a bridge (search.unseen)."
        )
    config = replace(network.config, condition="factored", head=chosen.head, base=chosen.base)
    adopted = Hypernetwork(newcomer.grid(network.grid), network.spec, config, seed=seed, starts=starts)
    known = [layer for layer in adopted.layers if layer in network.layers]
    if len(known) < len(adopted.layers) and starts is None:
        raise HymaError(
            f"{newcomer.id} has the width {newcomer.width}, which no trained {newcomer.side} model has, and no head "
            "predicts its connectors; borrow them over a bridge (search.unseen), or train with hypernetwork.base "
            "closed_form."
        )
    with torch.no_grad():
        adopted.trunk.load_state_dict(network.trunk.state_dict())
        own, partners = _sides(adopted.condition, newcomer.side)
        _, trained_partners = _sides(condition, newcomer.side)
        partners.rows.copy_(trained_partners(torch.arange(len(partners.rows), device=network.layer_rows.device)))
        own.rows.copy_(_code(condition, network.grid, newcomer))
        for layer in known:
            adopted.layer_rows[adopted.layers.index(layer)] = network.layer_rows[network.layers.index(layer)]
            name = layer_name(layer)
            adopted.heads[name].load_state_dict(network.heads[name].state_dict())
            _fill_base(adopted, network, layer, name, newcomer)
    adopted.requires_grad_(False)
    own.rows.requires_grad_(True)
    return adopted.to(network.layer_rows.device)


def _condition(network: Hypernetwork, newcomer: Newcomer) -> ModelCondition:
    """The trained condition, where it can take this newcomer."""
    ids = _ids(network.grid, newcomer.side)
    condition = network.condition
    if not isinstance(condition, ModelCondition):
        raise HymaError(
            "A hypernetwork of the condition pair knows pairs and no models, so that it can say nothing of "
            f"{newcomer.id}; train one with hypernetwork.condition factored or features."
        )
    if newcomer.id in ids:
        raise HymaError(f"{newcomer.id} was trained; ask the hypernetwork itself for its pairs.")
    if newcomer.like is not None and newcomer.like not in ids:
        raise HymaError(f"{newcomer.id} cannot be like {newcomer.like}; {near_names(newcomer.like, ids)}.")
    if newcomer.width < 1:
        raise HymaError(f"{newcomer.id} has the width {newcomer.width}; give the number of its features.")
    return condition


def _ids(grid: PairGrid, side: Side) -> tuple[str, ...]:
    return grid.vision_ids if side == "vision" else grid.text_ids


def _sides(condition: nn.Module, side: Side) -> tuple[LearnedRows, LearnedRows]:
    """The rows of the newcomer's side, and those of its partners."""
    assert isinstance(condition, ModelCondition)
    vision, text = condition.vision, condition.text
    return (vision, text) if side == "vision" else (text, vision)  # type: ignore[return-value]


def _code(condition: ModelCondition, grid: PairGrid, newcomer: Newcomer) -> Tensor:
    """The code [width of a condition] that is guessed for the newcomer."""
    rows = condition.vision if newcomer.side == "vision" else condition.text
    if isinstance(rows, FeatureRows) and newcomer.width in rows.widths:
        (mean,) = checked_means(None if newcomer.mean is None else [newcomer.mean], (newcomer.id,), (newcomer.width,))
        return rows.row(mean)
    ids = _ids(grid, newcomer.side)
    every: Tensor = rows(torch.arange(len(ids), device=next(rows.parameters()).device))
    return every.mean(0) if newcomer.like is None else every[ids.index(newcomer.like)]


def _fill_base(adopted: Hypernetwork, network: Hypernetwork, layer: LayerShape, name: str, newcomer: Newcomer) -> None:
    """Give the newcomer's base of this layer its partners' terms, and a guess of its own."""
    mine, theirs = adopted.bases[name], network.bases[name]
    assert isinstance(mine, LayerBase) and isinstance(theirs, LayerBase)
    sides = _term_sides(network, layer)
    for side, target, source in zip(sides, mine.terms, theirs.terms, strict=True):
        assert isinstance(target, Term) and isinstance(source, Term)
        for partner, row in enumerate(target.rows.tolist()):
            if row < 0:
                continue
            found = _trained_row(network.grid, source, side, partner, newcomer)
            for kind in ("weight", "bias"):
                values = getattr(source, kind)
                getattr(target, kind)[row] = values.mean(0) if found is None else values[found]


def _term_sides(network: Hypernetwork, layer: LayerShape) -> list[Side | None]:
    """Whose each term of a layer's base is: of the models of a side, or (None) of all pairs."""
    reads, writes = ("text", "vision") if network.grid.direction == "text_to_vision" else ("vision", "text")
    sides: list[Side | None] = []
    if network.parts.base != "shape":
        sides += [reads] if layer.index == 0 else []  # type: ignore[list-item]
        sides += [writes] if layer.index == 2 * network.spec.depth else []  # type: ignore[list-item]
    return sides or [None]


def _trained_row(grid: PairGrid, term: Term, side: Side | None, partner: int, newcomer: Newcomer) -> int | None:
    """The owner's row of a trained term that this pair of the newcomer takes over; None takes the mean of them all."""
    if side is None:
        return 0
    rows = term.rows.tolist()
    if side != newcomer.side:
        holders = [pair for pair in grid.pairs() if (pair.text if side == "text" else pair.vision) == partner]
    elif newcomer.like is not None:
        number = _ids(grid, side).index(newcomer.like)
        holders = [pair for pair in grid.pairs() if (pair.text if side == "text" else pair.vision) == number]
    else:
        return None
    return next((rows[pair.index] for pair in holders if rows[pair.index] >= 0), None)


class Adapted(nn.Module):
    """A source of connectors with a free low-rank delta for each layer of each pair, zero at first.

    The deltas, and whatever of the source asks for a gradient, are all that a training changes. A delta is
    U V / sqrt(rank * fan_in) with V of unit normal entries, so that an Adam step of size lr on U moves a weight by
    about lr / sqrt(fan_in), a share of about lr of a fresh one.

    Args:
        source: makes the connectors of the grid, as a hypernetwork does.
        grid: the pairs.
        spec: their family.
        rank: of the deltas, at most.
        seed: of V.
    """

    def __init__(self, source: nn.Module, grid: PairGrid, spec: ConnectorSpec, rank: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.source, self.spec = source, spec
        self.row_of = [0] * len(grid)
        self.factors = nn.ParameterDict()
        generator = torch.Generator().manual_seed(seed)
        for shape, members in grid.by_shape(range(len(grid))).items():
            for row, index in enumerate(members):
                self.row_of[index] = row
            for layer in spec.layers(*shape):
                name, fitting = _factor_name(shape, layer), min(rank, layer.fan_in, layer.fan_out)
                self.factors[f"{name}_up"] = nn.Parameter(torch.zeros(len(members), layer.fan_out, fitting))
                self.factors[f"{name}_down"] = normal(len(members), fitting, layer.fan_in, generator=generator)
                self.factors[f"{name}_bias"] = nn.Parameter(torch.zeros(len(members), layer.fan_out))

    def forward(self, pairs: Tensor | Sequence[int]) -> list[ConnectorGroup]:
        """The connectors of these pairs, grouped by shape as the source groups them."""
        return [replace(group, params=self._moved(group)) for group in self.source(pairs)]

    def step_flops(self, pairs: Sequence[int], grid: PairGrid) -> float:
        """Forward and backward FLOPs of the deltas of these pairs."""
        layers = [layer for index in pairs for layer in self.spec.layers(*grid.shape(index))]
        ranks = [self.factors[f"{_factor_name(grid.shape(i), layer)}_up"].shape[2]
                 for i in pairs for layer in self.spec.layers(*grid.shape(i))]  # fmt: skip
        return float(sum(6 * layer.fan_out * rank * layer.fan_in for layer, rank in zip(layers, ranks, strict=True)))

    def _moved(self, group: ConnectorGroup) -> ConnectorParams:
        rows = torch.tensor([self.row_of[index] for index in group.pairs.tolist()])
        params: ConnectorParams = {}
        for layer in self.spec.layers(*group.shape):
            name = _factor_name(group.shape, layer)
            up, down, bias = (self.factors[f"{name}_{kind}"] for kind in ("up", "down", "bias"))
            taken = rows.to(up.device)
            scale = (up.shape[2] * layer.fan_in) ** -0.5
            weight, offset = group.params[f"{layer.index}.weight"], group.params[f"{layer.index}.bias"]
            params[f"{layer.index}.weight"] = torch.baddbmm(weight, up[taken], down[taken], alpha=scale)
            params[f"{layer.index}.bias"] = offset + bias[taken] * layer.fan_in**-0.5
        return params


def _factor_name(shape: tuple[int, int], layer: LayerShape) -> str:
    return f"{shape[0]}x{shape[1]}_{layer.index}"

"""What a predicted layer starts from: learned full weights, shared by many pairs, to which a head adds its delta.

`shape`: one base per distinct layer shape; with the dense head this is the bias of the paper's last Linear.
`factored`: a base is a sum of terms, one for each model that the layer touches. The layer that reads the features of a
model has a term per such model, and so has the layer that writes into the space of a model; the one layer of a linear
connector has both, and layers in between keep one base per shape. An MLP's pairs then meet in one hidden space, the
number of parameters grows with N + M instead of N * M, and each term learns from all pairs of its model.

`closed_form`: each pair's own frozen start (a connector that a closed form gives), plus the terms of `factored`, which
start at zero. The predicted connectors begin as the starts, and what the pairs of a model share is learnt.

All terms of one shape start from the same draw, so that pairs differ by their models and not by their luck.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from hyma_mllm.connectors import ConnectorSpec, LayerShape
from hyma_mllm.hypernetwork.initialise import uniform
from hyma_mllm.pairs import PairGrid

BaseKind = Literal["shape", "factored", "closed_form"]

Owners = list[int | None]
"""[pairs of the grid]: who owns a term of a layer's base, by number; None where the pair lacks the layer."""


def owners(kind: BaseKind, grid: PairGrid, spec: ConnectorSpec, layer: LayerShape) -> list[Owners]:
    """The terms of the base of `layer`, each by its owners: models, or 0 for all pairs where they share."""
    pairs = grid.pairs()
    has = [layer in spec.layers(*grid.shape(pair.index)) for pair in pairs]
    vision, text = [pair.vision for pair in pairs], [pair.text for pair in pairs]
    reads, writes = (text, vision) if grid.direction == "text_to_vision" else (vision, text)
    terms: list[list[int]] = []
    if kind != "shape":
        terms += [reads] if layer.index == 0 else []
        terms += [writes] if layer.index == 2 * spec.depth else []
    return [
        [owner if held else None for owner, held in zip(term, has, strict=True)] for term in terms or [[0] * len(pairs)]
    ]


class Term(nn.Module):
    """One term: full weights [owners, out, in] and biases [owners, out], float32, the same for all owners at first."""

    rows: Tensor

    def __init__(self, owner_of_pair: Owners, weight: Tensor, bias: Tensor):
        super().__init__()
        names = sorted({owner for owner in owner_of_pair if owner is not None})
        self.weight = nn.Parameter(weight.repeat(len(names), 1, 1))
        self.bias = nn.Parameter(bias.repeat(len(names), 1))
        rows = [-1 if owner is None else names.index(owner) for owner in owner_of_pair]
        self.register_buffer("rows", torch.tensor(rows), persistent=False)

    def forward(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [pairs, out, in] and bias [pairs, out] of the pairs' owners; broadcast views if there is one."""
        if len(self.weight) == 1:
            return self.weight.expand(len(pairs), -1, -1), self.bias.expand(len(pairs), -1)
        rows = self.rows.index_select(0, pairs)
        return self.weight.index_select(0, rows), self.bias.index_select(0, rows)


class Start(nn.Module):
    """The frozen starts of one layer: buffers weight [pairs with the layer, out, in] and bias [.., out], float32.

    They are no parameters, but the state dict holds them: a checkpoint loads into a network of other starts.

    Args:
        layer: the shape.
        starts: per pair of the grid in order, its plain state dict; None where the pair lacks the layer.
    """

    weight: Tensor
    bias: Tensor
    rows: Tensor

    def __init__(self, layer: LayerShape, starts: Sequence[Mapping[str, Tensor] | None]):
        super().__init__()
        having = [index for index, state in enumerate(starts) if state is not None]
        states = [state for state in starts if state is not None]
        for kind in ("weight", "bias"):
            stacked = torch.stack([state[f"{layer.index}.{kind}"].detach().float().cpu() for state in states])
            self.register_buffer(kind, stacked)
        rows = [having.index(index) if index in having else -1 for index in range(len(starts))]
        self.register_buffer("rows", torch.tensor(rows), persistent=False)

    def forward(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [pairs, out, in] and bias [pairs, out] of these pairs, fresh copies."""
        rows = self.rows.index_select(0, pairs)
        return self.weight.index_select(0, rows), self.bias.index_select(0, rows)


class LayerBase(nn.Module):
    """The base of one layer shape, a sum of terms. The first starts as a new nn.Linear, the others at zero.

    Args:
        layer: the shape.
        terms: as `owners` gives them.
        generator: draws the initial weights.
        bound: of the uniform initial weights and biases; None is nn.Linear's, 1/sqrt(fan_in).
        start: what the terms are added to; all of them then start at zero.
    """

    def __init__(
        self,
        layer: LayerShape,
        terms: Sequence[Owners],
        generator: torch.Generator,
        bound: float | None = None,
        start: Start | None = None,
    ):
        super().__init__()
        self.start = start
        bound = 1 / math.sqrt(layer.fan_in) if bound is None else bound
        weight = uniform(layer.fan_out, layer.fan_in, bound=bound, generator=generator)
        bias = uniform(layer.fan_out, bound=bound, generator=generator)
        self.terms = nn.ModuleList(
            Term(owner_of_pair, weight, bias)
            if number == 0 and start is None
            else Term(owner_of_pair, torch.zeros_like(weight), torch.zeros_like(bias))
            for number, owner_of_pair in enumerate(terms)
        )
        self.copies = start is not None or len(set(terms[0]) - {None}) > 1

    def forward(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [pairs, out, in] and bias [pairs, out] of the pairs with these indices."""
        first, *others = self.terms if self.start is None else (self.start, *self.terms)
        weight, bias = first(pairs)
        for term in others:
            more, more_bias = term(pairs)
            # A start, and a first term of several owners, is a fresh copy: adding in place saves another one.
            weight = weight.add_(more) if self.copies else weight + more
            bias = bias + more_bias
        return weight, bias

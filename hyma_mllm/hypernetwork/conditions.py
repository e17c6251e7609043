"""What the hypernetwork is told about a pair: the condition, one row [width] per pair.

- `pair`: a learned row per pair (HYMA, arXiv 2507.10015, section 3).
- `factored`: a learned row per vision model, one per text model, and their product.
- `features`: the same sum, but a model's row is a projection of its mean feature over the whole set (Hyper-Align), so
  that models of one width share all parameters and a model that is listed twice gets the same row twice.

Rows are brought to unit RMS, so that the size of what is predicted does not follow the size of the condition
(magnitude invariant parametrisation, arXiv 2304.07645).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from hyma_mllm.errors import HymaError
from hyma_mllm.hypernetwork.initialise import normal
from hyma_mllm.pairs import PairGrid

ConditionKind = Literal["pair", "factored", "features"]


def unit_rms(x: Tensor) -> Tensor:
    """`x` [..., width] with the root mean square of each row at 1."""
    return functional.rms_norm(x, x.shape[-1:])


class LearnedRows(nn.Module):
    """A table of learned rows, [count] indices -> [count, width]."""

    def __init__(self, count: int, width: int, generator: torch.Generator):
        super().__init__()
        self.rows = normal(count, width, generator=generator)

    def forward(self, indices: Tensor) -> Tensor:
        """The rows at `indices`."""
        return self.rows.index_select(0, indices)


class FeatureRows(nn.Module):
    """Projections of the models' mean features, [count] indices -> [count, width]; one projection per feature width."""

    order: Tensor

    def __init__(self, means: Sequence[Tensor], width: int, generator: torch.Generator):
        super().__init__()
        self.widths = sorted({mean.numel() for mean in means})
        self.projections = nn.ParameterDict()
        order: list[int] = []
        for d in self.widths:
            members = [number for number, mean in enumerate(means) if mean.numel() == d]
            stacked = torch.stack([means[number].detach().float().flatten().cpu() for number in members])
            self.register_buffer(f"means_{d}", unit_rms(stacked))
            self.projections[str(d)] = normal(d, width, generator=generator)
            order += members
        self.register_buffer("order", torch.tensor(order).argsort(), persistent=False)

    def forward(self, indices: Tensor) -> Tensor:
        """The projected means of the models at `indices`."""
        rows = [self.get_buffer(f"means_{d}") @ self.projections[str(d)] / d**0.5 for d in self.widths]
        return torch.cat(rows).index_select(0, self.order.index_select(0, indices))

    def row(self, mean: Tensor) -> Tensor:
        """The row [width] of a model that is not among these, by its mean feature [d] of a known width."""
        projection = self.projections[str(mean.numel())]
        seen = unit_rms(mean.detach().float().flatten()).to(projection.device)
        row: Tensor = seen @ projection / mean.numel() ** 0.5
        return row


class PairCondition(nn.Module):
    """A learned row per pair, [pairs] -> [pairs, width]."""

    def __init__(self, grid: PairGrid, width: int, generator: torch.Generator, normalise: bool):
        super().__init__()
        self.pair = LearnedRows(len(grid), width, generator)
        self.normalise = normalise

    def forward(self, pairs: Tensor) -> Tensor:
        """The conditions of pairs with these indices."""
        rows: Tensor = self.pair(pairs)
        return unit_rms(rows) if self.normalise else rows


class ModelCondition(nn.Module):
    """v + t + v * t of a row per vision model and a row per text model, [pairs] -> [pairs, width].

    The product lets a pair differ from the sum of its parts before the trunk has learned to do it.
    """

    def __init__(self, texts: int, vision: nn.Module, text: nn.Module, normalise: bool):
        super().__init__()
        self.texts = texts
        self.vision = vision
        self.text = text
        self.normalise = normalise

    def forward(self, pairs: Tensor) -> Tensor:
        """The conditions of pairs with these indices."""
        v: Tensor = self.vision(pairs // self.texts)
        t: Tensor = self.text(pairs % self.texts)
        if self.normalise:
            v, t = unit_rms(v), unit_rms(t)
        rows = v + t + v * t
        return unit_rms(rows) if self.normalise else rows


def build_condition(
    kind: ConditionKind,
    grid: PairGrid,
    width: int,
    generator: torch.Generator,
    vision_means: Sequence[Tensor] | None,
    text_means: Sequence[Tensor] | None,
    normalise: bool,
) -> nn.Module:
    """The condition module of this kind, [pairs] int64 -> [pairs, width].

    Args:
        kind: which.
        grid: the pairs.
        width: of a condition.
        generator: draws the initial rows or projections.
        vision_means: for `features`, the mean feature [d] of each vision model over the whole set.
        text_means: the same of each text model.
        normalise: whether rows are brought to unit RMS.

    Raises:
        HymaError: if `features` lacks a usable mean feature of a model.
    """
    if kind == "pair":
        return PairCondition(grid, width, generator, normalise)
    vision: nn.Module
    text: nn.Module
    if kind == "factored":
        vision = LearnedRows(len(grid.vision_ids), width, generator)
        text = LearnedRows(len(grid.text_ids), width, generator)
    else:
        vision = FeatureRows(checked_means(vision_means, grid.vision_ids, grid.vision_widths), width, generator)
        text = FeatureRows(checked_means(text_means, grid.text_ids, grid.text_widths), width, generator)
    return ModelCondition(len(grid.text_ids), vision, text, normalise)


def checked_means(means: Sequence[Tensor] | None, ids: tuple[str, ...], widths: tuple[int, ...]) -> Sequence[Tensor]:
    """The mean features of these models, if all are there and tell one model from another.

    Raises:
        HymaError: naming the model whose mean does not.
    """
    if means is None or len(means) != len(ids):
        given = 0 if means is None else len(means)
        raise HymaError(
            f"The condition features needs the mean feature of each of {', '.join(ids)} and got {given}; "
            "embed the data first, or choose the condition factored."
        )
    for name, width, mean in zip(ids, widths, means, strict=True):
        if mean.numel() != width:
            raise HymaError(
                f"The mean feature of {name} has {mean.numel()} entries where its width is {width}; embed it again."
            )
        if not bool(mean.isfinite().all()) or not bool(mean.any()):
            raise HymaError(
                f"The mean feature of {name} is zero or not finite and tells the model from no other; "
                "take the mean before centring, or choose the condition factored."
            )
    return means

"""Connectors of a model that was not trained, borrowed from a trained one of its side over a bridge.

A bridge is a ridge regression from the newcomer's features to a trained model's (the donor's) of the same pictures, or
of the same sentences. It takes no pair of a picture and its words: the pictures that a new image encoder has seen need
no captions. A score is the inner product of a mapped text with a picture, so that a connector of the donor becomes one
of the newcomer at either end, whatever their widths:

- a new text model stands before the first layer: t_donor is about B (t - mean) + mean_donor;
- a new image model stands behind the last: (f(t), B v) = (B^T f(t), v), up to a constant per caption.

Of whitened closed forms both give C^-1 C_(new, donor) C_donor^-1 M ..., the closed form of the newcomer with the
covariance of its pairs replaced by what the donor passes on of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyma_mllm.errors import HymaError
from hyma_mllm.search.task import VLMTask

STRENGTHS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Regularisations of a bridge to choose from, in mean eigenvalues of the newcomer's covariance."""

NEGLIGIBLE = 1e-10
"""Eigenvalues of a covariance below this share of the largest are rounding errors."""


@dataclass(frozen=True, eq=False)
class Bridge:
    """donor = weight @ (new - new_mean) + donor_mean, in the least squares.

    Attributes:
        weight: [donor width, new width] float64.
        new_mean: [new width] float64.
        donor_mean: [donor width] float64.
        strength: of its regularisation, as chosen.
        flops: that it cost.
    """

    weight: Tensor
    new_mean: Tensor
    donor_mean: Tensor
    strength: float
    flops: float


def fit_bridge(new: Tensor, donor: Tensor, strengths: Sequence[float] = STRENGTHS) -> Bridge:
    """The ridge regression with the strength of the least generalised cross-validation error (Golub et al. 1979).

    Args:
        new: [rows, new width] features of the newcomer.
        donor: [rows, donor width] features of a trained model, of the same pictures or sentences.
        strengths: to choose from, in mean eigenvalues of the newcomer's covariance.

    Raises:
        HymaError: fewer than three rows, values that are not finite, or a newcomer that gives every row the same.
        ValueError: if the rows do not match, or there is no strength.
    """
    if len(new) != len(donor) or not strengths:
        raise ValueError(f"a bridge takes a strength, and as many rows of the donor as {len(new)}, not {len(donor)}")
    rows, width = new.shape
    if rows < 3:
        raise HymaError(f"A bridge to a new model needs at least 3 rows that both models have seen, not {rows}.")
    x, y = new.detach().double().cpu(), donor.detach().double().cpu()
    if not bool(x.isfinite().all() and y.isfinite().all()):
        raise HymaError("The features on one side of the bridge to a new model are not all finite; embed them again.")
    new_mean, donor_mean = x.mean(0), y.mean(0)
    x, y = x - new_mean, y - donor_mean
    values, vectors, flops = _spectrum(x)
    if not float(values.sum()) > NEGLIGIBLE * float(new_mean.square().sum()):
        raise HymaError("The new model gives every row the same feature, so that no bridge leads from it.")
    cross = (x @ vectors).T @ y / rows
    power, total = cross.square().sum(1), float(y.square().sum()) / rows
    errors = []
    for strength in strengths:
        lifted = values + strength * values.sum() / width
        left = total - float((power * (2 / lifted - values / lifted**2)).sum())
        errors.append(left / (1 - (1 + float((values / lifted).sum())) / rows) ** 2)
    best = strengths[min(range(len(errors)), key=errors.__getitem__)]
    weight = (vectors @ (cross / (values + best * values.sum() / width)[:, None])).T
    flops += 2.0 * rows * len(values) * (width + y.shape[1]) + 2.0 * width * len(values) * y.shape[1]
    return Bridge(weight, new_mean, donor_mean, best, flops)


def _spectrum(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Eigenvalues [r] and eigenvectors [width, r] of x^T x / rows that are not negligible, and FLOPs."""
    rows, width = x.shape
    wide = rows < width
    gram = (x @ x.T if wide else x.T @ x) / rows
    values, vectors = torch.linalg.eigh(gram)
    keep = values > NEGLIGIBLE * values[-1]
    values, vectors = values[keep], vectors[:, keep]
    side, long = min(rows, width), max(rows, width)
    flops = 2.0 * side**2 * long + 9.0 * side**3
    if wide:
        vectors = x.T @ vectors / (rows * values).sqrt()
        flops += 2.0 * rows * width * len(values)
    return values, vectors, flops


def behind(state: Mapping[str, Tensor], bridge: Bridge) -> dict[str, Tensor]:
    """A donor's connector as one that writes into the newcomer's space: B^T after its last layer.

    For scores that are inner products with unit rows. The map is left at the RMS that the donor's weights have.

    Args:
        state: plain state dict, a Linear or an MLP.
        bridge: from the newcomer to the donor, which the connector writes for.
    """
    found = {name: value.detach().clone() for name, value in state.items()}
    last = max(int(name.split(".")[0]) for name in state)
    weight, bias = (state[f"{last}.{kind}"].detach().double().cpu() for kind in ("weight", "bias"))
    moved, offset = bridge.weight.T @ weight, bridge.weight.T @ bias
    # A common factor changes no cosine, but decides how far an Adam step turns the map.
    factor = weight.square().mean().sqrt() / moved.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    found[f"{last}.weight"], found[f"{last}.bias"] = (moved * factor).float(), (offset * factor).float()
    return found


def before(state: Mapping[str, Tensor], bridge: Bridge) -> dict[str, Tensor]:
    """A donor's connector as one that reads the newcomer's features: B before its first layer, exact for that map.

    Args:
        state: plain state dict, a Linear or an MLP.
        bridge: from the newcomer to the donor, which the connector reads.
    """
    found = {name: value.detach().clone() for name, value in state.items()}
    weight, bias = (state[f"0.{kind}"].detach().double().cpu() for kind in ("weight", "bias"))
    moved = weight @ bridge.weight
    found["0.weight"] = moved.float()
    found["0.bias"] = (bias + weight @ bridge.donor_mean - moved @ bridge.new_mean).float()
    return found


def subtask(task: VLMTask, vision: Sequence[int], text: Sequence[int]) -> VLMTask:
    """The same pictures and words with some of the models, in this order.

    Args:
        task: of more models.
        vision: numbers of vision models.
        text: numbers of text models.
    """
    grid = task.grid
    return replace(
        task,
        grid=replace(
            grid,
            vision_ids=tuple(grid.vision_ids[v] for v in vision),
            vision_widths=tuple(grid.vision_widths[v] for v in vision),
            text_ids=tuple(grid.text_ids[t] for t in text),
            text_widths=tuple(grid.text_widths[t] for t in text),
        ),
        images=[task.images[v] for v in vision],
        texts=[task.texts[t] for t in text],
        zero_shot=[replace(each, prompts=[each.prompts[t] for t in text]) for each in task.zero_shot],
    )

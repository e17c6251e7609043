"""The closed form `consensus`: connectors by way of what all models of the search agree on.

Every model saw the same pictures (or their captions), so each is a noisy view of them, and the noise of one is not that
of another. With x_k the centred rows of model k (a text model's: the mean over a picture's captions) and its whitened
leading axes z_k = P_k^T x_k, P_k the leading eigenvectors of C_k over the roots of their eigenvalues plus lam_k, the
principal components u of all z_k together are what most models share (generalised canonical correlations; Carroll 1968,
Kettenring 1971, doi 10.1093/biomet/58.3.433). Every model is regressed on them, B_k = (C_k + lam_k)^-1 cov(x_k, u), and
the connector of a pair is

    W = B_i B_t^T = (C_i + lam_i)^-1 cov(v, u) cov(u, t) (C_t + lam_t)^-1,

the whitened closed form with cov(v, t) replaced by the paths that lead over the consensus. u keeps its variance, so
that a component counts by how many models agree on it. lam is `strength` times trace(C) / n for n pictures, the size of
the noise in C's eigenvalues, and so gets weaker with more data. The work is that of N + M models and not of N x M
pairs: a pair adds one product of thin matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyma_mllm.search.flops import AXES_PASSES, SPARE_AXES
from hyma_mllm.search.moments import ModelMoments, Moments, add_upper, centred_rows, mirrored, solved
from hyma_mllm.search.task import VLMTask

ALL_AXES, LEAST_AXES = 1024, 32
"""Axes of all models together, and at least of each one: fixes the size of the one eigenproblem."""

LEAST_SHARE = 1e-5
"""lam as a share of trace(C), which float32 knows to about 1e-7, from which on float32 will do."""

RANK = 256
"""Components of the consensus, at most."""


@dataclass
class Part:
    """One model's side of its pairs' connectors; float64.

    Attributes:
        reads: B [width, rank].
        power: B^T B [rank, rank].
        varying: B^T C B [rank, rank]: how its rows vary where they are read.
    """

    reads: Tensor
    power: Tensor
    varying: Tensor


@dataclass
class Parts:
    """What the models' connectors are made of.

    Attributes:
        images, texts: per model number.
        axes: of each model, image models first.
        rank: components of the consensus.
    """

    images: dict[int, Part]
    texts: dict[int, Part]
    axes: list[int]
    rank: int


def products_of(strength: float, pictures: int) -> torch.dtype:
    """What products of rows may be computed in: float32 where its rounding lies far below lam."""
    return torch.float32 if strength >= LEAST_SHARE * pictures else torch.float64


def consensus_weight(image: Part, text: Part) -> tuple[Tensor, Tensor]:
    """The connector's weight [d_image, d_text], and the variance of what it makes of the training captions."""
    return image.reads @ text.reads.T, (image.power * text.varying).sum()


def consensus_parts(task: VLMTask, found: Moments, strength: float) -> Parts:
    """Every model's part, by two more passes over the training rows.

    Args:
        task: features and splits.
        found: means and covariances of all models that take part.
        strength: of the regularisation; 1 lifts every eigenvalue by the trace over the pictures.
    """
    models = [*found.images.values(), *found.texts.values()]
    strengths = [strength * len(model.mean) / len(found.rows) for model in models]  # in mean eigenvalues
    axes, rank = shared_out([len(model.mean) for model in models])
    whitening = [whitened_axes(*given).to(found.products) for given in zip(models, strengths, axes, strict=True)]
    components = _components(task, found, whitening, rank).to(found.products)
    joint = [model.covariance.new_zeros(len(model.mean), rank) for model in models]
    for rows in centred_rows(task, found):
        u = _along(whitening, rows) @ components
        for total, x in zip(joint, rows, strict=True):
            total += x.T @ u
    measured = zip(models, joint, strengths, strict=True)
    parts = [_part(model, total / len(found.rows), lift) for model, total, lift in measured]
    images, texts = parts[: len(found.images)], parts[len(found.images) :]
    return Parts(dict(zip(found.images, images, strict=True)), dict(zip(found.texts, texts, strict=True)), axes, rank)


def _components(task: VLMTask, found: Moments, whitening: Sequence[Tensor], rank: int) -> Tensor:
    """The leading eigenvectors [axes, rank] of the covariance of all models' axes."""
    width = sum(matrix.shape[1] for matrix in whitening)
    square = torch.zeros(width, width, dtype=torch.float64, device=whitening[0].device if whitening else None)
    for rows in centred_rows(task, found):
        z = _along(whitening, rows)
        add_upper(square, z, z)
    vectors: Tensor = torch.linalg.eigh(mirrored(square) / len(found.rows)).eigenvectors
    return vectors.flip(1)[:, :rank]


def _along(whitening: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """The rows of all models along their whitened axes, side by side [rows, axes]."""
    return torch.cat([x @ matrix for x, matrix in zip(rows, whitening, strict=True)], dim=1)


def shared_out(widths: Sequence[int]) -> tuple[list[int], int]:
    """Axes of models of these widths, and components of their consensus."""
    most = max(LEAST_AXES, ALL_AXES // len(widths)) if widths else 0
    axes = [min(most, width) for width in widths]
    return axes, min(RANK, sum(axes))


def whitened_axes(model: ModelMoments, strength: float, count: int) -> Tensor:
    """P [width, count]: leading eigenvectors of C over the roots of their eigenvalues plus lam.

    A model that does not vary has none that says anything: its P is zero.
    """
    if model.constant:
        return model.covariance.new_zeros(len(model.mean), count)
    values, vectors = leading_axes(model.covariance, count)
    return vectors / (values.clamp(min=0) + model.ridge(strength)).sqrt()


def leading_axes(covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues [count] and their eigenvectors [width, count], largest first.

    By a subspace iteration from a fixed random start (Halko et al., arXiv 0909.4061, section 4.5) where that is less
    than all of them.
    """
    width, wide = len(covariance), count + SPARE_AXES
    if wide >= width:
        values, vectors = torch.linalg.eigh(covariance)
        return values.flip(0)[:count], vectors.flip(1)[:, :count]
    start = torch.randn(width, wide, generator=torch.Generator().manual_seed(0), dtype=covariance.dtype)
    basis = start.to(covariance.device)
    for _ in range(AXES_PASSES):
        basis = torch.linalg.qr(covariance @ basis).Q
    values, turns = torch.linalg.eigh(basis.T @ (covariance @ basis))
    return values.flip(0)[:count], basis @ turns.flip(1)[:, :count]


def _part(model: ModelMoments, joint: Tensor, strength: float) -> Part:
    reads = solved(joint, model.factor(strength))
    # (C + lam) B = joint, so B^T C B needs no product with C.
    power = reads.T @ reads
    return Part(reads, power, reads.T @ joint - model.ridge(strength) * power)

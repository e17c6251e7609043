"""Measures of how alike two encoders see the same rows: CKA, mutual k-NN, CCA, Gromov-Wasserstein.

Every measure is a pure function of matched rows: higher is better, widths may differ, and the scale of a side and its
rotation do not matter. Each has two halves: what is done once per model (centring, neighbour sets, whitening,
distances) and what is done once per pair. Everything is float64 on the CPU, so that a score does not depend on the
machine. An encoder that gives every row the same feature scores 0; under Gromov-Wasserstein minus the number of rows,
which no other pair can fall below.

FLOPs count a matrix product [a, b] x [b, c] as 2abc and a decomposition as Golub and Van Loan do (Matrix
Computations, section 8.6); element-wise work, sorting and the linear programs of Gromov-Wasserstein are left out.

POT is imported where it is used: only Gromov-Wasserstein needs it, and it comes with the extra `rivals`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyma_mllm.errors import HymaError
from hyma_mllm.search.samplers import generator

NEIGHBOURS = 10
"""k of mutual k-NN (Huh et al., 2024)."""

COMPONENTS = 10
"""Leading canonical correlations that `cca` averages."""

STRENGTH = 1.0
"""Ridge of `cca`, in mean eigenvalues of each side's covariance."""

GW_ROWS = 500
"""Rows that Gromov-Wasserstein compares: a step of it costs their cube."""

LEAST_ROWS = 4
"""The unbiased CKA divides by (rows - 3)."""

CHUNK = 1024
"""Rows compared with all others at once; bounds memory, changes no value."""


class Kind(NamedTuple):
    """A measure in two halves, each of which also says its FLOPs.

    Attributes:
        prepare: features [rows, width] of one model to what its comparisons need; once per model.
        compare: two of these to a score, higher is better; once per pair.
        least: rows that it cannot do without.
        limit: rows that it takes at most; None is all.
    """

    prepare: Callable[[Tensor], tuple[Tensor, float]]
    compare: Callable[[Tensor, Tensor], tuple[float, float]]
    least: int = LEAST_ROWS
    limit: int | None = None


def choose(pictures: Tensor, rows: int, seed: int) -> Tensor:
    """`rows` of these row numbers, drawn by the seed and ascending; all of them where there are no more.

    Raises:
        HymaError: if that leaves too few rows to compare.
    """
    if min(rows, len(pictures)) < LEAST_ROWS:
        raise HymaError(
            f"{min(rows, len(pictures))} training pictures are too few to compare models by; "
            f"give at least {LEAST_ROWS}."
        )
    picked = torch.randperm(len(pictures), generator=generator(seed, 11))[:rows]
    return pictures[picked].sort().values


def linear_cka(x: Tensor, y: Tensor, debiased: bool = False) -> float:
    """Linear centred kernel alignment (Kornblith et al., 2019, section 3): a cosine between the two Gram matrices.

    Plain, it lies in [0, 1] and grows with the widths even for unrelated features; debiased, by the unbiased
    estimator of HSIC (Song et al., 2012, section 3; Nguyen et al., 2021, section 3), unrelated features score 0 in
    the mean and may fall below.

    Args:
        x: [rows, a] floating.
        y: [rows, b] floating, row k of the same thing as row k of x.
        debiased: whether to use the unbiased estimator.

    Raises:
        HymaError: for fewer than 4 rows, or values that are not finite.
        ValueError: if the rows do not match.
    """
    return _one(cka_kind(debiased), x, y)


def mutual_knn(x: Tensor, y: Tensor, k: int = NEIGHBOURS) -> float:
    """Mean share of the k nearest neighbours by cosine that both sides have in common, in [0, 1].

    Huh et al. (2024, The Platonic Representation Hypothesis, appendix A). A row is no neighbour of itself. Equal
    cosines are ordered arbitrarily, but for the same features always alike.

    Args:
        x: [rows, a] floating.
        y: [rows, b] floating, row k of the same thing as row k of x.
        k: neighbours of each row.

    Raises:
        HymaError: if there are not more rows than neighbours, or values are not finite.
        ValueError: if the rows do not match, or k is not positive.
    """
    if k < 1:
        raise ValueError(f"k is {k}, not a number of neighbours")
    return _one(knn_kind(k), x, y)


def cca(x: Tensor, y: Tensor, components: int = COMPONENTS, strength: float = STRENGTH) -> float:
    """Mean of the leading canonical correlations, in [0, 1] (Hotelling, 1936; with Vinod's canonical ridge, 1976).

    Singular values of (C_x + l_x I)^-1/2 C_xy (C_y + l_y I)^-1/2, where l is `strength` times the mean eigenvalue of
    the side's covariance: without a ridge, features that are about as wide as there are rows correlate perfectly with
    anything. Correlations that a side has no dimensions for count as 0. With strength 0 it does not change under
    invertible linear maps of either side, and a model is never more like another than like itself.

    Args:
        x: [rows, a] floating.
        y: [rows, b] floating, row k of the same thing as row k of x.
        components: correlations averaged.
        strength: ridge in mean eigenvalues.

    Raises:
        HymaError: for fewer than 4 rows, or values that are not finite.
        ValueError: if the rows do not match, or for a ridge or a number of components out of range.
    """
    if components < 1 or strength < 0:
        raise ValueError(f"cca cannot average {components} components under a ridge of {strength}")
    return _one(cca_kind(components, strength), x, y)


def gromov_wasserstein(x: Tensor, y: Tensor, rows_limit: int = GW_ROWS, seed: int = 0) -> float:
    """Minus the Gromov-Wasserstein distance of the two feature clouds (Memoli, 2011; Peyre et al., 2016).

    Distances within a cloud are cosine distances over their mean; the loss is the square. The problem is not convex:
    conditional gradient (POT) runs from the independent coupling and from the known matching of the rows, and the
    smaller value counts, so a cloud is at distance 0 from itself and from its rotations.

    Args:
        x: [rows, a] floating.
        y: [rows, b] floating, row k of the same thing as row k of x.
        rows_limit: compare at most so many rows.
        seed: which.

    Raises:
        HymaError: for fewer than 4 rows, values that are not finite, or if POT is not installed.
        ValueError: if the rows do not match.
    """
    return _one(gw_kind(rows_limit), x, y, seed)


def _one(kind: Kind, x: Tensor, y: Tensor, seed: int = 0) -> float:
    ready, _ = prepared(kind, [x, y], seed)
    return kind.compare(*ready)[0]


def prepared(kind: Kind, models: Sequence[Tensor], seed: int) -> tuple[list[Tensor], float]:
    """Every model's half of the work and its FLOPs, after the checks that all measures share.

    Args:
        kind: the measure.
        models: per model matched rows [rows, width] floating.
        seed: of the rows that are taken where there are more than `kind.limit`.

    Raises:
        HymaError: for too few rows, or values that are not finite.
        ValueError: if the rows do not match, or there are no models.
    """
    if not models or any(x.ndim != 2 or len(x) != len(models[0]) for x in models):
        raise ValueError(f"features of matched rows are [rows, width], not {[list(x.shape) for x in models]}")
    for x in models:
        if len(x) < kind.least:
            raise HymaError(f"{len(x)} rows are too few for this similarity measure; give at least {kind.least}.")
    models = [finite(x) for x in models]
    if kind.limit is not None and len(models[0]) > kind.limit:
        rows = choose(torch.arange(len(models[0])), kind.limit, seed)
        models = [x[rows] for x in models]
    ready, costs = zip(*[kind.prepare(x) for x in models], strict=True)
    return list(ready), sum(costs)


def finite(x: Tensor) -> Tensor:
    """These features on the CPU.

    Raises:
        HymaError: if a value is not finite.
    """
    if not torch.isfinite(x).all():
        raise HymaError("A model's features hold values that are not finite; embed it again.")
    return x.cpu()


def centred(x: Tensor) -> Tensor:
    """Columns less their means [rows, width] float64, of Frobenius norm 1; zeros if all rows are alike but rounding."""
    wide = x.double() / x.abs().max().double().clamp_min(torch.finfo(torch.float64).tiny)
    moved = wide - wide.mean(0)
    size = moved.norm()
    return torch.zeros_like(wide) if size <= 8 * torch.finfo(x.dtype).eps * wide.norm() else moved / size


def directions(x: Tensor) -> Tensor:
    """Unit rows [rows, width] float64 (a zero row stays one); zeros if all point the same way but for rounding."""
    wide = x.double() / x.abs().max().double().clamp_min(torch.finfo(torch.float64).tiny)
    unit = wide / wide.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    spread = (unit - unit.mean(0)).norm()
    return torch.zeros_like(unit) if spread <= 8 * torch.finfo(x.dtype).eps * unit.norm() else unit


def svd_flops(rows: int, width: int, vectors: bool) -> float:
    """A thin singular value decomposition by QR first: values only, or with the vectors of one side."""
    long, short = max(rows, width), min(rows, width)
    return (6.0 * long + 11.0 * short if vectors else 2.0 * long + 2.0 * short) * short * short


def cka_kind(debiased: bool) -> Kind:
    """`linear_cka` in halves."""
    return Kind(partial(_cka_prepare, debiased=debiased), partial(_hsic, debiased=debiased))


def _cka_prepare(x: Tensor, debiased: bool) -> tuple[Tensor, float]:
    """Centred features scaled to an HSIC of 1 with themselves; zeros where there is none."""
    moved, flops = centred(x), 0.0
    if moved.shape[1] > len(moved):
        # R^T has the Gram matrix of x = R^T Q^T in `rows` columns, and all that follows reads the Gram matrix only.
        flops = 2.0 * moved.shape[1] * len(moved) ** 2
        moved = torch.linalg.qr(moved.T, mode="r").R.T
    own, cost = _hsic(moved, moved, debiased)
    return moved / own**0.25 if own > 1e-12 else torch.zeros_like(moved), flops + cost


def _hsic(x: Tensor, y: Tensor, debiased: bool) -> tuple[float, float]:
    """HSIC of two centred sides up to a constant, from their cross-covariance: trace(KL) or its unbiased form."""
    rows, flops = len(x), 2.0 * len(x) * x.shape[1] * y.shape[1]
    value = (x.T @ y).square().sum()
    if debiased:
        # Song et al. (2012), without forming K = x x^T and L = y y^T, whose diagonals count as 0.
        k, own_k = x @ x.sum(0), x.square().sum(1)
        l, own_l = y @ y.sum(0), y.square().sum(1)  # noqa: E741
        k, l = k - own_k, l - own_l  # noqa: E741
        value = value - own_k @ own_l + k.sum() * l.sum() / ((rows - 1) * (rows - 2)) - 2 * (k @ l) / (rows - 2)
    return float(value), flops


def knn_kind(k: int) -> Kind:
    """`mutual_knn` in halves."""
    return Kind(partial(_neighbours, k=k), _overlap, least=k + 1)


def _neighbours(x: Tensor, k: int) -> tuple[Tensor, float]:
    """Row numbers of each row's nearest neighbours [rows, k] int64; -1 where all rows point the same way."""
    unit = directions(x)
    if not unit.any():
        return torch.full((len(unit), k), -1), 0.0
    found = []
    for start in range(0, len(unit), CHUNK):
        cosine = unit[start : start + CHUNK] @ unit.T
        cosine.diagonal(start).fill_(-torch.inf)
        found.append(cosine.topk(k).indices)
    return torch.cat(found), 2.0 * len(unit) ** 2 * unit.shape[1]


def _overlap(a: Tensor, b: Tensor) -> tuple[float, float]:
    hits = 0
    for one, other in zip(torch.split(a, CHUNK), torch.split(b, CHUNK), strict=True):
        hits += int(((one[:, :, None] == other[:, None, :]) & (one[:, :, None] >= 0)).sum())
    return hits / a.numel(), 0.0


def cca_kind(components: int, strength: float) -> Kind:
    """`cca` in halves."""
    return Kind(partial(_whitened, strength=strength), partial(_correlations, components=components))


def _whitened(x: Tensor, strength: float) -> tuple[Tensor, float]:
    """Features times (C + l I)^-1/2 in the axes of C, [rows, rank]: singular values s become s / sqrt(s^2 + l)."""
    moved = centred(x)
    axes, sizes, _ = torch.linalg.svd(moved, full_matrices=False)
    kept = sizes > sizes[0] * max(moved.shape) * torch.finfo(x.dtype).eps
    power = sizes[kept].square()
    ridge = strength * moved.square().sum() / moved.shape[1]
    return axes[:, kept] * (power / (power + ridge)).sqrt(), svd_flops(len(moved), moved.shape[1], vectors=True)


def _correlations(a: Tensor, b: Tensor, components: int) -> tuple[float, float]:
    if not (a.shape[1] and b.shape[1]):
        return 0.0, 0.0
    found = torch.linalg.svdvals(a.T @ b)[:components].clamp(max=1)
    flops = 2.0 * len(a) * a.shape[1] * b.shape[1] + svd_flops(a.shape[1], b.shape[1], vectors=False)
    return float(found.sum()) / components, flops


def gw_kind(limit: int) -> Kind:
    """`gromov_wasserstein` in halves."""
    return Kind(_distances, _transport, limit=limit)


def _distances(x: Tensor) -> tuple[Tensor, float]:
    """Cosine distances over their mean [rows, rows]; zeros where all rows point the same way."""
    unit = directions(x)
    if not unit.any():
        return torch.zeros(len(unit), len(unit), dtype=torch.float64), 0.0
    distance = (1 - unit @ unit.T).clamp_min(0).fill_diagonal_(0)
    return distance / distance.mean(), 2.0 * len(unit) ** 2 * unit.shape[1]


def _transport(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Minus the smaller distance of two descents; a step has four products of [rows, rows] matrices, its start two."""
    rows = len(a)
    if not (a.any() and b.any()):
        return -float(rows), 0.0
    solve = _solver()
    best, products = torch.inf, 0
    for start in (None, torch.eye(rows, dtype=torch.float64).numpy() / rows):
        _, log = solve(
            a.numpy(), b.numpy(), symmetric=True, G0=start, log=True, max_iter=200, tol_rel=1e-7, tol_abs=1e-12,
            numItermaxEmd=1_000_000,
        )  # fmt: skip
        best = min(best, float(log["gw_dist"]))
        products += 4 * (len(log["loss"]) - 1) + 2
    return -(max(best, 0.0) ** 0.5), 2.0 * rows**3 * products


def _solver() -> Callable[..., Any]:
    try:
        from ot.gromov import gromov_wasserstein as solve
    except ImportError as error:
        raise HymaError(
            "Gromov-Wasserstein needs POT, which is not installed; run pip install 'hyma_mllm[rivals]', "
            "or leave gromov-wasserstein out of search.methods."
        ) from error
    found: Callable[..., Any] = solve
    return found

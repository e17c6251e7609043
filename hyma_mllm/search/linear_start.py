"""A linear connector written into a connector of any family, as the start of its training.

An MLP carries a linear map of rank r through pairs of hidden units that read h and -h, for f(h) - f(-h) = h with both
activations: relu(h) - relu(-h) = h, and gelu(h) - gelu(-h) = h (Phi(h) + Phi(-h)) = h with the exact GELU.
"""

import math

import torch
from torch import Tensor

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.errors import HymaError

NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest are left to fresh units: float32 weights do not carry them."""


def as_connector(state: dict[str, Tensor], spec: ConnectorSpec, seed: int = 0) -> dict[str, Tensor]:
    """The linear map `state` as a connector of `spec`.

    Depth 0 gives the same tensors. An MLP carries the best map of rank hidden // 2 (Eckart and Young 1936), which is
    the map itself, up to rounding, where twice its rank is at most `hidden`; further hidden layers pass it on. Units
    that are not needed read like those of a new nn.Linear and are read with weight zero, so that they change nothing
    and can learn. Of the singular value s of a unit, sqrt(s) goes into each factor (gradient descent keeps the factors
    of a linear network balanced so; Saxe et al., arXiv 1312.6120), and one common factor then gives the reading weights
    the RMS of a new nn.Linear, 1 / sqrt(3 fan_in): an Adam step turns the hidden units as far as it does fresh ones.

    Args:
        state: `{"0.weight": [d_out, d_in], "0.bias": [d_out]}`.
        spec: the family.
        seed: of the units that are not needed.

    Returns:
        The plain state dict, float32 on the CPU.

    Raises:
        HymaError: if the hidden width is 1, which holds no pair of units.
    """
    d_out, d_in = state["0.weight"].shape
    if spec.depth == 0:
        return {name: state[name].detach().float().cpu().clone() for name in ("0.weight", "0.bias")}
    hidden = spec.hidden or d_out
    if hidden < 2:
        raise HymaError(f"The connector's hidden width {hidden} cannot carry a linear map; write 2 or more.")
    reads, writes = balanced_factors(state["0.weight"].detach().double().cpu(), hidden // 2)
    rank = len(reads)
    scale = math.sqrt(rank / (3 * float(reads.square().sum()))) if rank else 1.0
    reads, writes = reads * scale, writes / scale

    both, last = 2 * rank, 2 * spec.depth
    params = _fresh(spec, (d_in, d_out), None if both == hidden else seed)
    params["0.weight"][:both] = torch.cat([reads, -reads]).float()
    for layer in range(spec.depth + 1):
        weight, bias = params[f"{2 * layer}.weight"], params[f"{2 * layer}.bias"]
        if layer < spec.depth:
            bias[:both] = 0
        if 0 < layer < spec.depth:
            eye = torch.eye(rank)
            weight[:both] = 0
            weight[:both, :both] = torch.cat([torch.cat([eye, -eye], 1), torch.cat([-eye, eye], 1)])
    params[f"{last}.weight"].zero_()
    params[f"{last}.weight"][:, :both] = torch.cat([writes, -writes], 1).float()
    params[f"{last}.bias"] = state["0.bias"].detach().float().cpu().clone()
    return params


def _fresh(spec: ConnectorSpec, shape: tuple[int, int], seed: int | None) -> dict[str, Tensor]:
    """A new connector of this seed; zeros for None, where nothing new would be left of it."""
    if seed is not None:
        return connectors.select(connectors.initial(spec, shape, 1, torch.Generator().manual_seed(seed)), 0)
    params = {}
    for layer in spec.layers(*shape):
        params[f"{layer.index}.weight"] = torch.zeros(layer.fan_out, layer.fan_in)
        params[f"{layer.index}.bias"] = torch.zeros(layer.fan_out)
    return params


def training_start(state: dict[str, Tensor], spec: ConnectorSpec, seed: int = 0) -> dict[str, Tensor]:
    """`as_connector` with its output at the size that a new nn.Linear gives: |y|^2 of d_out / 3.

    Directions alone matter to a loss that normalises, but the size of the weights decides how far an Adam step of given
    rate turns them: one from a closed form at unit norm would turn sqrt(d_out / 3) times as far as a fresh connector,
    and forget its start in a few steps at the rate that suits a fresh one.

    Args:
        state: a linear map whose outputs have unit RMS norm, as `closed_forms` gives it.
        spec: the family.
        seed: of the units that are not needed.

    Raises:
        HymaError: if the hidden width is 1, which holds no pair of units.
    """
    params = as_connector(state, spec, seed)
    for kind in ("weight", "bias"):
        params[f"{2 * spec.depth}.{kind}"] *= math.sqrt(len(state["0.bias"]) / 3)
    return params


def balanced_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of `weight` [out, in] of this rank or less, as writes [out, r] @ reads [r, in].

    By the eigenvectors of the smaller Gram matrix: several times faster than an SVD. In float64 their error lies far
    below the singular values that are kept.

    Returns:
        Reads and writes, float64; row k of one and column k of the other both have norm sqrt(s_k). `r` counts the
        singular values of the first `rank` that are not negligible.
    """
    weight = weight.double()
    wide = weight.shape[0] <= weight.shape[1]
    side = weight if wide else weight.T
    vectors = torch.linalg.eigh(side @ side.T).eigenvectors.flip(1)[:, :rank]
    other = vectors.T @ side
    values = other.norm(dim=1)
    keep = values > NEGLIGIBLE * values.max()
    roots = values[keep].sqrt()
    thin, broad = vectors[:, keep] * roots, other[keep] / roots[:, None]
    return (broad, thin) if wide else (thin.T, broad.T)

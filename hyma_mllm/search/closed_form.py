"""Connectors in closed form: no step of training, from means and covariances of the training rows alone.

With text rows t and image rows v of the training pictures, centred covariances C_t = cov(t), C_i = cov(v) and
M = cov(t, v), and each inverse regularised by `strength` times the mean eigenvalue of what it inverts:

- `ridge`: W = M^T (C_t + lam_t)^-1, bias = mean(v) - W mean(t). It minimises the mean of |W t + b - v|^2, plus
  lam_t |W|^2 (Hoerl and Kennard 1970), the bias free.
- `whitened`: W = (C_i + lam_i)^-1 M^T (C_t + lam_t)^-1, bias = -W mean(t): the ridge prediction of v, compared with v
  in the metric that whitens the images (as canonical correlation analysis whitens both sides; Hotelling 1936), so that
  the few directions in which all pictures vary do not decide alone. Retrieval compares by the cosine, and unit rows v
  make (W t + b) . v the bilinear score (t - mean(t))^T W^T (v - mean(v)) up to a constant per caption: this bias ranks
  the pictures of a caption exactly by it. A mean(v) of its own in the bias would only blur that order.
- `consensus`: what all models of the search say together; see `consensus`. Its bias is that of `whitened`.

Directions alone matter to a loss and a score that normalise, so every connector is scaled to give training rows of
unit RMS norm: mean |W t + b|^2 = 1. What is to be trained on from there goes through `training_start`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.search import flops
from hyma_mllm.search.consensus import consensus_parts, consensus_weight, products_of
from hyma_mllm.search.linear_start import as_connector as as_connector
from hyma_mllm.search.linear_start import training_start as training_start
from hyma_mllm.search.moments import ModelMoments, solved, training_moments
from hyma_mllm.search.task import VLMTask

ClosedForm = Literal["ridge", "whitened", "consensus"]
"""Of image and text encoders, computed here."""

Start = Literal["ridge", "whitened", "consensus", "words"]
"""All closed forms: `words` is that of vision towers and LLMs, in `word_start`."""

STRENGTHS: dict[Start, float] = {"ridge": 3.0, "whitened": 3.0, "consensus": 1.0, "words": 1.0}
"""What suits each."""

LEAST_STRENGTH = 1e-6
"""Below it a rank-deficient covariance has no reliable Cholesky factor, even in float64."""


@dataclass
class ClosedFormConfig:
    """Which closed form.

    Attributes:
        kind: `consensus` (what all models share), `whitened` (both sides of a pair whitened) or `ridge` (least squares
            from text to image) between encoders, `words` (pictures onto the words of their answers) from vision towers
            into LLMs.
        strength: regularisation, in mean eigenvalues of the covariance that is inverted (for `consensus` times width
            over pictures); at least 1e-6. Null takes what suits each closed form: 1, 3, 3 and 1.

    Raises:
        HymaError: for a value that names no closed form.
    """

    kind: Start = "consensus"
    strength: float | None = None

    def __post_init__(self) -> None:
        known = get_args(Start)
        if self.kind not in known:
            raise HymaError(f"The closed form {self.kind!r} is unknown; {near_names(str(self.kind), known)}.")
        if self.strength is not None and not LEAST_STRENGTH <= self.strength < math.inf:
            raise HymaError(
                f"The closed form's strength is {self.strength}; write a number of at least {LEAST_STRENGTH:g}, say 3."
            )

    def strength_of(self, kind: Start) -> float:
        """The regularisation of a closed form, of this kind or of another that a method asks for."""
        return STRENGTHS[kind] if self.strength is None else self.strength


@dataclass
class ClosedForms:
    """Linear connectors of some pairs.

    Attributes:
        states: plain state dicts `{"0.weight": [d_image, d_text], "0.bias": [d_image]}`, float32 on the CPU.
        flops: that they cost, all together.
    """

    states: list[dict[str, Tensor]]
    flops: float


def closed_forms(task: VLMTask, config: ClosedFormConfig, pairs: Sequence[int] | None = None) -> ClosedForms:
    """The linear connectors of these pairs, from the training rows alone.

    Each model's covariance and factor are taken once and shared by its pairs. All in float64, but for sums of
    products of rows in the consensus, where that is far finer than its regularisation. The result is always
    finite: a pair with a constant model, of which nothing can be learnt, maps every text to one point of unit length.

    Args:
        task: features and splits.
        config: which closed form.
        pairs: indices in the grid; None takes all. `states` come in this order.

    Raises:
        HymaError: if no training picture has a caption, or a model's features are not finite.
    """
    if config.kind == "words":
        raise ValueError("words is the closed form of an MLLM search; word_start computes it")
    wanted = list(range(len(task.grid))) if pairs is None else [int(index) for index in pairs]
    strength = config.strength_of(config.kind)
    if config.kind == "consensus":
        return _from_consensus(task, strength, wanted)
    return _pair_by_pair(task, config.kind == "whitened", strength, wanted)


def _pair_by_pair(task: VLMTask, whitened: bool, strength: float, wanted: Sequence[int]) -> ClosedForms:
    """`whitened`, or `ridge`."""
    found = training_moments(task, wanted, image_covariances=whitened)
    text_factors = {t: moments.factor(strength) for t, moments in found.texts.items()}
    image_factors = {v: moments.factor(strength) for v, moments in found.images.items()} if whitened else {}

    states = []
    for index in wanted:
        pair = task.grid.pair(index)
        text, image = found.texts[pair.text], found.images[pair.vision]
        target = found.cross[index].T
        target = solved(target, image_factors[pair.vision]) if whitened else target
        weight = solved(target.T, text_factors[pair.text]).T
        bias = -weight @ text.mean if whitened else image.mean - weight @ text.mean
        # W (C + lam) = target, so the trace of W C W^T needs no further product.
        varying = (weight * target).sum() - text.ridge(strength) * weight.square().sum()
        states.append(_unit_rms(weight, bias, varying, text, image.mean))
    bill = flops.closed_form_flops((found.captions, len(found.rows)), task.grid, wanted, whitened)
    return ClosedForms(states, bill)


def _from_consensus(task: VLMTask, strength: float, wanted: Sequence[int]) -> ClosedForms:
    """`consensus`, of the models that these pairs touch."""
    products = products_of(strength, len(task.train))
    found = training_moments(task, wanted, image_covariances=True, crosses=False, products=products)
    parts = consensus_parts(task, found, strength)
    states = []
    for index in wanted:
        pair = task.grid.pair(index)
        text, image = found.texts[pair.text], found.images[pair.vision]
        weight, varying = consensus_weight(parts.images[pair.vision], parts.texts[pair.text])
        states.append(_unit_rms(weight, -weight @ text.mean, varying, text, image.mean))
    bill = flops.consensus_flops((found.captions, len(found.rows)), task.grid, wanted, parts.axes, parts.rank)
    return ClosedForms(states, bill)


def _unit_rms(
    weight: Tensor, bias: Tensor, varying: Tensor, text: ModelMoments, image_mean: Tensor
) -> dict[str, Tensor]:
    """The state dict of this map at mean |W t + b|^2 = 1 over the training rows, of which `varying` is the variance."""
    power = varying + (weight @ text.mean + bias).square().sum()
    # A constant model leaves the products at rounding errors about the zero that they stand for.
    if text.constant or not weight.any() or not power > 0:
        weight, bias = torch.zeros_like(weight), _direction(image_mean)
    else:
        weight, bias = weight / power.sqrt(), bias / power.sqrt()
    return {"0.weight": weight.float().cpu().contiguous(), "0.bias": bias.float().cpu()}


def _direction(mean: Tensor) -> Tensor:
    """`mean` [width] at unit length; the diagonal where it is zero."""
    length = mean.norm()
    return mean / length if length > 0 else torch.full_like(mean, len(mean) ** -0.5)

"""What one optimiser step computes, from shapes alone: floating point operations of the matrix products.

A product [a, b] x [b, c] counts 2abc, forward and backward together, as torch's FlopCounterMode counts; element-wise
work (activations, softmax, normalisation, biases) is left out. METHOD 3 gives the closed forms that these sum to.
Factorisations, which that mode does not count, are counted as Golub and Van Loan do (Matrix Computations, 4th edition).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.hypernetwork.presets import HypernetworkConfig, parts
from hyma_mllm.hypernetwork.sizes import head_sizes
from hyma_mllm.pairs import PairGrid


class Matmul(NamedTuple):
    """A batch of products [rows, fan_in] x [fan_in, fan_out].

    Attributes:
        rows: of the input, over the whole step.
        fan_in: width of the input.
        fan_out: width of the output.
        input_gradient: False when the input is frozen, so that the backward pass skips its gradient.
        weight_gradient: False when the weight is frozen.
    """

    rows: int
    fan_in: int
    fan_out: int
    input_gradient: bool = True
    weight_gradient: bool = True


def matmul_flops(matmuls: Iterable[Matmul]) -> float:
    """Forward and backward of some products: 2abc, and 2abc more for each side that has a gradient."""
    return float(sum(2 * m.rows * m.fan_in * m.fan_out * (1 + m.input_gradient + m.weight_gradient) for m in matmuls))


def connector_step_flops(spec: ConnectorSpec, shape: tuple[int, int], batch: int) -> float:
    """Mapping a batch through one pair's connector, forward and backward.

    METHOD 3: 2BP forward, and backward 4BP less 2B for each weight of the first layer, whose input is a stored
    feature without gradient (so 2BP for a Linear).

    Args:
        spec: the connector family.
        shape: (d_in, d_out) of the pair.
        batch: samples in the mini-batch.
    """
    layers = spec.layers(*shape)
    return matmul_flops(
        Matmul(batch, layer.fan_in, layer.fan_out, input_gradient=position > 0) for position, layer in enumerate(layers)
    )


def similarity_step_flops(batch: int, width: int, tiled: bool = False) -> float:
    """The logits of InfoNCE for one pair [batch, batch], forward and backward.

    METHOD 3: 2B²D forward and 2B²D backward, for only the mapped side has a gradient; the tiled form computes the
    forward product again in the backward pass.

    Args:
        batch: samples in the mini-batch.
        width: of the space in which the two sides meet.
        tiled: whether the logits are recomputed in the backward pass.
    """
    return (6.0 if tiled else 4.0) * batch * batch * width


def hypernetwork_step_flops(
    grid: PairGrid, spec: ConnectorSpec, config: HypernetworkConfig, pairs: Sequence[int]
) -> float:
    """Predicting the connectors of these pairs, forward and backward.

    Args:
        grid: all pairs of the hypernetwork.
        spec: the connector family.
        config: the hypernetwork's parts.
        pairs: indices in the grid.
    """
    return matmul_flops(_hypernetwork_matmuls(grid, spec, config, pairs))


def upper_blocks(width: int, size: int = 256) -> list[tuple[int, int]]:
    """First and last row of the blocks in which the upper part of a symmetric product [width, width] is computed."""
    return [(first, min(first + size, width)) for first in range(0, width, size)]


def symmetric_flops(rows: int, width: int) -> float:
    """X^T X for X [rows, width], of which the blocks below the diagonal are left out."""
    return float(sum(2 * rows * (last - first) * (width - first) for first, last in upper_blocks(width)))


def closed_form_flops(rows: tuple[int, int], grid: PairGrid, pairs: Sequence[int], whitened: bool) -> float:
    """Linear connectors from covariances (METHOD 9).

    A model of width d: the upper half of its covariance, and d³/3 for its Cholesky factor. A pair: 2ndk for its cross
    covariance over n pictures, and 2d²k for every solve with a factor of width d.

    Args:
        rows: captions and pictures of the training split.
        grid: all pairs.
        pairs: those that are computed; each counts once.
        whitened: whether the image side has a covariance and a solve, too.
    """
    captions, pictures = rows
    images, texts = _touched(grid, pairs)
    total = sum(symmetric_flops(captions, width) + width**3 / 3 for width in texts)
    if whitened:
        total += sum(symmetric_flops(pictures, width) + width**3 / 3 for width in images)
    for text, image in map(grid.shape, dict.fromkeys(pairs)):
        total += 2 * pictures * text * image + 2 * text**2 * image + (2 * image**2 * text if whitened else 0)
    return float(total)


def consensus_flops(
    rows: tuple[int, int], grid: PairGrid, pairs: Sequence[int], axes: Sequence[int], rank: int
) -> float:
    """Linear connectors by way of a consensus of all models.

    A model of width d over n rows: its covariance, Cholesky factor and leading axes (`axes_flops`), 2ndq to lay its
    rows along q axes, 2ndr to join them to the r components, and 2d²r and 4dr² to solve and to measure. Once: the
    covariance of all axes together, its eigenvectors (9q³), and 2nqr for the components. A pair: 2dkr.

    Args:
        rows: captions and pictures of the training split.
        grid: all pairs.
        pairs: those that are computed; each counts once.
        axes: of each model that they touch, image models first.
        rank: components.
    """
    captions, pictures = rows
    images, texts = _touched(grid, pairs)
    total = sum(symmetric_flops(pictures, width) for width in images)
    total += sum(symmetric_flops(captions, width) for width in texts)
    for width, count in zip((*images, *texts), axes, strict=True):
        total += width**3 / 3 + axes_flops(width, count) + 2 * (2 * pictures * width * count)
        total += 2 * pictures * width * rank + 2 * width**2 * rank + 4 * width * rank**2
    total += symmetric_flops(pictures, sum(axes)) + 9 * sum(axes) ** 3 + 2 * pictures * sum(axes) * rank
    for text, image in map(grid.shape, dict.fromkeys(pairs)):
        total += 2 * text * image * rank
    return float(total)


SPARE_AXES = 16
"""Directions that a subspace iteration carries beside those that are wanted (Halko et al., arXiv 0909.4061)."""

AXES_PASSES = 3
"""Products with the covariance before its leading axes are read off."""


def axes_flops(width: int, count: int) -> float:
    """The leading axes of a covariance: 9d³ where all are wanted, else a subspace iteration.

    Each of its passes is 2d²w for w directions and a QR factorisation with its Q (4dw² - 4w³/3); at the end 2d²w + 2dw²
    for the small matrix, 9w³ for its eigenvectors and 2dwq to turn to them.
    """
    if count + SPARE_AXES >= width:
        return 9.0 * width**3
    w = count + SPARE_AXES
    passes = AXES_PASSES * (2 * width**2 * w + 4 * width * w**2 - 4 * w**3 / 3)
    return passes + 2 * width**2 * w + 2 * width * w**2 + 9 * w**3 + 2 * width * w * count


def _touched(grid: PairGrid, pairs: Sequence[int]) -> tuple[list[int], list[int]]:
    """Widths of the image and of the text models that these pairs touch, each once, in the order of the pairs."""
    wanted = [grid.pair(index) for index in dict.fromkeys(pairs)]
    images = [grid.vision_widths[v] for v in dict.fromkeys(pair.vision for pair in wanted)]
    texts = [grid.text_widths[t] for t in dict.fromkeys(pair.text for pair in wanted)]
    return images, texts


def as_connector_flops(spec: ConnectorSpec, shape: tuple[int, int]) -> float:
    """A linear map written into a connector of this family: nothing for a Linear.

    For an MLP the smaller Gram matrix (2n²m for sides n <= m), its eigenvectors (9n³), and the projection on the r that
    are kept (2rnm).

    Args:
        spec: the connector family.
        shape: (d_in, d_out) of the pair.
    """
    if spec.depth == 0:
        return 0.0
    small, large = min(shape), max(shape)
    rank = min((spec.hidden or shape[1]) // 2, small)
    return float(2 * small**2 * large + 9 * small**3 + 2 * rank * small * large)


def _hypernetwork_matmuls(
    grid: PairGrid, spec: ConnectorSpec, config: HypernetworkConfig, pairs: Sequence[int]
) -> Iterator[Matmul]:
    """The products of one forward pass: condition, trunk, and every layer's head for the pairs that have the layer."""
    if parts(config, spec.depth).condition == "features":
        # The models' mean features, which are frozen, are projected for all models at once.
        for widths in (grid.vision_widths, grid.text_widths):
            for width, models in Counter(widths).items():
                yield Matmul(models, width, config.condition_width, input_gradient=False)
    having = Counter(layer for pair in pairs for layer in spec.layers(*grid.shape(pair)))
    for fan_in, fan_out in pairwise((config.condition_width, *config.trunk)):
        yield Matmul(having.total(), fan_in, fan_out)
    for layer, count in having.items():
        head = head_sizes(layer, spec, config)
        for outputs in head.outputs:
            yield Matmul(count * max(head.blocks, 1), config.trunk[-1], outputs)
        yield Matmul(count * layer.fan_out, head.rank, layer.fan_in)

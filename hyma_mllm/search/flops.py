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


def closed_form_flops(
    rows: tuple[int, int],
    text_widths: Iterable[int],
    image_widths: Iterable[int],
    shapes: Iterable[tuple[int, int]],
    whitened: bool,
) -> float:
    """Linear connectors from covariances (METHOD 9).

    A model of width d: 2nd² for its covariance over n rows, d³/3 for its Cholesky factor. A pair: 2ndk for its cross
    covariance over n pictures, and 2d²k for every solve with a factor of width d.

    Args:
        rows: captions and pictures of the training split.
        text_widths: of the text models, each counted once.
        image_widths: of the image models, each counted once.
        shapes: (d_text, d_image) of every pair.
        whitened: whether the image side has a covariance and a solve, too.
    """
    captions, pictures = rows
    total = sum(2 * captions * width**2 + width**3 / 3 for width in text_widths)
    if whitened:
        total += sum(2 * pictures * width**2 + width**3 / 3 for width in image_widths)
    for text, image in shapes:
        total += 2 * pictures * text * image + 2 * text**2 * image + (2 * image**2 * text if whitened else 0)
    return float(total)


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

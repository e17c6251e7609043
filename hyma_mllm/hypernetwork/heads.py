"""Heads: from a pair's code to what is added to the base of one layer.

A head serves one layer shape and predicts exactly its rows. Codes have unit RMS and every head divides by
sqrt(code width * fan_in): entries of order one then predict weights of the size that fan_in asks for (fan-in normalised
hypernetworks, arXiv 2312.08399), and an Adam step of size lr moves a predicted weight by about lr, as it would alone.
At step 0 all deltas are zero (bias-HyperInit, Beck et al., 2022): the predicted connector is the base, a new nn.Linear.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from hyma_mllm.connectors import LayerShape
from hyma_mllm.hypernetwork.conditions import unit_rms
from hyma_mllm.hypernetwork.initialise import normal, uniform

HeadKind = Literal["dense", "chunked", "low_rank"]


class DenseHead(nn.Module):
    """The paper's head: one Linear from the code to all weights of the layer, code width times the layer's size.

    Args:
        width: of the code.
        layer: the shape.
        generator: draws the initial weights; None leaves them at zero.
    """

    def __init__(self, width: int, layer: LayerShape, generator: torch.Generator | None = None):
        super().__init__()
        size = layer.fan_out * (layer.fan_in + 1)
        if generator is None:
            self.scale = 1 / math.sqrt(width * layer.fan_in)
            self.weight = nn.Parameter(torch.zeros(size, width))
        else:
            self.scale = 1.0
            self.weight = nn.Parameter(uniform(size, width, bound=1 / math.sqrt(width), generator=generator))

    def forward(self, code: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Base weight [pairs, out, in] and bias [pairs, out] with the deltas of codes [pairs, width] added."""
        flat = (code * self.scale) @ self.weight.T
        delta, delta_bias = torch.split(flat, [weight[0].numel(), bias[0].numel()], dim=1)
        return weight + delta.view(weight.shape), bias + delta_bias


def rows_of_chunk(layer: LayerShape, most: int) -> int:
    """Rows of a block: the largest divisor of the layer's rows up to `most`, so that no row is cut off."""
    return max(rows for rows in range(1, min(most, layer.fan_out) + 1) if layer.fan_out % rows == 0)


class ChunkedHead(nn.Module):
    """Blocks of rows from one small Linear; a learned row per block scales the code, so that each block differs.

    Args:
        width: of the code.
        layer: the shape.
        chunk_rows: rows of a block at most; the largest divisor of fan_out up to it is taken, and no row is cut off.
        generator: draws the rows of the blocks.
    """

    def __init__(self, width: int, layer: LayerShape, chunk_rows: int, generator: torch.Generator):
        super().__init__()
        rows = rows_of_chunk(layer, chunk_rows)
        self.scale = 1 / math.sqrt(width * layer.fan_in)
        self.chunks = normal(layer.fan_out // rows, width, generator=generator)
        self.weight = nn.Parameter(torch.zeros(rows * (layer.fan_in + 1), width))

    def forward(self, code: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Base weight [pairs, out, in] and bias [pairs, out] with the deltas of codes [pairs, width] added."""
        blocks = unit_rms(code.unsqueeze(1) * self.chunks) * self.scale
        delta = (blocks @ self.weight.T).view(len(code), weight.shape[1], weight.shape[2] + 1)
        return weight + delta[..., :-1], bias + delta[..., -1]


class LowRankHead(nn.Module):
    """Weight + (alpha / rank) U V^T with U and V from the code; the bias is predicted in full.

    Args:
        width: of the code.
        layer: the shape.
        rank: columns of U and V, at most the smaller fan.
        alpha: as in LoRA (arXiv 2106.09685).
        generator: draws what predicts V; what predicts U starts at zero.
    """

    def __init__(self, width: int, layer: LayerShape, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.rank = min(rank, layer.fan_in, layer.fan_out)
        self.scale = 1 / math.sqrt(width)
        self.fan_scale = 1 / math.sqrt(layer.fan_in)
        self.alpha = alpha
        self.up = nn.Parameter(torch.zeros(layer.fan_out * self.rank, width))
        self.down = normal(layer.fan_in * self.rank, width, generator=generator)
        self.bias = nn.Parameter(torch.zeros(layer.fan_out, width))

    def forward(self, code: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Base weight [pairs, out, in] and bias [pairs, out] with the deltas of codes [pairs, width] added."""
        code = code * self.scale
        up = (code @ self.up.T).view(len(code), -1, self.rank)
        down = (code @ self.down.T).view(len(code), self.rank, -1)
        predicted = torch.baddbmm(weight, up, down, alpha=self.fan_scale * self.alpha / self.rank)
        return predicted, bias + (code * self.fan_scale) @ self.bias.T

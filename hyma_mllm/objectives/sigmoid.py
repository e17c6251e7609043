"""The pairwise sigmoid loss of SigLIP, tiled: no normaliser joins the entries, so one pass gives loss and gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hyma_mllm.objectives.gather import sum_over_processes, world_size
from hyma_mllm.objectives.tiled_infonce import accumulation_dtype
from hyma_mllm.objectives.tiles import Tile, TileBuffer, multiply, same_picture, tiles


def signed_logits(
    logits: Tensor, bias: Tensor, tile: Tile, groups: tuple[Tensor, Tensor] | None, offset: int
) -> Tensor:
    """The signed logits z (scale * cos + bias), in place; +inf, which costs nothing, for the same picture.

    z is 1 at the positives and -1 elsewhere.
    """
    logits.add_(bias).neg_()
    logits.diagonal(offset + tile.rows.start, 1, 2).neg_()
    if groups is not None:
        logits.masked_fill_(same_picture(*groups, tile.rows, offset), torch.inf)
    return logits


class TiledSigmoid(torch.autograd.Function):
    """The sigmoid loss of a strip of rows against all columns.

    Its arguments are those of `TiledInfoNCE` with a bias [] after the scale.

    Gradients are computed in forward, for a loss gradient of one per pair; backward only multiplies.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        bias: Tensor,
        groups: tuple[Tensor, Tensor] | None,
        offset: int,
        tile: int,
        shared: bool,
    ) -> Tensor:
        """The loss; see the class."""
        dtype = accumulation_dtype(rows, columns)
        (pairs, count, _), total = rows.shape, columns.shape[1]
        scale_in, bias_in = scale.to(dtype), bias.to(dtype)
        loss = rows.new_zeros(pairs, dtype=dtype)
        needs = ctx.needs_input_grad
        row_gradient = torch.empty_like(rows, dtype=dtype) if needs[0] or needs[2] else None
        column_gradient = torch.zeros_like(columns, dtype=dtype) if needs[1] else None
        bias_gradient = torch.zeros_like(loss)
        first, second = (TileBuffer(pairs, count, total, tile, loss) for _ in range(2))
        processes = world_size() if shared else 1
        with torch.autocast(rows.device.type, enabled=False):
            for part, part_columns in tiles(count, columns, tile, dtype):
                signed, spare = first.view(part), second.view(part)
                part_rows = rows[part].to(dtype) * scale_in
                multiply(part_rows, part_columns.transpose(1, 2), signed)
                signed_logits(signed, bias_in, part, groups, offset)
                loss[part.pairs] -= F.logsigmoid(signed).sum((1, 2)) / total
                # d(-log sigmoid(z l)) / dl = -z sigmoid(-z l), times this process' share of the average.
                weights = torch.neg(signed, out=spare).sigmoid_().mul_(processes / total)
                weights.diagonal(offset + part.rows.start, 1, 2).neg_()
                bias_gradient[part.pairs] += weights.sum((1, 2))
                if row_gradient is not None:
                    row_gradient[part] = multiply(weights, part_columns, torch.empty_like(part_rows))
                if column_gradient is not None:
                    column_gradient[part.pairs].baddbmm_(weights.transpose(1, 2), part_rows)
        scale_gradient = None if row_gradient is None else (row_gradient * rows).sum((1, 2))
        row_gradient = row_gradient.mul_(scale_in).to(rows.dtype) if row_gradient is not None and needs[0] else None
        ctx.save_for_backward(
            row_gradient, column_gradient, scale_gradient if needs[2] else None, bias_gradient if needs[3] else None
        )
        ctx.dtypes = rows.dtype, columns.dtype, scale.dtype, bias.dtype
        return sum_over_processes(loss) if shared else loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the arguments."""
        rows, columns, scale, bias = ctx.saved_tensors
        per_entry = gradient[:, None, None]
        return (
            None if rows is None else (rows * per_entry).to(ctx.dtypes[0]),
            None if columns is None else (columns * per_entry).to(ctx.dtypes[1]),
            None if scale is None else (scale * gradient).sum().to(ctx.dtypes[2]),
            None if bias is None else (bias * gradient).sum().to(ctx.dtypes[3]),
            *(None,) * 4,
        )

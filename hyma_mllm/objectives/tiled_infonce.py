"""Exact symmetric InfoNCE in O(batch x tile) memory.

Notable: one matrix product a tile serves both directions (row log-sum-exps are final after a tile, column ones are
accumulated online); backward recomputes the tile once from the two vectors of log-sum-exps; the product for the
columns' gradient is left out when they need none, as frozen image features do; float32 throughout for half inputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyma_mllm.objectives.gather import logsumexp_over_processes, sum_over_processes, world_size
from hyma_mllm.objectives.tiles import Tile, TileBuffer, multiply, same_picture, tiles


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32: half precision is never accumulated in."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def tile_logits(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    tile: Tile,
    groups: tuple[Tensor, Tensor] | None,
    offset: int,
    out: Tensor,
) -> Tensor:
    """The logits of one tile, written into `out`; same-picture entries are -inf.

    Args:
        rows: [pairs, rows, width], of all pairs.
        columns: [pairs of the tile, columns, width], in the dtype of `out`.
        scale: [] in the dtype of `out`.
        tile: which pairs and rows.
        groups: the pictures of rows and columns, or None when no picture repeats.
        offset: the positive of row r is column `offset + r`.
        out: [pairs of the tile, rows of the tile, columns].
    """
    logits = multiply(rows[tile.pairs, tile.rows].to(out.dtype) * scale, columns.transpose(1, 2), out)
    if groups is not None:
        logits.masked_fill_(same_picture(*groups, tile.rows, offset), -torch.inf)
    return logits


def tile_logsumexps(logits: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """A tile's log-sum-exps along rows [pairs, rows] and columns [pairs, columns]; overwrites both arguments."""
    top = logits.amax(2)
    row_sums = torch.sub(logits, top[..., None], out=spare).exp_().sum(2)
    # A column of a tile may hold masked entries only; a finite stand-in for its maximum keeps -inf - -inf away.
    peak = logits.amax(1).clamp_min_(torch.finfo(logits.dtype).min)
    column_sums = logits.sub_(peak[:, None]).exp_().sum(1)
    return top + row_sums.log(), peak + column_sums.log()


class TiledInfoNCE(torch.autograd.Function):
    """Symmetric InfoNCE of a strip of rows against all columns; across processes each holds one strip.

    `apply(rows, columns, scale, groups, offset, tile, shared)` -> loss [pairs] of the whole batch.
        rows: [pairs, rows, width] unit vectors of this process.
        columns: [pairs, columns, width] unit vectors of all processes.
        scale: [] logit scale.
        groups: ([rows], [columns]) int64, or None when no picture repeats.
        offset: the positive of row r is column `offset + r`.
        tile: logit rows held at once.
        shared: whether the other rows stand on other processes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        groups: tuple[Tensor, Tensor] | None,
        offset: int,
        tile: int,
        shared: bool,
    ) -> Tensor:
        """The loss; see the class."""
        dtype = accumulation_dtype(rows, columns)
        (pairs, count, _), total = rows.shape, columns.shape[1]
        row_lse = rows.new_empty(pairs, count, dtype=dtype)
        column_lse = rows.new_full((pairs, total), -torch.inf, dtype=dtype)
        positives = torch.empty_like(row_lse)
        first, second = (TileBuffer(pairs, count, total, tile, row_lse) for _ in range(2))
        with torch.autocast(rows.device.type, enabled=False):
            for part, part_columns in tiles(count, columns, tile, dtype):
                logits = first.view(part)
                tile_logits(rows, part_columns, scale.to(dtype), part, groups, offset, logits)
                positives[part] = logits.diagonal(offset + part.rows.start, 1, 2)
                row_lse[part], tile_columns = tile_logsumexps(logits, second.view(part))
                column_lse[part.pairs] = torch.logaddexp(column_lse[part.pairs], tile_columns)
        own = row_lse.sum(1) - 2 * positives.sum(1)
        if shared:
            own, column_lse = sum_over_processes(own), logsumexp_over_processes(column_lse)
        ctx.save_for_backward(rows, columns, scale, row_lse, column_lse)
        ctx.groups, ctx.offset, ctx.tile, ctx.processes = groups, offset, tile, world_size() if shared else 1
        return (own + column_lse.sum(1)) / (2 * total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the arguments."""
        rows, columns, scale, row_lse, column_lse = ctx.saved_tensors
        need_rows, need_columns, need_scale = ctx.needs_input_grad[:3]
        dtype = row_lse.dtype
        (pairs, count, _), total = rows.shape, columns.shape[1]
        scale_in = scale.to(dtype)
        share = (gradient.to(dtype) * (ctx.processes / (2 * total)))[:, None, None]
        row_gradient = torch.empty_like(rows) if need_rows else None
        column_gradient = torch.zeros_like(columns, dtype=dtype) if need_columns else None
        scale_gradient = scale.new_zeros((), dtype=dtype)
        first, second = (TileBuffer(pairs, count, total, ctx.tile, row_lse) for _ in range(2))
        with torch.autocast(rows.device.type, enabled=False):
            for part, part_columns in tiles(count, columns, ctx.tile, dtype):
                logits, spare = first.view(part), second.view(part)
                tile_logits(rows, part_columns, scale_in, part, ctx.groups, ctx.offset, logits)
                torch.sub(logits, row_lse[part][..., None], out=spare).exp_()
                weights = logits.sub_(column_lse[part.pairs][:, None]).exp_().add_(spare)
                weights.diagonal(ctx.offset + part.rows.start, 1, 2).sub_(2)
                part_rows = rows[part].to(dtype)
                if need_rows or need_scale:
                    # The logits are scale * <row, column>: one product serves the rows and the scale.
                    pulled = multiply(weights, part_columns, torch.empty_like(part_rows)).mul_(share[part.pairs])
                    scale_gradient += (pulled * part_rows).sum()
                    if row_gradient is not None:
                        row_gradient[part] = pulled.mul_(scale_in)
                if column_gradient is not None:
                    part_rows = part_rows * (share[part.pairs] * scale_in)
                    column_gradient[part.pairs].baddbmm_(weights.transpose(1, 2), part_rows)
        return (
            row_gradient,
            None if column_gradient is None else column_gradient.to(columns.dtype),
            scale_gradient.to(scale.dtype) if need_scale else None,
            *(None,) * 4,
        )

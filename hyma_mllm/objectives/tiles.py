"""Walking over a batch of similarity matrices tile by tile: which block comes next, its product, and its mask."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """A block of whole logit rows: `rows` of every pair in `pairs`."""

    pairs: slice
    rows: slice

    @property
    def shape(self) -> tuple[int, int]:
        """(pairs, rows) in the block."""
        return self.pairs.stop - self.pairs.start, self.rows.stop - self.rows.start


def pair_blocks(pairs: int, rows: int, tile: int) -> Iterator[slice]:
    """Pairs that are worked on at once: several where their rows fit one tile together, else one after the other."""
    step = max(1, tile // max(rows, 1))
    for start in range(0, pairs, step):
        yield slice(start, min(start + step, pairs))


def row_tiles(block: slice, rows: int, tile: int) -> Iterator[Tile]:
    """The tiles of one block of pairs, top to bottom, none of more than `tile` logit rows in all."""
    for start in range(0, rows, tile):
        yield Tile(block, slice(start, min(start + tile, rows)))


def tiles(rows: int, columns: Tensor, tile: int, dtype: torch.dtype) -> Iterator[tuple[Tile, Tensor]]:
    """Every tile of a batch with the columns of its pairs.

    Args:
        rows: of each pair.
        columns: [pairs, columns, width].
        tile: logit rows held at once.
        dtype: wanted of the columns, converted once for a block of pairs.

    Yields:
        The tile, and [pairs of the tile, columns, width] in `dtype`.
    """
    for block in pair_blocks(columns.shape[0], rows, tile):
        converted = columns[block].to(dtype)
        for part in row_tiles(block, rows, tile):
            yield part, converted


class TileBuffer:
    """One allocation that every tile reuses: a fresh one each time would cost more than the arithmetic on it.

    Attributes:
        memory: [tile * columns], as large as the largest tile.
    """

    def __init__(self, pairs: int, rows: int, columns: int, tile: int, like: Tensor) -> None:
        at_once = min(max(pairs, 1) * rows, max(tile, 1))
        self.memory = torch.empty(at_once * columns, dtype=like.dtype, device=like.device)
        self.columns = columns

    def view(self, tile: Tile) -> Tensor:
        """[pairs, rows, columns] of this tile."""
        pairs, rows = tile.shape
        return self.memory[: pairs * rows * self.columns].view(pairs, rows, self.columns)


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Batched matrix product into `out`; a batch of one takes the plain product, which threads better on CPU."""
    if left.shape[0] == 1:
        torch.mm(left[0], right[0], out=out[0])
        return out
    return torch.bmm(left, right, out=out)


def same_picture(row_groups: Tensor, column_groups: Tensor, rows: slice, offset: int) -> Tensor:
    """Which entries of a tile are no negatives: another caption of the same picture.

    Args:
        row_groups: [rows] int64, the picture of each row.
        column_groups: [columns] int64, the picture of each column.
        rows: the tile's rows.
        offset: the positive of row r is column `offset + r`.

    Returns:
        [tile rows, columns] bool, False at the positives.
    """
    mask = row_groups[rows, None] == column_groups
    mask.diagonal(offset + rows.start).fill_(False)
    return mask


def repeats(groups: Tensor | None) -> bool:
    """Whether any picture stands twice in the batch; without a repeat there is nothing to mask."""
    return groups is not None and torch.unique(groups).numel() < groups.numel()

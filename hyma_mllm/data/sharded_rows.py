"""Rows that lie in several tensors, as those of a feature store do, read as if they lay in one."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ShardedRows:
    """[rows, width] in pieces, most often memory-mapped ones; only what is asked for is read.

    Args:
        pieces: [rows of the piece, width] each, on the CPU, at least one, all of one width and dtype.

    Attributes:
        width: entries of a row.
        dtype: of the entries.
    """

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        self._pieces = tuple(pieces)
        self._starts = np.cumsum([0, *(len(piece) for piece in pieces)])
        self.width: int = pieces[0].shape[1]
        self.dtype = pieces[0].dtype

    @classmethod
    def joined(cls, parts: Iterable["ShardedRows"]) -> "ShardedRows":
        """The rows of one part after another."""
        return cls([piece for part in parts for piece in part._pieces])

    def first(self, rows: int) -> "ShardedRows":
        """The first rows, at least one."""
        spans = zip(self._pieces, self._starts[:-1].tolist(), strict=True)
        return ShardedRows([piece[: rows - start] for piece, start in spans if start < rows])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Tensor:
        """Some rows.

        Args:
            rows: a slice, a list of row numbers (negative ones count from the end), an int64 tensor [n], or a boolean
                mask [rows].

        Returns:
            [n, width] on the CPU in the stored dtype; a view where the rows lie together in one piece.

        Raises:
            IndexError: if a row does not exist.
        """
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                return self._span(start, max(start, stop))
            return self._gather(np.arange(start, stop, step))
        index = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
        if index.dtype == np.bool_:
            if index.shape != (len(self),):
                raise IndexError(f"a mask of {index.shape} for {len(self)} rows")
            index = index.nonzero()[0]
        index = index.astype(np.int64)
        if index.size and not (-len(self) <= index.min() and index.max() < len(self)):
            raise IndexError(f"rows {index.min()} to {index.max()} of {len(self)}")
        return self._gather(np.where(index < 0, index + len(self), index))

    def _span(self, start: int, stop: int) -> Tensor:
        """Rows start to stop - 1."""
        found = [
            piece[max(start - first, 0) : stop - first]
            for piece, first in zip(self._pieces, self._starts[:-1].tolist(), strict=True)
            if first < stop and start < first + len(piece)
        ]
        if not found:
            return self._pieces[0][:0]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _gather(self, index: "np.ndarray[Any, np.dtype[np.int64]]") -> Tensor:
        """Rows in any order, [n] of them, all there."""
        out = torch.empty((len(index), self.width), dtype=self.dtype)
        owner = np.searchsorted(self._starts, index, side="right") - 1
        for number in np.unique(owner).tolist():
            here = torch.from_numpy((owner == number).nonzero()[0])
            out[here] = self._pieces[number][torch.from_numpy(index)[here] - int(self._starts[number])]
        return out

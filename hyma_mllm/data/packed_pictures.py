"""Pictures inside larger files, read when they are opened: a list of rows holds where they are, not their bytes."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

WINDOW_BYTES = 16_000_000
"""Pictures of a row group that are read at once, as far as sizes are alike; some writers put a whole file into one."""

WINDOW_ROWS = 8
"""Least rows of a window, however large their pictures."""

WINDOWS = 4
"""Windows of a row group that are kept: threads ask for rows nearly in order, and going back begins the group anew."""

CELL_ROWS = 1024
"""Rows of cells other than pictures that are read at once."""

BUFFER_BYTES = 1 << 20
"""Read from a column at once; without a buffer the whole column of a row group is."""

_PRESENT = "\0present"
"""Among the cells of a row; no column can have this name."""

_one_reader = Lock()
"""Threads that open pictures of one row group must not each read it."""


@dataclass(frozen=True, slots=True)
class TarPicture:
    """A member of an uncompressed tar.

    Attributes:
        file: the tar.
        start, size: where the member's bytes lie in it.
    """

    file: Path
    start: int
    size: int

    def read_bytes(self) -> bytes:
        """The encoded picture; OSError if the file cannot be read."""
        with self.file.open("rb") as opened:
            opened.seek(self.start)
            return opened.read(self.size)


@dataclass(frozen=True, slots=True)
class ParquetPicture:
    """A cell of a parquet file that holds a picture.

    Attributes:
        file: the parquet file.
        column: of the bytes, or of `datasets`' images (a struct with `bytes`).
        group: number of its row group.
        row: its place there.
    """

    file: Path
    column: str
    group: int
    row: int

    def read_bytes(self) -> bytes:
        """The encoded picture; OSError or ValueError if the file cannot be read."""
        with _one_reader:
            cell = _row_group(self.file, self.column, self.group).cell(self.row)
        found: bytes = cell["bytes"] if isinstance(cell, dict) else cell
        return found


def parquet_rows(
    files: Sequence[Path], image_columns: Sequence[str]
) -> Iterator[tuple[dict[str, Any], ParquetPicture | None]]:
    """The cells of every row, file by file, and the place of its picture.

    Bytes of pictures are not read where the file says that no row lacks them, and never kept.

    Args:
        files: parquet files.
        image_columns: names that the column of the pictures may have; the first that a file has counts.

    Yields:
        (column -> cell, the place); None for the place where the row holds no bytes: then the cell may be a path. Where
        there is a place, the bytes are missing from the cells.

    Raises:
        OSError, ValueError: a file cannot be read (what pyarrow raises).
    """
    for file in files:
        with _opened(file) as opened:
            image = next((name for name in image_columns if name in opened.schema_arrow.names), "")
            leaf = _bytes_leaf(opened, image)
            for group in range(opened.num_row_groups):
                row = 0
                for batch in _cells(opened, group, leaf):
                    for cells in batch:
                        present = bool(leaf) and cells.pop(_PRESENT, True)
                        if image:
                            cells.setdefault(image, None)
                        yield cells, ParquetPicture(file, image, group, row) if present else None
                        row += 1


def _cells(opened: pq.ParquetFile, group: int, leaf: str) -> Iterator[list[dict[str, Any]]]:
    """Batches of rows as column -> cell, without bytes of pictures; `_PRESENT` says where some are missing."""
    others = [name for name in _paths(opened) if name != leaf]
    said = _said_of(opened, group, leaf) if leaf else None
    if said is None or _none_lacks(said):
        for batch in opened.iter_batches(CELL_ROWS, row_groups=[group], columns=others):
            yield batch.to_pylist() if others else [{} for _ in range(batch.num_rows)]
        return
    rows = min(CELL_ROWS, _window_rows(opened, group, said))
    places = opened.iter_batches(rows, row_groups=[group], columns=[leaf])
    for batch, held in zip(opened.iter_batches(rows, row_groups=[group], columns=others), places, strict=True):
        found = [bool(size) for size in _sizes(held.column(0))]
        rows_of_batch = batch.to_pylist() if others else [{} for _ in found]
        yield [cells | {_PRESENT: there} for cells, there in zip(rows_of_batch, found, strict=True)]


def _paths(opened: pq.ParquetFile) -> list[str]:
    """The paths of all columns, those inside structs each on its own."""
    return [opened.schema.column(number).path for number in range(len(opened.schema))]


def _none_lacks(said: pq.ColumnChunkMetaData) -> bool:
    """Whether the file says that no row of a group lacks this column."""
    statistics = said.statistics
    return statistics is not None and statistics.has_null_count and statistics.null_count == 0


def _said_of(opened: pq.ParquetFile, group: int, leaf: str) -> pq.ColumnChunkMetaData:
    """What the file says of a column of a row group.

    Raises:
        OSError: what it says is damaged.
    """
    # Asked for damaged metadata, pyarrow 26 ends the process; a reader of the column raises instead.
    next(opened.iter_batches(1, row_groups=[group], columns=[leaf]), None)
    number = _paths(opened).index(leaf)
    said, wanted = opened.metadata.row_group(group).column(number), opened.schema.column(number).physical_type
    if said.physical_type != wanted:  # pyarrow 26 ends the process when it is asked for the statistics of such a one
        raise OSError(f"row group {group} says that {leaf} is of type {said.physical_type}, and the schema {wanted}")
    return said


def _sizes(cells: pa.Array) -> list[int | None]:
    """Bytes of each picture of a column, or of a struct with `bytes` alone."""
    if pa.types.is_struct(cells.type):
        cells = pc.struct_field(cells, "bytes")
    return list(pc.binary_length(cells).to_pylist())


class _RowGroup:
    """The pictures of one row group, read forwards window by window."""

    def __init__(self, file: Path, column: str, group: int) -> None:
        self._file = _opened(file)
        self._group = group
        self._column = column
        leaf = _bytes_leaf(self._file, column) or column
        self._leaf = leaf
        self._rows = _window_rows(self._file, group, _said_of(self._file, group, leaf))
        self._begin()

    def cell(self, row: int) -> Any:
        """The cell as a Python value."""
        if self._windows and row < self._windows[0][0]:
            self._begin()
        while row >= self._next:
            batch = next(self._batches, None)
            if batch is None:  # fewer rows than the file says
                raise IndexError(f"row {row} of the row group {self._group}")
            window = batch.column(0)
            self._windows.append((self._next, window))
            self._next += len(window)
        for first, window in reversed(self._windows):
            if first <= row:
                return window[row - first].as_py()
        raise IndexError(f"row {row} of the row group {self._group}")

    def _begin(self) -> None:
        self._batches = self._file.iter_batches(self._rows, row_groups=[self._group], columns=[self._leaf])
        self._windows = deque[tuple[int, pa.Array]](maxlen=WINDOWS)
        self._next = 0


# Two, so that the threads at a border of groups do not throw each other's group out.
@lru_cache(maxsize=2)
def _row_group(file: Path, column: str, group: int) -> _RowGroup:
    return _RowGroup(file, column, group)


def _opened(file: Path) -> pq.ParquetFile:
    return pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)


def _bytes_leaf(opened: pq.ParquetFile, column: str) -> str:
    """The path in the file of the pictures' bytes; empty if the column holds none."""
    names = opened.schema_arrow.names
    if column not in names:
        return ""
    kind = opened.schema_arrow.field(column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{column}.bytes"
    return column if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else ""


def _window_rows(opened: pq.ParquetFile, group: int, said: pq.ColumnChunkMetaData) -> int:
    """Rows whose pictures take `WINDOW_BYTES` together, by their mean size."""
    rows, held = opened.metadata.row_group(group).num_rows, said.total_uncompressed_size
    return max(WINDOW_ROWS, WINDOW_BYTES * int(rows) // max(1, int(held)))

"""Pictures inside larger files, read when they are opened: a list of rows holds where they are, not their bytes."""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow.parquet as pq

_one_reader = Lock()
"""Threads that open pictures of one row group must not each read it."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class ParquetPicture:
    """A cell of a parquet file.

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
        """The encoded picture; OSError if the file cannot be read."""
        with _one_reader:
            cells = _row_group(self.file, self.column, self.group)
        cell = cells[self.row].as_py()
        found: bytes = cell["bytes"] if isinstance(cell, dict) else cell
        return found


def tar_pictures(file: Path) -> dict[str, TarPicture]:
    """Name of each member -> where it lies; nothing for a compressed tar, whose members have no place of their own."""
    try:
        with tarfile.open(file, "r:") as tar:
            return {member.name: TarPicture(file, member.offset_data, member.size) for member in tar if member.isreg()}
    except tarfile.ReadError:
        return {}


def parquet_places(files: Sequence[Path]) -> Iterator[tuple[Path, int, int]]:
    """(file, row group, row in it) of every row, file by file."""
    for file in files:
        with pq.ParquetFile(file) as opened:
            sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
        for group, rows in enumerate(sizes):
            for row in range(rows):
                yield file, group, row


# Two, so that the threads at a border of groups do not throw each other's group out.
@lru_cache(maxsize=2)
def _row_group(file: Path, column: str, group: int) -> Any:
    with pq.ParquetFile(file) as opened:
        return opened.read_row_group(group, columns=[column]).column(column)

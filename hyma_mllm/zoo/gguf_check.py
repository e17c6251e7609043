"""The lengths that a GGUF file claims, checked against the file before a library believes them.

The library loops over what a count says, to 2^64, without looking whether the file goes on.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Kind of a plain value -> its bytes."""

MAX_DIMENSIONS = 8
MAX_NUMBERS = 1 << 48
"""Of one tensor: no file holds as many, and their count still fits every integer that counts bytes."""


def check_gguf(file: Path) -> None:
    """Walk over metadata and tensor descriptions of a GGUF file.

    Raises:
        ValueError: it is no GGUF file, ends early, or claims what cannot be.
        OSError: it cannot be read.
    """
    if not file.stat().st_size:
        raise ValueError("it is empty")
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _walk(data)
        except struct.error as error:
            raise ValueError("it ends early") from error


@dataclass
class _Walk:
    """A place in the file that moves on; `struct.error` or `ValueError` where the file ends before it."""

    data: mmap.mmap
    order: str
    at: int = 0

    def number(self, form: str) -> int:
        """The next integer of this `struct` form."""
        (value,) = struct.unpack_from(self.order + form, self.data, self.at)
        self.at += struct.calcsize(self.order + form)
        return int(value)

    def skip(self, size: int) -> None:
        """Pass over so many bytes."""
        if size > len(self.data) - self.at:
            raise ValueError(f"something of {size:,} bytes is longer than the file")
        self.at += size

    def text(self) -> None:
        """Pass over a string."""
        self.skip(self.number("Q"))

    def value(self, kind: int, inside: bool = False) -> None:
        """Pass over a value of a kind."""
        if kind in SIZES:
            self.skip(SIZES[kind])
        elif kind == STRING:
            self.text()
        elif kind == ARRAY and not inside:
            kind, count = self.number("I"), self.number("Q")
            if kind in SIZES:
                self.skip(SIZES[kind] * count)
                return
            for _ in range(count):  # each takes at least the bytes of its length, so that the file bounds them
                self.value(kind, inside=True)
        else:
            raise ValueError(f"a value is of the unknown kind {kind}")


def _walk(data: mmap.mmap) -> None:
    if data[:4] != MAGIC:
        raise ValueError("it does not start with GGUF")
    (version,) = struct.unpack_from("<I", data, 4)
    walk = _Walk(data, "<" if version & 0xFFFF else ">", at=8)
    tensors, values = walk.number("Q"), walk.number("Q")
    for _ in range(values):
        walk.text()
        walk.value(walk.number("I"))
    for _ in range(tensors):
        walk.text()
        dimensions = walk.number("I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions:,} dimensions")
        numbers = math.prod(walk.number("Q") for _ in range(dimensions))
        if numbers > MAX_NUMBERS:
            raise ValueError(f"a tensor claims {numbers:,} numbers")
        walk.skip(4 + 8)

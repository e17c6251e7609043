"""What a reader under the fuzzer is: valid files, a way to draw wrong ones, and the door that opens them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # mypy takes the folder for a package; a script that is run finds what stands beside it
    from benchmarks.fuzz_mutate import Files, Structured
else:
    from fuzz_mutate import Files, Structured


@dataclass(frozen=True)
class Reader:
    """One reader of foreign files.

    Attributes:
        name: for the table.
        files: a valid input: name (which may hold folders) -> content.
        structured: draws changed files that are still well-formed in part.
        read: opens the folder with the files, of which the named one was changed, by a public door of the package.
    """

    name: str
    files: Files
    structured: Structured
    read: Callable[[Path, str], object]

    @property
    def changeable(self) -> list[str]:
        """The files whose bytes are changed: those of the reader, not the pictures that they name."""
        others = [name for name in self.files if not name.endswith((".png", ".jpg"))]
        return others or list(self.files)

"""Where the package keeps what it fetched and computed, and how a file is written so that a kill leaves no half."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """The user's cache directory for this package; the environment variable HYMA_CACHE overrides it."""
    override = os.environ.get("HYMA_CACHE")
    path = Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("hyma_mllm"))
    path.mkdir(parents=True, exist_ok=True)
    return path


_LEFT_BEHIND = re.compile(r"\..+\.\d+\.(tmp|old)")
"""Temporary names of `atomic_path` and of directories that are written in one step."""


def sweep(directory: Path) -> None:
    """Remove what killed processes left half-written anywhere below a directory in which nobody else writes now."""
    for path in [path for path in directory.rglob(".*") if _LEFT_BEHIND.fullmatch(path.name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends well and removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one atomic step."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

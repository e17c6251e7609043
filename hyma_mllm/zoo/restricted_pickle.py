"""Read a pickle that holds numpy arrays in plain containers, and nothing that could run."""

import pickle
import pickletools
from pathlib import Path
from typing import IO, Any

import numpy as np

from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import UNREADABLE, reason

# `numpy.core` was renamed to `numpy._core` in numpy 2; old files name the old place.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy.core.numeric", "_frombuffer"): np._core.numeric._frombuffer,  # type: ignore[attr-defined]
    ("numpy._core.numeric", "_frombuffer"): np._core.numeric._frombuffer,  # type: ignore[attr-defined]
    ("_codecs", "encode"): lambda text, _encoding: text.encode("latin1"),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only what rebuilds a numpy array; every other name ends the reading."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _ALLOWED[module, name]


def load_arrays(path: Path) -> Any:
    """Containers (dict, list, tuple) of numpy arrays from a pickle.

    Raises:
        HymaError: the file names anything but numpy arrays, holds an array of Python objects, or is cut short.
    """
    try:
        with path.open("rb") as file:
            _refuse_far_places(file, path.stat().st_size)
            file.seek(0)
            loaded = _ArrayUnpickler(file).load()
        _refuse_objects(loaded, path)
    except (*UNREADABLE, MemoryError) as error:
        raise HymaError(f"{path} is not a pickle of plain numpy arrays ({reason(error)}); it is not opened.") from error
    return loaded


def _refuse_far_places(file: IO[bytes], size: int) -> None:
    """Refuse a pickle that remembers values under numbers larger than the file, for which Python would make room.

    Raises:
        ValueError: it does, or it is no pickle.
    """
    for opcode, argument, _ in pickletools.genops(file):
        if "PUT" in opcode.name and isinstance(argument, int) and argument > size:
            raise ValueError(f"it numbers a value {argument}")


def _refuse_objects(value: Any, path: Path) -> None:
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise HymaError(f"{path} holds an array of Python objects, not of numbers; it is not opened.")
    elif isinstance(value, dict):
        for item in value.values():
            _refuse_objects(item, path)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_objects(item, path)
    elif not isinstance(value, str | bytes | int | float | None):
        raise HymaError(f"{path} holds a {type(value).__name__}, not numpy arrays; it is not opened.")

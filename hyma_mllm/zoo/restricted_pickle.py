"""Read a pickle that holds numpy arrays in plain containers, and nothing that could run."""

import math
import pickle
import pickletools
from pathlib import Path
from typing import IO, Any, ClassVar

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


_DTYPE_STATE = (None, None, None, -1, -1, 0)
"""Of a dtype of plain numbers behind its version and byte order: no fields, no shape, no metadata."""


class _ArrayUnpickler(pickle._Unpickler):
    """Python's own unpickler in Python, for it lets what is put into an array be looked at first."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Only what rebuilds a numpy array; every other name ends the reading."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _ALLOWED[module, name]

    def load_build(self) -> None:
        """The state of an array or a dtype; numpy believes what it is given there, and may end the process."""
        state, target = self.stack[-1], self.stack[-2]  # type: ignore[attr-defined]
        _check_state(target, state)
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


def _check_state(target: Any, state: Any) -> None:
    """Refuse a state that numpy itself would not write for plain numbers.

    Raises:
        ValueError: it is another.
    """
    if isinstance(target, np.dtype):
        plain = isinstance(state, tuple) and len(state) == 8 and state[0] == 3 and state[1] in ("<", ">", "|", "=")
        if not plain or state[2:] != _DTYPE_STATE:
            raise ValueError("it holds a dtype that is not of plain numbers")
    elif isinstance(target, np.ndarray):
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("it holds a damaged array")
        version, shape, dtype, _, data = state
        sizes = isinstance(shape, tuple) and all(isinstance(size, int) and size >= 0 for size in shape)
        if version != 1 or not sizes or not isinstance(dtype, np.dtype) or not isinstance(data, bytes | str):
            raise ValueError("it holds a damaged array")
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise ValueError("it holds an array of another size than it says")
    else:
        raise ValueError(f"it gives a state to a {type(target).__name__}")


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

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyma_mllm.errors import HymaError
from hyma_mllm.zoo.restricted_pickle import load_arrays


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('the pickle ran')",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_come_back_whatever_the_protocol(protocol: int, tmp_path: Path) -> None:
    value = {"conv": [np.arange(6, dtype="f4").reshape(2, 3), np.zeros(2, "i8")], "bias": {"b": np.ones(3)}}
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    loaded = load_arrays(path)
    np.testing.assert_array_equal(loaded["conv"][0], value["conv"][0])
    np.testing.assert_array_equal(loaded["bias"]["b"], np.ones(3))


@pytest.mark.parametrize(
    "value", [Bomb(), {"a": [Bomb()]}, Path("/"), np.array([Bomb()], dtype=object), np.array([None]), {"a": {1, 2}}]
)
def test_anything_else_is_refused(value: object, tmp_path: Path) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(HymaError, match=r"weights\.pkl"):
        load_arrays(path)


@pytest.mark.parametrize("cut", [0, 1, 40, -1])
def test_a_cut_file_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"a": np.arange(100)})[:cut])
    with pytest.raises(HymaError, match="not a pickle of plain numpy arrays"):
        load_arrays(path)


class Stated:
    """A dtype, or an array, that is given another state than numpy would write."""

    def __init__(self, made: tuple[Any, ...], state: object) -> None:
        self.made, self.state = made, state

    def __reduce__(self) -> tuple[Any, ...]:
        return (*self.made, self.state)


DTYPE = (np.dtype, ("f4", False, True))
ARRAY = np.zeros(1).__reduce__()[:2]


@pytest.mark.parametrize(
    ("made", "state"),
    [
        (DTYPE, (3, "<", None, None, None, -1, -1, 63)),
        (DTYPE, (3, "<", None, ("a",), {"a": (np.dtype("O"), 0)}, 1 << 40, 1, 0)),
        (DTYPE, (3, "<", (np.dtype("f4"), (1 << 40,)), None, None, -1, -1, 0)),
        (DTYPE, "<"),
        (ARRAY, (1, (1 << 40,), np.dtype("f8"), False, b"12345678")),
        (ARRAY, (1, (-1,), np.dtype("f8"), False, b"")),
        (ARRAY, (1, (1,), "f8", False, b"12345678")),
        (ARRAY, ()),
    ],
)
def test_a_state_that_numpy_would_not_write_never_reaches_it(
    made: tuple[Any, ...], state: object, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"a": Stated(made, state)}))
    with pytest.raises(HymaError, match="not a pickle of plain numpy arrays"):
        load_arrays(path)

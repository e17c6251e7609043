"""Plain tensors as feature stores: `.pt`, `.npy`, `.safetensors`, and the features that the paper's authors published.

The published sets (CC3M-558K) are one bare float32 tensor [rows, width] of unit rows per model, named `{short}.pt`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from hyma_mllm.data.features import FeatureStore
from hyma_mllm.data.manifest import DTYPES, FeatureKind, check_values, hash_file, hash_keys
from hyma_mllm.data.store_writer import StorePlan, StoreWriter, check_free_space, check_keys
from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import UNREADABLE, reason
from hyma_mllm.foreign_tensors import check_plain, load_tensors

IMPORT_SHARD_ROWS = 65536
"""Rows of one imported shard: the rows are there already, so that shards need not be small against a kill."""


def import_tensor(
    path: Path,
    target: Path,
    model: str,
    keys: Sequence[str] | None = None,
    unit_norm: bool = False,
    kind: FeatureKind = "image",
) -> FeatureStore:
    """Write the features of a file as a store.

    Args:
        path: `.pt` (a tensor, or a dict with one tensor), `.npy`, or `.safetensors` with one tensor; [rows, width],
            float32, float16, bfloat16 (kept) or float64 (stored as float32).
        target: directory of the store; a store of the same file and keys that is there already is opened.
        model: id of the model that made the features.
        keys: one for each row, unique; None numbers the rows "0", "1", ...
        unit_norm: claim, and check, that every row has an L2 norm of 1.
        kind: what the rows are features of.

    Returns:
        The finished store. Its revision is the file's sha256, and its source says which keys were given.

    Raises:
        HymaError: if the file cannot be read as one floating tensor [rows, width], its rows do not match the keys, a
            feature is not finite or not of unit norm where claimed, or the store cannot be written.
    """
    features = _read_tensor(path)
    if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
        raise HymaError(
            f"{path} holds a tensor of shape {tuple(features.shape)} and {features.dtype}; features are floating and "
            "[rows, width]."
        )
    keys = [str(row) for row in range(len(features))] if keys is None else list(keys)
    check_keys(keys, str(path))
    if len(keys) != len(features):
        raise HymaError(f"{path} has {len(features)} rows, but {len(keys)} keys were given for them; give one a row.")
    names = {dtype: name for name, dtype in DTYPES.items()}
    keys_sha256 = hash_keys(keys)
    plan = StorePlan(
        model=model,
        revision=f"sha256:{hash_file(path)}",
        kind=kind,
        rows=len(features),
        width=features.shape[1],
        dtype=names.get(features.dtype, "fp32"),
        source=f"imported:{keys_sha256[:16]}",
        unit_norm=unit_norm,
        keys_sha256=keys_sha256,
        compute_dtype="imported",
        shard_rows=IMPORT_SHARD_ROWS,
    )
    writer = StoreWriter(target, plan, keys)
    if not writer.is_finished():
        # Checked before the first byte is written: a later NaN must leave no unfinished store.
        for shard in range(writer.shards):
            rows = writer.rows_of(shard)
            stored = features[rows.start : rows.stop].to(DTYPES[plan.dtype])
            check_values(stored, keys[rows.start : rows.stop], unit_norm, str(path))
        _write(writer, features)
    return FeatureStore.open(target)


def _write(writer: StoreWriter, features: Tensor) -> None:
    dtype = DTYPES[writer.plan.dtype]
    with writer.lock():
        if writer.is_finished():  # by whoever held the lock a moment ago
            return
        writer.start()
        missing = writer.missing()
        check_free_space([(writer.path, writer.bytes_of(missing))])
        for shard in tqdm(missing, desc=f"importing {writer.plan.model}", unit="shard", leave=False, delay=2):
            rows = writer.rows_of(shard)
            writer.write(shard, features[rows.start : rows.stop].to(dtype), seconds=0.0)
        writer.finish()


def _read_tensor(path: Path) -> Tensor:
    """The one tensor of a file, memory-mapped where the format allows it."""
    if not path.is_file():
        raise HymaError(f"The file of features {path} does not exist.")
    readers = {".pt": _read_pt, ".pth": _read_pt, ".npy": _read_npy, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise HymaError(f"{path} is none of {', '.join(readers)}; convert the features to one of these.")
    try:
        return readers[path.suffix](path)
    except UNREADABLE as error:
        raise HymaError(f"{path} cannot be read as a tensor ({reason(error)}); write it anew.") from error


def _read_pt(path: Path) -> Tensor:
    found = load_tensors(path)
    if isinstance(found, Tensor):
        tensor = found
    else:
        values = found.values() if isinstance(found, dict) else ()
        tensor = _only([value for value in values if isinstance(value, Tensor)], path)
    check_plain(tensor)
    return tensor.detach()


def _read_npy(path: Path) -> Tensor:
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    return torch.from_numpy(array)


def _read_safetensors(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return _only([file.get_tensor(name) for name in file.keys()], path)  # noqa: SIM118 (no iterator)


def _only(tensors: Sequence[Tensor], path: Path) -> Tensor:
    if len(tensors) != 1:
        raise HymaError(f"{path} holds {len(tensors)} tensors where one was expected; write the features alone.")
    return tensors[0]

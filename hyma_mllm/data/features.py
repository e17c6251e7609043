"""The feature store as it is read: manifest, verification, memory-mapped rows.

A store is a directory that holds the features of one model on one source, row i for key i:

- `manifest.json`, written last: without it the store is unfinished;
- `keys.json`, the row keys in order;
- `shard-00000.safetensors`, ...: one tensor `features` [rows of the shard, width] each.

`embedding.py` fills it from an encoder, `imports.py` from a plain tensor; `resident.py` loads it whole where it fits.
"""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from hyma_mllm.data.manifest import (
    KEYS_FILE,
    MANIFEST_FILE,
    STORED_DTYPES,
    TENSOR_NAME,
    DtypeName,
    FeatureKind,
    Manifest,
    Shard,
    check_values,
    hash_file,
    hash_keys,
)
from hyma_mllm.data.sharded_rows import ShardedRows
from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import is_file, parse_json

__all__ = ["DtypeName", "FeatureKind", "FeatureStore", "Manifest", "Shard", "check_aligned"]

CHUNK_ROWS = 65536
"""Rows checked at once while verifying, so that no second copy of the store is ever held."""


class FeatureStore:
    """A finished store; rows are read from memory-mapped files.

    Attributes:
        path: the directory.
        manifest: what it holds.
        keys: the key of each row, in order.
        rows: the features, memory-mapped.
    """

    def __init__(self, path: Path, manifest: Manifest, keys: tuple[str, ...], shards: list[Tensor]) -> None:
        self.path = path
        self.manifest = manifest
        self.keys: Sequence[str] = keys
        self.rows = ShardedRows(shards)

    @classmethod
    def open(
        cls, path: Path, verify: bool = True, revision: str | None = None, source: str | None = None
    ) -> "FeatureStore":
        """Open a finished store.

        Args:
            path: its directory.
            verify: read everything once and check the hash of each shard, finite values, and unit norms where claimed;
                otherwise only the manifest, the keys and the shapes are checked.
            revision: the model revision that is expected, or None for any.
            source: the source fingerprint that is expected, or None for any.

        Raises:
            HymaError: if the store is absent, unfinished, of another revision or source, damaged, or holds a feature
                that is not finite or not of unit norm.
        """
        manifest_file = path / MANIFEST_FILE
        if not manifest_file.is_file():
            state = "is unfinished; rerun the command that was embedding it" if path.is_dir() else "does not exist"
            raise HymaError(f"The feature store {path} {state}.")
        manifest = Manifest.read(manifest_file)
        for what, found, wanted in (
            ("revision", manifest.revision, revision),
            ("source", manifest.source, source),
        ):
            if wanted is not None and found != wanted:
                raise HymaError(
                    f"The feature store {path} of {manifest.model} was written from {what} {found}, not {wanted}; "
                    f"delete {path} to embed anew."
                )
        keys = _read_keys(path, manifest)
        if sum(shard.rows for shard in manifest.shards) != manifest.rows:
            raise HymaError(f"The shards of the feature store {path} do not add up to {manifest.rows} rows; delete it.")
        if verify:
            _verify_hashes(path, manifest)
        store = cls(path, manifest, keys, [_map_shard(path, shard, manifest) for shard in manifest.shards])
        if verify:
            store._verify_values()
        return store

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Tensor:
        """The features of some rows, [n, width] on the CPU in the stored dtype; see `ShardedRows`."""
        return self.rows[rows]

    def _verify_values(self) -> None:
        for start in range(0, len(self), CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, len(self))
            check_values(self.rows[start:stop], self.keys[start:stop], self.manifest.unit_norm, str(self.path))


def check_aligned(stores: Sequence[FeatureStore]) -> None:
    """Refuse stores whose rows do not stand for the same keys in the same order.

    Args:
        stores: any number of open stores.

    Raises:
        HymaError: naming the first row that differs between the first store and another.
    """
    for other in stores[1:]:
        first = stores[0]
        if first.manifest.keys_sha256 == other.manifest.keys_sha256:
            continue
        for row, (a, b) in enumerate(zip(first.keys, other.keys, strict=False)):
            if a != b:
                raise HymaError(
                    f"The feature stores {first.path} and {other.path} part at row {row}: {a} against {b}; "
                    "embed both from the same source."
                )
        row = min(len(first), len(other))
        raise HymaError(
            f"The feature stores {first.path} ({len(first)} rows) and {other.path} ({len(other)} rows) part at row "
            f"{row}, where one of them ends; embed both from the same source."
        )


def _read_keys(path: Path, manifest: Manifest) -> tuple[str, ...]:
    try:
        keys = tuple(parse_json((path / KEYS_FILE).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise HymaError(f"The keys of the feature store {path} cannot be read ({error}); delete {path}.") from error
    plain = all(isinstance(key, str) for key in keys)
    if not plain or len(keys) != manifest.rows or hash_keys(keys) != manifest.keys_sha256:
        raise HymaError(f"{path / KEYS_FILE} does not hold the keys that were embedded; delete {path}.")
    return keys


def _verify_hashes(path: Path, manifest: Manifest) -> None:
    # The bar only appears when verifying takes longer than two seconds.
    for shard in tqdm(manifest.shards, desc=f"verifying {manifest.model}", unit="shard", leave=False, delay=2):
        file = path / shard.file
        if not is_file(file):
            raise HymaError(f"The shard {file} is missing; delete {path} to embed anew.")
        if hash_file(file) != shard.sha256:
            raise HymaError(f"The shard {file} is corrupted (its hash is not the manifest's); delete {path}.")


def _map_shard(path: Path, shard: Shard, manifest: Manifest) -> Tensor:
    """The memory-mapped tensor of one shard, [shard.rows, width]."""
    file = path / shard.file
    try:
        with safe_open(file, framework="pt") as handle:
            features: Tensor = handle.get_tensor(TENSOR_NAME)
    except (OSError, SafetensorError) as error:
        raise HymaError(f"The shard {file} cannot be read ({error}); delete {path} to embed anew.") from error
    wanted = (shard.rows, manifest.width)
    if tuple(features.shape) != wanted or features.dtype != STORED_DTYPES[manifest.dtype]:
        raise HymaError(
            f"The shard {file} holds {tuple(features.shape)} {features.dtype} where the manifest says {wanted} "
            f"{manifest.dtype}; delete {path}."
        )
    return features

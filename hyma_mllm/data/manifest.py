"""What a feature store says of itself, the names of its files, and what makes a feature fit to be stored."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import build, parse_json, reason

FeatureKind = Literal["image", "text", "tokens"]
DtypeName = Literal["fp32", "fp16", "bf16"]

FORMAT = 1
MANIFEST_FILE = "manifest.json"
KEYS_FILE = "keys.json"
LOCK_FILE = ".lock"
TENSOR_NAME = "features"
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STORED_DTYPES = DTYPES | {"fp8": torch.uint8, "int8": torch.uint8}
"""What shards may hold: plain features, or vision tokens as the bytes that `token_codes` makes of them."""

UNIT_TOLERANCE = 1e-2
"""How far a norm may stand from 1: bf16 storage moves it by up to 2^-8, a feature nobody normalised by far more."""


@dataclass(frozen=True)
class Shard:
    """One file of a store: its name in the directory, its rows, and the sha256 of its bytes in hex."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class StoreIdentity:
    """What is known of a store before its first row, and makes it another store when it differs.

    Attributes:
        model: id of the frozen model, e.g. `efficientnet-lite0`.
        revision: what pins its weights.
        kind: image features, text features, or vision tokens (flattened to one row a picture).
        rows: number of features.
        width: entries of one feature.
        dtype: stored as `fp32`, `fp16` or `bf16`; vision tokens also as `fp8` or `int8`.
        source: fingerprint of the rows that were embedded.
        unit_norm: True when every row claims an L2 norm of 1.
        keys_sha256: hash of the keys in order, see `hash_keys`.
        compute_dtype: precision of the forward pass, `fp32` or `bf16`; `imported` for a tensor from elsewhere.
    """

    model: str
    revision: str
    kind: FeatureKind
    rows: int
    width: int
    dtype: str
    source: str
    unit_norm: bool
    keys_sha256: str
    compute_dtype: str


@dataclass(frozen=True)
class Manifest(StoreIdentity):
    """What a store holds, and what it came from.

    Attributes:
        shards: the files, in row order.
        seconds: cost of embedding in process-seconds, summed over resumes; a pass that fed several stores is split
            evenly between them, so that the sum over stores counts it once.
        versions: version of each library that the features depend on.
    """

    shards: tuple[Shard, ...]
    seconds: float
    versions: dict[str, str]

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read `manifest.json`.

        Args:
            path: the file.

        Raises:
            HymaError: if the file is no manifest of this format.
        """
        try:
            found: dict[str, Any] = parse_json(path.read_bytes())
            if found.pop("format") != FORMAT:
                raise HymaError(f"{path} was written by another format of the feature store; delete {path.parent}.")
            shards = tuple(build(Shard, shard) for shard in found.pop("shards"))
            manifest = build(cls, {"shards": shards, **found})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise HymaError(
                f"{path} is not the manifest of a feature store ({reason(error)}); delete {path.parent}."
            ) from error
        # A shard lies in the store; another place is not ours to read.
        if outside := [shard.file for shard in shards if shard.file != Path(shard.file).name]:
            raise HymaError(f"{path} names a shard {outside[0]!r} outside {path.parent}; delete {path.parent}.")
        if manifest.dtype not in STORED_DTYPES or not shards:
            raise HymaError(f"{path} lists no shards, or a dtype {manifest.dtype!r} not of {', '.join(STORED_DTYPES)}.")
        return manifest


def hash_keys(keys: Sequence[str]) -> str:
    """The sha256, in hex, of the keys in order (of their JSON list, so that no separator can be mistaken)."""
    return hashlib.sha256(json.dumps(list(keys), ensure_ascii=False).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_values(features: Tensor, keys: Sequence[str], unit_norm: bool, where: str) -> None:
    """Refuse features that are not finite, or not of unit norm where that is claimed.

    Args:
        features: [rows, width]; codes of vision tokens, which are no floating numbers, are always good.
        keys: the key of each row.
        unit_norm: whether every row must have an L2 norm of 1 (within `UNIT_TOLERANCE`).
        where: the store or the model, for the message.

    Raises:
        HymaError: naming the first bad row by its key.
    """
    if not features.is_floating_point():
        return
    norms = torch.linalg.vector_norm(features, dim=1, dtype=torch.float32)
    # A finite norm means finite entries; an infinite one may only be the overflow of the sum of squares.
    for row in (~torch.isfinite(norms)).nonzero()[:, 0].tolist():
        if not torch.isfinite(features[row]).all():
            raise HymaError(f"The feature of {keys[row]} in {where} is not finite (NaN or infinite); remove that row.")
    if unit_norm and bool((bad := (norms - 1).abs() > UNIT_TOLERANCE).any()):
        row = int(bad.nonzero()[0, 0])
        raise HymaError(
            f"The feature of {keys[row]} in {where} has norm {norms[row].item():.4f} where unit norm is claimed; "
            "normalise the features or do not claim it."
        )

"""Small feature stores."""

from pathlib import Path

from hyma_mllm.data.manifest import hash_keys
from hyma_mllm.data.store_writer import StorePlan, StoreWriter


def toy_writer(
    path: Path, keys: list[str], width: int, shard_rows: int = 4, dtype: str = "fp32", unit_norm: bool = False
) -> StoreWriter:
    """Of a store that is still to begin."""
    plan = StorePlan(
        model="toy",
        revision="r1",
        kind="image",
        rows=len(keys),
        width=width,
        dtype=dtype,
        source="s1",
        unit_norm=unit_norm,
        keys_sha256=hash_keys(keys),
        compute_dtype="fp32",
        shard_rows=shard_rows,
    )
    return StoreWriter(path, plan, keys)

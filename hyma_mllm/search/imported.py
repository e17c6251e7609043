"""A search over imported features: the task without a picture, and what its ranking says of the encoders."""

import logging
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyma_mllm.data.collection import DataConfig
from hyma_mllm.data.features import FeatureStore, check_aligned
from hyma_mllm.data.sharded_rows import ShardedRows
from hyma_mllm.data.splits import split_by_key
from hyma_mllm.data.standardise import StandardiseConfig
from hyma_mllm.data.store_directory import open_stores, store_cards
from hyma_mllm.errors import HymaError
from hyma_mllm.paths import write_text
from hyma_mllm.search.prepare import Prepared, assemble
from hyma_mllm.zoo.cards import ModelCard

logger = logging.getLogger(__name__)

NOTE = (
    "Scores are retrieval on held-out rows of imported features. No concept, picture or caption is known: rows are "
    "split by their keys, nothing is classified, and what an encoder computes here need not equal its features."
)

FILE_REVISION = "sha256:"
"""How the revision of an imported store begins: it pins the file of features, not the weights that made them."""

CHUNK_ROWS = 8192
"""Rows compared at once while looking for equal captions, so that no second copy of the stores is ever held."""


def prepare_imported(
    stores: Path,
    vision: Sequence[ModelCard],
    text: Sequence[ModelCard],
    data: DataConfig,
    standardise: StandardiseConfig,
    device: str | torch.device = "cpu",
) -> Prepared:
    """Read the stores and build the task: caption k belongs to picture k, and nothing is classified.

    Args:
        stores: directory of the stores.
        vision: the N image encoders, from `store_cards`.
        text: the M text encoders, likewise.
        data: shares of the split, its seed, and the limit of rows.
        standardise: how features are standardised.
        device: where the features are wanted.

    Returns:
        What `prepare` returns, without rows: no picture and no word is known.

    Raises:
        HymaError: a store is damaged, rows differ, or a split is empty.
    """
    image_stores, text_stores = open_stores(stores, "image", vision), open_stores(stores, "text", text)
    check_aligned([*image_stores, *text_stores])
    keys = image_stores[0].keys[: data.limit or None]
    split = split_by_key(keys, data.split_seed, data.validation, data.test)
    logger.info("No concept of the %d imported rows is known: they are split by a hash of key and seed.", len(keys))
    return assemble(
        vision,
        text,
        images=_first_rows(image_stores, len(keys)),
        texts=_first_rows(text_stores, len(keys)),
        rows=[],
        split=split,
        first_caption=torch.arange(len(keys) + 1),
        caption_group=caption_groups(text_stores, len(keys)),
        standardise=standardise,
        device=torch.device(device),
    )


def _first_rows(stores: Sequence[FeatureStore], rows: int) -> list[ShardedRows]:
    """The first rows of each store; a control has its model's own object."""
    first = {id(store): store.rows.first(rows) for store in stores}
    return [first[id(store)] for store in stores]


def describe_imported(stores: Path, prepared: Prepared) -> dict[str, Any]:
    """What `ranking.json` says of the data, the sizes of the splits left out.

    Args:
        stores: directory of the stores.
        prepared: from `prepare_imported`.
    """
    name = f"imported features ({stores.name})"
    first = open_stores(stores, "image", store_cards(stores, "image")[:1], verify=False)[0]
    return {
        "note": NOTE,
        "attribution": [{"name": name, "licence": "that of the features", "origin": ""}],
        "fingerprints": {name: first.manifest.source},
        "rows": {name: len(prepared.task.images[0])},
    }


def caption_groups(stores: Sequence[FeatureStore], rows: int) -> Tensor:
    """[rows] int64: rows whose features are equal in every text store share a number, since they say the same.

    Args:
        stores: of all text encoders.
        rows: how many of their first rows.
    """
    numbers: dict[bytes, int] = {}
    found = []
    for start in range(0, rows, CHUNK_ROWS):
        chunks = [store[start : min(start + CHUNK_ROWS, rows)].contiguous().view(torch.uint8) for store in stores]
        for row in torch.cat(chunks, dim=1).numpy():
            found.append(numbers.setdefault(blake2b(row.data, digest_size=16).digest(), len(numbers)))
    return torch.tensor(found)


def hand_over_imported(run: Path, stitch: Callable[[], None]) -> None:
    """Write the best pair as a model if its encoders can be had, and say so if not; no picture is there to be shown.

    Args:
        run: the run directory.
        stitch: writes `best/` there, or raises HymaError.
    """
    try:
        stitch()
    except HymaError as error:
        logger.warning(
            "The best pair is not stitched: %s The connectors are in %s; `hyma export %s` will stitch when the "
            "encoders can be fetched.", error, run / "connectors", run,
        )  # fmt: skip
    write_text(run / "examples.json", "[]\n")

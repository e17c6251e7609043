"""Standardised features of a run: in memory when those of all models fit, else read from disk batch by batch."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch
from torch import Tensor, nn

from hyma_mllm.data.sharded_rows import ShardedRows
from hyma_mllm.data.standardise import FIT_ROWS, Power, Scale, Standardiser

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.5
"""Features are loaded when they take at most this share of the free memory; the rest is left for training."""

CHUNK_ROWS = 16384
"""Rows standardised at once while loading, so that no second copy of a model's features is ever held."""


class FeatureRows(Protocol):
    """Standardised features [rows, width] float32 of one model; a tensor is one."""

    def __len__(self) -> int:
        """Rows."""
        ...

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """The rows of these numbers (int64 [n]): [n, width] float32 on the training device."""
        ...


class MappedFeatures:
    """Features that stay raw and memory-mapped on disk, and are standardised as they are asked for.

    Args:
        raw: the stored rows.
        standardiser: fitted to them.
        device: where the rows are wanted.
    """

    def __init__(self, raw: ShardedRows, standardiser: Standardiser, device: torch.device) -> None:
        self._raw = raw
        self._standardiser = standardiser
        self._device = device

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Standardised rows [n, width] float32, the bits that the loaded form would have on this device."""
        return standardised(self._raw[rows], self._standardiser, self._device)


@dataclass(frozen=True)
class ModelFeatures:
    """What a search reads of one model.

    Attributes:
        rows: standardised features.
        standardiser: how they were standardised, fitted on the training rows.
        mean: mean L2-normalised raw feature [width] float32 of the training rows.
    """

    rows: FeatureRows
    standardiser: Standardiser
    mean: Tensor


def fit_memory(models: Iterable[ShardedRows], device: torch.device, max_bytes: int | None = None) -> bool:
    """Whether the standardised features of all models together may be loaded on `device`; the log says so.

    Args:
        models: raw rows of every model; one that is listed twice is loaded once.
        device: the training device.
        max_bytes: load up to this size; None allows half of what is free there, shared by the processes of a machine.
    """
    unique = {id(raw): raw for raw in models}.values()
    needed = sum(len(raw) * raw.width for raw in unique) * torch.float32.itemsize
    allowed = int(MEMORY_SHARE * free_memory(device)) if max_bytes is None else max_bytes
    size = f"The features of {len(unique)} models take {needed / 1e6:.1f} MB"
    if needed > allowed:
        logger.info(
            "%s, more than the %.1f MB to use on %s: they stay memory-mapped on disk and every batch is read and "
            "standardised anew.", size, allowed / 1e6, device,
        )  # fmt: skip
        return False
    logger.info("%s of the %.1f MB to use on %s: they are loaded there.", size, allowed / 1e6, device)
    return True


def free_memory(device: torch.device) -> int:
    """Bytes that this process may count on: of a GPU all that is free, of the system its share of the processes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def standardised_models(
    models: Sequence[ShardedRows],
    train: Tensor,
    device: torch.device,
    resident: bool,
    power: Power,
    centre: bool,
    unit: bool,
    scale: Scale = "one",
) -> list[ModelFeatures]:
    """Fit a standardiser to each model and apply it.

    Args:
        models: raw rows of every model; one that is listed twice is fitted and loaded once.
        train: [rows of the training split] int64.
        device: the training device.
        resident: from `fit_memory`; both forms give the same values.
        power: what each entry goes through after the L2 normalisation.
        centre: subtract the mean of the training rows.
        unit: L2-normalise at the end.
        scale: of all channels together, or of each.
    """
    made: dict[int, ModelFeatures] = {}
    for raw in models:
        if id(raw) not in made:
            standardiser, mean = _fit(raw, train, device, power, centre, unit, scale)
            rows: FeatureRows = (
                _loaded(raw, standardiser, device) if resident else MappedFeatures(raw, standardiser, device)
            )
            made[id(raw)] = ModelFeatures(rows, standardiser, mean)
    return [made[id(raw)] for raw in models]


def standardised(raw: Tensor, standardiser: Standardiser, device: torch.device) -> Tensor:
    """Raw rows [rows, width] of any dtype as standardised float32 rows on `device`."""
    found: Tensor = standardiser(raw.to(device, torch.float32))
    return found


def _fit(
    raw: ShardedRows, train: Tensor, device: torch.device, power: Power, centre: bool, unit: bool, scale: Scale
) -> tuple[Standardiser, Tensor]:
    """The standardiser and the mean L2-normalised feature of the training rows, in one pass over chunks of them."""
    mean = torch.zeros(raw.width, dtype=torch.float64, device=device)

    def chunks() -> Iterator[Tensor]:
        for rows in torch.split(train, FIT_ROWS):
            chunk = raw[rows].to(device, torch.float32)
            mean.add_(nn.functional.normalize(chunk, dim=1).mean(0).double() * (len(rows) / len(train)))
            yield chunk

    standardiser = Standardiser.fit(chunks(), power, centre, unit, scale)
    return standardiser, mean.float()


def _loaded(raw: ShardedRows, standardiser: Standardiser, device: torch.device) -> Tensor:
    """All rows, standardised, in the memory of `device`."""
    whole = torch.empty((len(raw), raw.width), device=device)
    for start in range(0, len(raw), CHUNK_ROWS):
        whole[start : start + CHUNK_ROWS] = standardised(raw[start : start + CHUNK_ROWS], standardiser, device)
    return whole

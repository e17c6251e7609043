"""Embedding a source into feature stores: each item once, one forward for every store that it feeds.

Notable: resumes at the shards that are missing; decoding overlaps with the forward pass; any number of processes share
the shards, those of one Accelerate launch and others that were started on the same cache, and take over what a killed
one leaves; one line tells how far they are together; NaN, a wrong width and a full disk are refused with nothing
half-written. Batches never cross a shard, so that the bytes do not depend on who computed what, and when.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from hyma_mllm.data.features import FeatureStore
from hyma_mllm.data.job_progress import JobProgress
from hyma_mllm.data.manifest import STORED_DTYPES, DtypeName, FeatureKind, check_values, hash_keys
from hyma_mllm.data.shared_shards import SharedShards, Taken
from hyma_mllm.data.store_writer import StorePlan, StoreWriter, check_free_space, check_keys
from hyma_mllm.data.threads import in_order
from hyma_mllm.errors import HymaError

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

PREFETCHED_BATCHES = 2
"""Batches that the decoding threads may be ahead of the forward pass."""

WAIT_SECONDS = 0.5
"""How often to look whether others are done with the last shards, or gone."""


@dataclass
class EmbeddingConfig:
    """How features are computed and stored.

    Attributes:
        batch_size: items of one forward pass.
        shard_rows: rows of one file; a kill loses at most the shard that is being filled.
        compute_dtype: precision of the forward pass, `fp32` or `bf16` (autocast).
        storage_dtype: precision on disk, `fp32`, `fp16` or `bf16`.
        workers: threads that read and decode ahead of the forward pass; 0 decodes between the passes.
    """

    batch_size: int = 32
    shard_rows: int = 1024
    compute_dtype: Literal["fp32", "bf16"] = "fp32"
    storage_dtype: DtypeName = "fp32"
    # Measured on two busy cores, items/s with 0, 1, 2, 4 threads: 512 px PNG 3.6, 6.8, 6.8, 5.8; 1024 px JPEG 2.5, 4.7,
    # 5.2, 4.5 (EfficientNet-Lite0 at 224 px).
    workers: int = 2


@dataclass(frozen=True)
class StoreTarget:
    """A store that is to be filled.

    Attributes:
        path: its directory.
        model: id of the model.
        revision: what pins the model's weights.
        kind: `image`, `text` or `tokens`.
        width: entries of one feature.
        unit_norm: True when the model's features have unit L2 norm (checked while writing).
    """

    path: Path
    model: str
    revision: str
    kind: FeatureKind
    width: int
    unit_norm: bool


def embed(
    keys: Sequence[str],
    load: Callable[[int], T],
    forward: Callable[[list[T]], Mapping[str, Tensor]],
    targets: Mapping[str, StoreTarget],
    source: str,
    config: EmbeddingConfig,
    label: str,
    accelerator: Accelerator | None = None,
) -> dict[str, FeatureStore]:
    """Embed items 0 to len(keys) - 1 in order into every target; what is there already is not computed again.

    Args:
        keys: the key of each item, unique.
        load: item number -> what `forward` takes, e.g. a decoded picture; called from threads when `config.workers`.
        forward: a list of loaded items -> target name -> features [items, width] on any device. It runs without
            gradients, and under bf16 autocast when the configuration says so. Names that are no target are ignored.
        targets: name -> store; all must be on a disk that every process sees.
        source: fingerprint of the items.
        config: batches, shards, precision, threads.
        label: what the progress bar says.
        accelerator: of a launch whose processes all make this call; None for a process by itself. Processes that know
            nothing of each other may make the same call at the same time, and share the work.

    Returns:
        target name -> the finished and verified store.

    Raises:
        HymaError: if the keys are empty or not unique, a target's directory holds another store or is locked by
            another run, the disk is full, or a feature is not finite, of the wrong width, or not of the claimed norm.
    """
    check_keys(keys, f"the source of {label}")
    if config.batch_size < 1 or config.shard_rows < 1 or config.workers < 0:
        raise HymaError("batch_size and shard_rows must be at least 1, and workers at least 0.")
    writers = {
        name: StoreWriter(target.path, _plan(target, keys, source, config), keys) for name, target in targets.items()
    }
    unfinished = _on_main(accelerator, lambda: _begin(writers))
    if unfinished:
        rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        device = accelerator.device.type if accelerator else "cuda" if torch.cuda.is_available() else "cpu"
        autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=config.compute_dtype == "bf16")
        left = {name: writers[name] for name in unfinished}
        with (
            SharedShards(left, start=rank / world) as shards,
            JobProgress(shards, len(keys), label, quiet=rank > 0) as progress,
            torch.inference_mode(),
            autocast,
        ):
            _embed_shards(shards, load, forward, left, config, progress)
        if accelerator:
            accelerator.wait_for_everyone()
        _on_main(accelerator, lambda: _finish(left.values()))
    return {name: FeatureStore.open(target.path) for name, target in targets.items()}


def _plan(target: StoreTarget, keys: Sequence[str], source: str, config: EmbeddingConfig) -> StorePlan:
    return StorePlan(
        model=target.model,
        revision=target.revision,
        kind=target.kind,
        rows=len(keys),
        width=target.width,
        dtype=config.storage_dtype,
        source=source,
        unit_norm=target.unit_norm,
        keys_sha256=hash_keys(keys),
        compute_dtype=config.compute_dtype,
        shard_rows=config.shard_rows,
    )


def _begin(writers: Mapping[str, StoreWriter]) -> list[str]:
    """Begin what is unfinished, or join those who have; the names of these targets."""
    needs = {}
    for name, writer in writers.items():
        if writer.is_finished() and writer.is_cleared():
            continue
        with writer.lock():
            if writer.is_finished():  # by whoever held the lock a moment ago, or was killed before it was cleared
                writer.clear_away()
                continue
            writer.start()
        missing = writer.missing()
        if len(missing) < writer.shards:
            logger.info("%s goes on with %d of %d shards left", writer.path, len(missing), writer.shards)
        needs[name] = (writer.path, writer.bytes_of(missing))
    check_free_space(list(needs.values()))
    return list(needs)


def _finish(writers: Iterable[StoreWriter]) -> None:
    for writer in writers:
        with writer.lock():
            if not writer.is_finished():
                writer.finish()


def _on_main(accelerator: Accelerator | None, work: Callable[[], R]) -> R:
    """Do `work` on the main process only; its result, or its HymaError, reaches every process."""
    if accelerator is None or accelerator.num_processes == 1:
        return work()
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [work(), None]
        except HymaError as error:
            outcome = [None, str(error)]
    broadcast_object_list(outcome)
    result, problem = outcome
    if problem is not None:
        raise HymaError(problem)
    return cast(R, result)


def _embed_shards(
    shards: SharedShards,
    load: Callable[[int], T],
    forward: Callable[[list[T]], Mapping[str, Tensor]],
    writers: Mapping[str, StoreWriter],
    config: EmbeddingConfig,
    progress: JobProgress,
) -> None:
    """Embed and write what can be had of the shards, until all are there."""
    while not shards.is_done():
        taken = deque[Taken]()
        items = _items(shards, taken)
        with closing(in_order(load, items, config.workers, PREFETCHED_BATCHES * config.batch_size)) as loaded:
            began = time.perf_counter()
            for first in loaded:
                shard = taken.popleft()
                pieces = _embed_shard(chain([first], loaded), shard, forward, writers, config, shards, progress)
                seconds = (time.perf_counter() - began) / len(pieces)
                for name, features in pieces.items():
                    writers[name].write(shard.shard, features, seconds)
                shards.release(shard)
                began = time.perf_counter()
        progress.look()
        if not shards.is_done():  # others have the rest
            time.sleep(WAIT_SECONDS)


def _items(shards: SharedShards, taken: deque[Taken]) -> Iterator[int]:
    """The items of one shard after another, each claimed when its first item is asked for and put behind `taken`."""
    while (shard := shards.take()) is not None:
        taken.append(shard)
        yield from shards.rows_of(shard.shard)


def _embed_shard(
    loaded: Iterator[T],
    shard: Taken,
    forward: Callable[[list[T]], Mapping[str, Tensor]],
    writers: Mapping[str, StoreWriter],
    config: EmbeddingConfig,
    shards: SharedShards,
    progress: JobProgress,
) -> dict[str, Tensor]:
    """The features [rows of the shard, width] of each store that lacks it, in the stored dtype."""
    rows = shards.rows_of(shard.shard)
    pieces: dict[str, list[Tensor]] = {name: [] for name in shard.stores}
    for at in range(0, len(rows), config.batch_size):
        batch = rows[at : at + config.batch_size]
        outputs = forward(list(islice(loaded, len(batch))))
        for name, found in pieces.items():
            found.append(_stored(outputs[name], batch, writers[name]))
        shards.note(shard, at + len(batch))
        progress.look()
    return {name: torch.cat(found) for name, found in pieces.items()}


def _stored(features: Tensor, batch: range, writer: StoreWriter) -> Tensor:
    """The features of one batch, checked, on the CPU in the stored dtype: [batch, width]."""
    plan = writer.plan
    wanted = (len(batch), plan.width)
    if tuple(features.shape) != wanted:
        raise HymaError(
            f"{plan.model} returned features of shape {tuple(features.shape)} where {wanted} was expected; its card "
            "must state the width that the model has."
        )
    exact = features.to("cpu", torch.float32)
    keys = writer.keys[batch.start : batch.stop]
    check_values(exact, keys, plan.unit_norm, plan.model)
    stored = exact.to(STORED_DTYPES[plan.dtype])
    overflown = ~torch.isfinite(stored).all(dim=1)
    if overflown.any():
        key = keys[int(overflown.nonzero()[0, 0])]
        raise HymaError(f"The feature of {key} by {plan.model} is too large for {plan.dtype}; store in bf16 or fp32.")
    return stored

"""Embedding a source into feature stores: each item once, one forward for every store that it feeds.

Notable: resumes at the first missing shard; decoding overlaps with the forward pass; shards are dealt to the processes
of an Accelerate launch; NaN, a wrong width and a full disk are refused with nothing half-written.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from hyma_mllm.data.features import FeatureStore
from hyma_mllm.data.manifest import DTYPES, DtypeName, FeatureKind, check_values, hash_keys
from hyma_mllm.data.store_writer import StorePlan, StoreWriter, check_free_space, check_keys
from hyma_mllm.data.threads import in_order
from hyma_mllm.errors import HymaError

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

PREFETCHED_BATCHES = 2
"""Batches that the decoding threads may be ahead of the forward pass."""

Todo = dict[int, list[str]]
"""Shard number -> the targets that lack it."""


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
        accelerator: deals the shards to its processes; None for a single process.

    Returns:
        target name -> the finished and verified store.

    Raises:
        HymaError: if the keys are empty or not unique, a target's directory holds another store or is being written by
            another run, the disk is full, or a feature is not finite, of the wrong width, or not of the claimed norm.
    """
    check_keys(keys, f"the source of {label}")
    if config.batch_size < 1 or config.shard_rows < 1 or config.workers < 0:
        raise HymaError("batch_size and shard_rows must be at least 1, and workers at least 0.")
    writers = {
        name: StoreWriter(target.path, _plan(target, keys, source, config), keys) for name, target in targets.items()
    }
    with ExitStack() as locks:
        todo, unfinished = _on_main(accelerator, lambda: _prepare(writers, locks))
        rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        device = accelerator.device.type if accelerator else "cuda" if torch.cuda.is_available() else "cpu"
        mine = {shard: todo[shard] for shard in sorted(todo)[rank::world]}
        autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=config.compute_dtype == "bf16")
        with torch.inference_mode(), autocast:
            _embed_shards(mine, load, forward, writers, config, label, quiet=rank > 0)
        if accelerator:
            accelerator.wait_for_everyone()
        _on_main(accelerator, lambda: _finish([writers[name] for name in unfinished]))
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


def _prepare(writers: Mapping[str, StoreWriter], locks: ExitStack) -> tuple[Todo, list[str]]:
    """Lock and begin what is unfinished; the shards to embed with the targets that lack them, and those targets."""
    todo: Todo = {}
    unfinished = []
    for name, writer in writers.items():
        if writer.is_finished():
            continue
        locks.enter_context(writer.lock())
        if writer.is_finished():  # by the run that held the lock a moment ago
            continue
        writer.start()
        unfinished.append(name)
        missing = writer.missing()
        if len(missing) < writer.shards:
            logger.info("%s goes on with %d of %d shards left", writer.path, len(missing), writer.shards)
        for shard in missing:
            todo.setdefault(shard, []).append(name)
    check_free_space(
        [
            (writers[name].path, writers[name].bytes_of([shard for shard, names in todo.items() if name in names]))
            for name in unfinished
        ]
    )
    return todo, unfinished


def _finish(writers: Iterable[StoreWriter]) -> None:
    for writer in writers:
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
    todo: Todo,
    load: Callable[[int], T],
    forward: Callable[[list[T]], Mapping[str, Tensor]],
    writers: Mapping[str, StoreWriter],
    config: EmbeddingConfig,
    label: str,
    quiet: bool,
) -> None:
    """Embed the shards of this process and write each as it is full."""
    if not todo:
        return
    rows_of = next(iter(writers.values())).rows_of  # the same for every target
    # Batches never cross a shard: a resumed run then forwards the same batches, and its bits agree.
    batches = {
        shard: [rows[at : at + config.batch_size] for at in range(0, len(rows), config.batch_size)]
        for shard, rows in ((shard, rows_of(shard)) for shard in todo)
    }
    ordered = [item for shard in todo for batch in batches[shard] for item in batch]
    with (
        closing(in_order(load, ordered, config.workers, PREFETCHED_BATCHES * config.batch_size)) as loaded,
        tqdm(total=len(ordered), desc=label, unit="item", disable=quiet) as bar,
    ):
        began = time.perf_counter()
        for shard, names in todo.items():
            pieces: dict[str, list[Tensor]] = {name: [] for name in names}
            for batch in batches[shard]:
                outputs = forward([next(loaded) for _ in batch])
                for name in names:
                    pieces[name].append(_stored(outputs[name], batch, writers[name]))
                bar.update(len(batch))
            seconds = (time.perf_counter() - began) / len(names)
            for name in names:
                writers[name].write(shard, torch.cat(pieces[name]), seconds)
            began = time.perf_counter()


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
    stored = exact.to(DTYPES[plan.dtype])
    overflown = ~torch.isfinite(stored).all(dim=1)
    if overflown.any():
        key = keys[int(overflown.nonzero()[0, 0])]
        raise HymaError(f"The feature of {key} by {plan.model} is too large for {plan.dtype}; store in bf16 or fp32.")
    return stored

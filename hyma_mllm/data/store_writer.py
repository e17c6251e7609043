"""Writing a feature store shard by shard, so that a kill, a full disk or other runs leave nothing half-written.

While it is unfinished a store holds `plan.json` (what it will be) and, beside each shard, a record
`shard-00000.json` (its hash and its cost). Shard and record are each written in one step, the record last; the manifest
is made from the records, and then plan and records go.

Any number of processes may fill one store: what changes it (start, the commit of a shard, finish) happens under its
lock, each shard is committed once, and later ones of the same shard are thrown away. `claims.py` divides the work.
"""

import errno
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import safetensors.torch
from filelock import FileLock, Timeout
from torch import Tensor

from hyma_mllm.data.manifest import (
    KEYS_FILE,
    LOCK_FILE,
    MANIFEST_FILE,
    STORED_DTYPES,
    TENSOR_NAME,
    Manifest,
    Shard,
    StoreIdentity,
    hash_file,
)
from hyma_mllm.errors import HymaError
from hyma_mllm.paths import write_text

logger = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
LOCK_SECONDS = 120.0
"""How long to wait for a store's lock. It is held for moments, but by an import for as long as that takes."""

VERSIONED = ("torch", "torchvision", "transformers", "timm", "sentence-transformers", "accelerate", "safetensors")


@dataclass(frozen=True)
class StorePlan(StoreIdentity):
    """What a store will be, and how many rows each of its shards has."""

    shard_rows: int


class StoreWriter:
    """Fills one store. `start` (under `lock`), then `write` what is `missing`, then `finish` (under `lock`).

    Attributes:
        path: the directory of the store.
        plan: what it will be.
        keys: its row keys.
    """

    def __init__(self, path: Path, plan: StorePlan, keys: Sequence[str]) -> None:
        self.path = path
        self.plan = plan
        self.keys = keys
        # One object, so that who holds the lock may take it again.
        self._lock = FileLock(path / LOCK_FILE)

    @property
    def shards(self) -> int:
        """How many shards the finished store has."""
        return math.ceil(self.plan.rows / self.plan.shard_rows)

    def rows_of(self, shard: int) -> range:
        """The rows of one shard."""
        first = shard * self.plan.shard_rows
        return range(first, min(first + self.plan.shard_rows, self.plan.rows))

    def bytes_of(self, shards: Sequence[int]) -> int:
        """Bytes of disk that the features of these shards take."""
        entry = STORED_DTYPES[self.plan.dtype].itemsize
        return sum(len(self.rows_of(shard)) for shard in shards) * self.plan.width * entry

    def is_finished(self) -> bool:
        """True when the finished store of this plan is there already.

        Raises:
            HymaError: if a finished store of something else is there.
        """
        if not (self.path / MANIFEST_FILE).is_file():
            return False
        self._refuse_difference(asdict(Manifest.read(self.path / MANIFEST_FILE)))
        return True

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store for this thread, which may hold it already.

        Raises:
            HymaError: if another process held it for all of `LOCK_SECONDS`.
        """
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=LOCK_SECONDS)
            except Timeout as error:
                raise HymaError(
                    f"The feature store {self.path} is being written by another run; wait for it or end it."
                ) from error
        try:
            yield
        finally:
            self._lock.release()

    def start(self) -> None:
        """Begin the store, or take up one of the same plan where it was left; others may be filling it.

        Raises:
            HymaError: if an unfinished store of another plan is there, or the disk is full.
        """
        plan_file = self.path / PLAN_FILE
        if plan_file.is_file():
            try:
                found = json.loads(plan_file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise HymaError(f"{plan_file} is damaged ({error}); delete {self.path}.") from error
            self._refuse_difference(found)
        with disk_errors(self.path):
            write_text(self.path / KEYS_FILE, json.dumps(list(self.keys), ensure_ascii=False))
            write_text(plan_file, json.dumps(asdict(self.plan), indent=2) + "\n")

    def undone(self) -> list[int]:
        """The shards without a record, by the names of the files alone; none of a finished store."""
        names = {file.name for file in self.path.iterdir()}
        undone = [shard for shard in range(self.shards) if self._record(shard).name not in names]
        # Looked for after the records: they go as soon as it is written.
        return [] if not undone or (self.path / MANIFEST_FILE).is_file() else undone

    def is_done(self, shard: int) -> bool:
        """Whether a shard is committed."""
        return self._record(shard).is_file() or (self.path / MANIFEST_FILE).is_file()

    def missing(self) -> list[int]:
        """The shards that are still to be written; one whose bytes do not match its record counts as missing."""
        undone = set(self.undone())
        damaged = [shard for shard in range(self.shards) if shard not in undone and not self._is_whole(shard)]
        with self.lock():
            if (self.path / MANIFEST_FILE).is_file():  # others finished it, records and all
                return []
            for shard in damaged:
                logger.warning("%s is damaged and will be written again", self._file(shard))
                self._record(shard).unlink(missing_ok=True)
        return sorted(undone.union(damaged))

    def write(self, shard: int, features: Tensor, seconds: float) -> None:
        """Write one shard, unless it is there already: then these features are thrown away.

        Args:
            shard: its number.
            features: [rows of the shard, width] on the CPU, in the stored dtype.
            seconds: what it cost to compute.

        Raises:
            HymaError: if the disk is full or may not be written.
            ValueError: if the features are not the rows of this shard.
        """
        wanted = (len(self.rows_of(shard)), self.plan.width)
        if tuple(features.shape) != wanted or features.dtype != STORED_DTYPES[self.plan.dtype]:
            raise ValueError(f"shard {shard} is {tuple(features.shape)} {features.dtype}, not {wanted}")
        content = safetensors.torch.save({TENSOR_NAME: features.contiguous()})
        sha256 = hashlib.sha256(content).hexdigest()
        record = {"file": self._file(shard).name, "rows": wanted[0], "sha256": sha256, "seconds": seconds}
        # Not by process number, as other temporary files: processes of two machines may share one.
        temporary = self.path / f".{self._file(shard).name}.{uuid4().hex}.tmp"
        with disk_errors(self.path):
            try:
                with temporary.open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                with self.lock():
                    # A process that slept while others took over its shard must not touch a finished store.
                    if not self.is_done(shard):
                        temporary.replace(self._file(shard))
                        write_text(self._record(shard), json.dumps(record) + "\n")
            finally:
                temporary.unlink(missing_ok=True)

    def finish(self) -> None:
        """Write the manifest from the records of all shards, and drop plan, records and what killed processes left.

        Raises:
            HymaError: if a shard is missing, or the disk is full.
        """
        records = [self._record(shard) for shard in range(self.shards)]
        absent = [record.stem for record in records if not record.is_file()]
        if absent:
            raise HymaError(f"The feature store {self.path} still lacks {absent[0]}; rerun to go on.")
        found = [json.loads(record.read_text(encoding="utf-8")) for record in records]
        seconds = sum(shard.pop("seconds") for shard in found)
        identity = asdict(self.plan)
        identity.pop("shard_rows")
        manifest = Manifest(
            **identity, shards=tuple(Shard(**shard) for shard in found), seconds=seconds, versions=library_versions()
        )
        with disk_errors(self.path):
            write_text(self.path / MANIFEST_FILE, manifest.to_json())
        self.clear_away()

    def clear_away(self) -> None:
        """Drop what only an unfinished store needs, the plan last: where it still is, a kill cut this short."""
        records = (self._record(shard) for shard in range(self.shards))
        left = (*records, *self.path.glob(".*.tmp"), *self.path.glob(".*.claim"), self.path / PLAN_FILE)
        for file in left:
            file.unlink(missing_ok=True)

    def is_cleared(self) -> bool:
        """Whether a finished store holds nothing else."""
        return not (self.path / PLAN_FILE).exists()

    def _is_whole(self, shard: int) -> bool:
        """Whether the file of a shard has the hash of its record."""
        try:
            recorded = json.loads(self._record(shard).read_text(encoding="utf-8"))["sha256"]
            return bool(hash_file(self._file(shard)) == recorded)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False

    def _file(self, shard: int) -> Path:
        return self.path / f"shard-{shard:05d}.safetensors"

    def _record(self, shard: int) -> Path:
        return self.path / f"shard-{shard:05d}.json"

    def _refuse_difference(self, found: dict[str, object]) -> None:
        """Raise if what is there differs from the plan, in the words of the first field that does."""
        for name, wanted in asdict(self.plan).items():
            if name in found and found[name] != wanted:
                raise HymaError(
                    f"{self.path} holds a feature store of {found.get('model')} with {name} {found[name]}, but {name} "
                    f"{wanted} of {self.plan.model} is asked for; delete {self.path}, or use another directory."
                )


def check_keys(keys: Sequence[str], where: str) -> None:
    """Refuse an empty list of keys, or one that names a row twice.

    Args:
        keys: the row keys in order.
        where: what they are the rows of, for the message.

    Raises:
        HymaError: naming the key that stands twice.
    """
    if not keys:
        raise HymaError(f"{where} has no rows to embed; check the source of the rows.")
    if len(set(keys)) < len(keys):
        seen: set[str] = set()
        for row, key in enumerate(keys):
            if key in seen:
                raise HymaError(f"The key {key} stands twice in {where} (again at row {row}); make keys unique.")
            seen.add(key)


def check_free_space(needs: Sequence[tuple[Path, int]]) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        needs: existing directories, and the bytes that each will take.

    Raises:
        HymaError: naming a directory of the disk that is too full, with bytes needed and free.
    """
    disks: dict[int, tuple[Path, int]] = {}
    for path, needed in needs:
        device = path.stat().st_dev
        disks[device] = (path, disks.get(device, (path, 0))[1] + needed)
    for path, needed in disks.values():
        free = shutil.disk_usage(path).free
        if free < needed:
            raise HymaError(
                f"The disk of {path} has {free / 1e6:.1f} MB free and the features need {needed / 1e6:.1f} MB; free "
                "some space, store in fp16, or set HYMA_CACHE to another disk."
            )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into a sentence.

    Raises:
        HymaError: in place of the OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HymaError(
                f"The disk of {path} is full; free some space and rerun: finished shards are kept."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise HymaError(f"{path} cannot be written ({error.strerror}); choose another directory.") from error
        raise


def library_versions() -> dict[str, str]:
    """The installed version of Python and of each library that features depend on."""
    versions = {"python": platform.python_version()}
    for name in ("hyma_mllm", *VERSIONED):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions

"""Writing a feature store shard by shard, so that a kill, a full disk or a second run leaves nothing half-written.

While it is unfinished a store holds `plan.json` (what it will be) and, beside each shard, a record
`shard-00000.json` (its hash and its cost). Shard and record are each written in one step, the record last; the manifest
is made from the records, and then plan and records go.
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

import safetensors.torch
from filelock import FileLock, Timeout
from torch import Tensor

from hyma_mllm.data.manifest import (
    DTYPES,
    KEYS_FILE,
    LOCK_FILE,
    MANIFEST_FILE,
    TENSOR_NAME,
    Manifest,
    Shard,
    StoreIdentity,
    hash_file,
)
from hyma_mllm.errors import HymaError
from hyma_mllm.paths import atomic_path, write_text

logger = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
VERSIONED = ("torch", "torchvision", "transformers", "timm", "sentence-transformers", "accelerate", "safetensors")


@dataclass(frozen=True)
class StorePlan(StoreIdentity):
    """What a store will be, and how many rows each of its shards has."""

    shard_rows: int


class StoreWriter:
    """Fills one store. `start` (under `lock`), then `write` each of `missing`, then `finish`.

    Attributes:
        path: the directory of the store.
        plan: what it will be.
        keys: its row keys.
    """

    def __init__(self, path: Path, plan: StorePlan, keys: Sequence[str]) -> None:
        self.path = path
        self.plan = plan
        self.keys = keys

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
        return sum(len(self.rows_of(shard)) for shard in shards) * self.plan.width * DTYPES[self.plan.dtype].itemsize

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
        """Hold the store for this process.

        Raises:
            HymaError: if another live run holds it.
        """
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK_FILE, timeout=0)
            try:
                lock.acquire()
            except Timeout as error:
                raise HymaError(
                    f"The feature store {self.path} is being written by another run; wait for it or end it."
                ) from error
        try:
            yield
        finally:
            lock.release()

    def start(self) -> None:
        """Begin the store, or take up one of the same plan where it was left.

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
        for left in self.path.glob(".*.tmp"):
            left.unlink()
        with disk_errors(self.path):
            write_text(self.path / KEYS_FILE, json.dumps(list(self.keys), ensure_ascii=False))
            write_text(plan_file, json.dumps(asdict(self.plan), indent=2) + "\n")

    def missing(self) -> list[int]:
        """The shards that are still to be written; one whose bytes do not match its record counts as missing."""
        missing = []
        for shard in range(self.shards):
            record = self._record(shard)
            file = self._file(shard)
            if record.is_file():
                if file.is_file() and hash_file(file) == json.loads(record.read_text(encoding="utf-8"))["sha256"]:
                    continue
                logger.warning("%s is damaged and will be written again", file)
                record.unlink()
            missing.append(shard)
        return missing

    def write(self, shard: int, features: Tensor, seconds: float) -> None:
        """Write one shard.

        Args:
            shard: its number.
            features: [rows of the shard, width] on the CPU, in the stored dtype.
            seconds: what it cost to compute.

        Raises:
            HymaError: if the disk is full or may not be written.
            ValueError: if the features are not the rows of this shard.
        """
        wanted = (len(self.rows_of(shard)), self.plan.width)
        if tuple(features.shape) != wanted or features.dtype != DTYPES[self.plan.dtype]:
            raise ValueError(f"shard {shard} is {tuple(features.shape)} {features.dtype}, not {wanted}")
        content = safetensors.torch.save({TENSOR_NAME: features.contiguous()})
        sha256 = hashlib.sha256(content).hexdigest()
        with disk_errors(self.path):
            with atomic_path(self._file(shard)) as temporary, temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            record = {"file": self._file(shard).name, "rows": wanted[0], "sha256": sha256, "seconds": seconds}
            write_text(self._record(shard), json.dumps(record) + "\n")

    def finish(self) -> None:
        """Write the manifest from the records of all shards, and drop plan and records.

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
        for file in (*records, self.path / PLAN_FILE):
            file.unlink()

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

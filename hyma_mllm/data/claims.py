"""Claims on the shards of a store: small files that say which process works on what.

They let processes that know nothing of each other, on one machine or on several with a shared disk, divide the work. A
claim only saves double work and is never what makes a store right: `StoreWriter.write` commits each shard once, whoever
computed it. So a claim may be taken over whenever its owner seems gone.
"""

import json
import os
import platform
import threading
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from uuid import uuid4

import psutil

BEAT_SECONDS = 5.0
"""How often a living owner renews its claims."""

PATIENCE_SECONDS = 60.0
"""A claim that was not renewed for this long, watched by our own clock, is abandoned: other machines' clocks differ."""

CLAIM_BYTES = 512
"""Of every claim, so that renewing one overwrites it in one write."""

SAME_START_SECONDS = 2.0
"""How far two readings of one process's start may lie apart; another process of its number starts later than that."""


@dataclass(frozen=True)
class Owner:
    """Who holds a claim, and how far it is.

    Attributes:
        token: unique to one `Claims` of one process.
        machine: host, boot and process namespace, so that `pid` is only looked up where it means something.
        pid: process number.
        started: when that process started, seconds since 1970.
        rows: rows of the shard that are computed.
        beat: how often the claim was renewed.
    """

    token: str
    machine: str
    pid: int
    started: float
    rows: int = 0
    beat: int = 0

    @classmethod
    def myself(cls) -> "Owner":
        """This process, with a new token."""
        return cls(uuid4().hex, this_machine(), os.getpid(), psutil.Process().create_time())

    def is_dead(self) -> bool:
        """True when its process is known to be gone; never for one of another machine."""
        if self.machine != this_machine():
            return False
        try:
            process = psutil.Process(self.pid)
            zombie = process.status() == psutil.STATUS_ZOMBIE
            return zombie or abs(process.create_time() - self.started) > SAME_START_SECONDS
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


@lru_cache(maxsize=1)
def this_machine() -> str:
    """A name that two processes share only if they see each other's process numbers."""
    name = platform.node()[: CLAIM_BYTES // 4]
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{name}/{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux, where there are no namespaces either
        return name


class Claims:
    """The claims of this process on the shards of one store, and its view of the others'.

    As a context manager it renews what it holds every `BEAT_SECONDS` from a thread, and gives everything back at the
    end. Files that cannot be renewed (a disk that is gone for a while) are left to whoever takes them over.

    Args:
        folder: the directory of the store, which must exist.
        patience: seconds without a renewal after which another's claim is abandoned; None takes `PATIENCE_SECONDS`.

    Attributes:
        owner: this process.
    """

    def __init__(self, folder: Path, patience: float | None = None) -> None:
        self.owner = Owner.myself()
        self._folder = folder
        self._patience = PATIENCE_SECONDS if patience is None else patience
        self._held: dict[int, tuple[int, Owner]] = {}
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._changing = threading.Lock()
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat_on, name="claims", daemon=True)

    def __enter__(self) -> "Claims":
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._heart.join()
        for shard in list(self._held):
            self.release(shard)

    def take(self, shard: int) -> bool:
        """Claim a shard; False if another has it.

        Raises:
            OSError: the disk is full or may not be written.
        """
        try:
            descriptor = os.open(self._file(shard), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with self._changing:
            self._held[shard] = (descriptor, self.owner)
        os.pwrite(descriptor, _encoded(self.owner), 0)
        return True

    def note(self, shard: int, rows: int) -> None:
        """Say how many rows of a held shard are computed; others read it with the next beat."""
        with self._changing:
            descriptor, owner = self._held[shard]
            self._held[shard] = (descriptor, replace(owner, rows=rows))

    def release(self, shard: int) -> None:
        """Give a held shard back; one that was taken over stays with the new owner."""
        with self._changing:
            descriptor, _ = self._held.pop(shard)
        try:
            if os.fstat(descriptor).st_ino == self._file(shard).stat().st_ino:
                self._file(shard).unlink()
        except OSError:
            pass  # taken over, or cleared away with the finished store
        finally:
            os.close(descriptor)

    def holds(self, shard: int) -> bool:
        """Whether this process has claimed the shard."""
        return shard in self._held

    def claimed(self) -> dict[int, Owner | None]:
        """Shard -> its owner, of all claims that are there; None where a claim cannot be read just now."""
        found: dict[int, Owner | None] = {}
        for shard in claimed_shards(self._folder):
            mine = self._held.get(shard)
            if mine is not None:
                found[shard] = mine[1]
            elif (content := self._content(shard)) is not None:
                found[shard] = _decoded(content)
        return found

    def abandoned(self, shard: int) -> bool:
        """Whether another's claim is there whose owner is dead, or was not seen to renew it for the patience."""
        content = None if shard in self._held else self._content(shard)
        if content is None:
            return False
        now = time.monotonic()
        before, since = self._seen.get(shard, (None, now))
        if before != content:
            since = now
            self._seen[shard] = (content, now)
        owner = _decoded(content)
        return (owner is not None and owner.is_dead()) or now - since >= self._patience

    def clear(self, shard: int) -> None:
        """Remove another's claim; hold the store's lock from `abandoned` on, or two processes clear and take."""
        self._file(shard).unlink(missing_ok=True)
        self._seen.pop(shard, None)

    def beat(self) -> None:
        """Renew all held claims."""
        with self._changing:
            for shard, (descriptor, owner) in list(self._held.items()):
                renewed = replace(owner, beat=owner.beat + 1)
                self._held[shard] = (descriptor, renewed)
                try:
                    # Through the descriptor: after a takeover this is no longer the file of that name.
                    os.pwrite(descriptor, _encoded(renewed), 0)
                    os.fsync(descriptor)
                except OSError:
                    continue

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self.beat()

    def _file(self, shard: int) -> Path:
        return self._folder / claim_name(shard)

    def _content(self, shard: int) -> bytes | None:
        try:
            return self._file(shard).read_bytes()
        except OSError:
            return None


def claim_name(shard: int) -> str:
    """Name of the claim's file in the directory of the store."""
    return f".shard-{shard:05d}.claim"


def claimed_shards(folder: Path) -> set[int]:
    """The shards that anybody claims."""
    prefix, suffix = claim_name(0).split("00000")
    names = (file.name for file in folder.iterdir())
    numbers = (name[len(prefix) : -len(suffix)] for name in names if name.startswith(prefix) and name.endswith(suffix))
    return {int(number) for number in numbers if number.isdecimal()}


def _encoded(owner: Owner) -> bytes:
    return json.dumps(asdict(owner)).encode().ljust(CLAIM_BYTES - 1) + b"\n"


def _decoded(content: bytes) -> Owner | None:
    """None for a claim that was only just created, or is damaged."""
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError):
        return None

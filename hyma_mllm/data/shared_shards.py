"""The shards that some stores lack, dealt out one at a time to any number of processes.

There is no master: each process takes what nobody has, then what the dead have left, and waits for the rest.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

from hyma_mllm.data.claims import Claims
from hyma_mllm.data.store_writer import StoreWriter, disk_errors


@dataclass(frozen=True)
class Taken:
    """A shard to compute, and the stores that lack it and that nobody else fills."""

    shard: int
    stores: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """How far all processes together are.

    Attributes:
        rows: that every store has, or that are computed by a process which is still at their shard.
        processes: that hold shards now, on all machines.
    """

    rows: int
    processes: int


class SharedShards:
    """What several stores of the same rows lack. Use it as a context manager, which renews the claims of this process.

    Args:
        writers: name -> store that was begun; all with the same rows and shards.
        start: share of the way, in [0, 1), at which this process looks for its first shard; processes that differ get
            shards that lie together, and read the same parts of large files.
    """

    def __init__(self, writers: Mapping[str, StoreWriter], start: float = 0.0) -> None:
        self._writers = dict(writers)
        self._any = next(iter(writers.values()))
        self._first = int(start * self._any.shards)
        self._claims = {name: Claims(writer.path) for name, writer in writers.items()}
        self._opened = ExitStack()

    def __enter__(self) -> "SharedShards":
        with ExitStack() as entering:
            for claims in self._claims.values():
                entering.enter_context(claims)
            self._opened = entering.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def rows_of(self, shard: int) -> range:
        """The rows of one shard."""
        return self._any.rows_of(shard)

    def take(self) -> Taken | None:
        """Claim a shard that nobody works on; None when there is none just now.

        Raises:
            HymaError: the disk is full or may not be written.
        """
        undone = {name: set(writer.undone()) for name, writer in self._writers.items()}
        others = {name: set(claims.claimed()) for name, claims in self._claims.items()}
        for shard in self._in_turn(undone.values()):
            free = [name for name in undone if shard in undone[name] - others[name]]
            if free and (taken := self._claimed(shard, free)):
                return taken
        for shard in self._in_turn(undone.values()):
            left = [name for name in undone if shard in undone[name] and self._claims[name].abandoned(shard)]
            if left and (taken := self._claimed(shard, [name for name in left if self._cleared(name, shard)])):
                return taken
        return None

    def note(self, taken: Taken, rows: int) -> None:
        """Say how many rows of a taken shard are computed."""
        for name in taken.stores:
            self._claims[name].note(taken.shard, rows)

    def release(self, taken: Taken) -> None:
        """Give a shard back, once it is written."""
        for name in taken.stores:
            self._claims[name].release(taken.shard)

    def is_done(self) -> bool:
        """Whether every store has all of its shards, by whomever they were computed."""
        return not any(writer.undone() for writer in self._writers.values())

    def progress(self) -> Progress:
        """How far all processes together are, by the files that they keep."""
        done = {shard: len(self.rows_of(shard)) for shard in range(self._any.shards)}
        owners = set[str]()
        for name, writer in self._writers.items():
            claims = self._claims[name].claimed()
            for shard in writer.undone():
                owner = claims.get(shard)
                done[shard] = min(done[shard], owner.rows if owner else 0)
                # A process has a token for each store; its number is the same.
                owners.update([f"{owner.machine} {owner.pid}"] if owner else [])
        return Progress(sum(done.values()), len(owners))

    def _in_turn(self, undone: Iterable[set[int]]) -> list[int]:
        """Shards that any store lacks, from where this process starts, around."""
        shards = sorted(set().union(*undone))
        return [shard for shard in shards if shard >= self._first] + [shard for shard in shards if shard < self._first]

    def _claimed(self, shard: int, names: Iterable[str]) -> Taken | None:
        """Claim a shard in as many of these stores as can be had."""
        got = []
        for name in names:
            with disk_errors(self._writers[name].path):
                if not self._claims[name].take(shard):
                    continue
            # It may have been written and given back since the stores were listed.
            if self._writers[name].is_done(shard):
                self._claims[name].release(shard)
            else:
                got.append(name)
        return Taken(shard, tuple(got)) if got else None

    def _cleared(self, name: str, shard: int) -> bool:
        """Remove what the dead claim, unless another process was faster."""
        with self._writers[name].lock():
            if not self._claims[name].abandoned(shard):
                return False
            self._claims[name].clear(shard)
            return True

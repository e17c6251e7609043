"""One line that says how far a job of several processes is."""

import time
from types import TracebackType

from tqdm import tqdm

from hyma_mllm.data.shared_shards import SharedShards

LOOK_SECONDS = 1.0
"""Least time between two looks at the files of all processes."""


class JobProgress:
    """Rows done by all processes, rows per second and time left, on one line; use it as a context manager.

    Args:
        shards: the job.
        rows: of all of it.
        label: what the line begins with.
        quiet: show nothing, and read nothing.
    """

    def __init__(self, shards: SharedShards, rows: int, label: str, quiet: bool) -> None:
        self._shards = shards
        self._quiet = quiet
        done = 0 if quiet else shards.progress().rows
        # Rows of earlier runs count as done, but not into the speed.
        self._bar = tqdm(total=rows, initial=done, desc=label, unit="row", disable=quiet)
        self._looked = time.monotonic()

    def __enter__(self) -> "JobProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.look(now=True)
        self._bar.close()

    def look(self, now: bool = False) -> None:
        """Bring the line up to date, at most once a second unless it must be `now`."""
        if self._quiet or (not now and time.monotonic() - self._looked < LOOK_SECONDS):
            return
        self._looked = time.monotonic()
        found = self._shards.progress()
        if found.processes > 1:
            self._bar.set_postfix_str(f"{found.processes} processes", refresh=False)
        # Set, not updated: rows of a killed process are lost, and the speed of a step back would be negative.
        self._bar.n = found.rows
        self._bar.initial = min(self._bar.initial, found.rows)
        self._bar.refresh()

"""SIGKILL at random moments of a run, and the same command again: the files must be those of a run in peace.

A moment is drawn from the changes of files that an uninterrupted run makes, one in each phase: in every second the run
is stopped just before the change, in the others some time after it, wherever it is by then.
"""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = [pytest.mark.kill, pytest.mark.zoo, pytest.mark.slow, pytest.mark.timeout(1500)]

KILLS = 20
"""Of each recipe."""


@pytest.fixture(scope="module")
def peace(kills: ModuleType, server: Any, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An uninterrupted run."""
    run = kills.Run(server, world, tmp_path_factory.mktemp("peace"))
    run.finish(trace=True)
    yield run
    run.remove()


@pytest.fixture(scope="module")
def torn(
    kills: ModuleType, server: Any, world: Any, peace: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Any]]:
    """Runs that were torn apart again and again, each finished in the end."""
    found: list[Any] = []
    while sum(len(run.struck) for run in found) < KILLS:
        run = kills.Run(server, world, tmp_path_factory.mktemp("torn"))
        for moment in kills.moments(peace.trace, len(found)):
            run.strike(moment)
        assert run.struck, "no kill of a whole run came in time"
        run.finish()
        found.append(run)
    yield found
    for run in found:
        run.remove()


def test_every_phase_was_hit(kills: ModuleType, torn: list[Any]) -> None:
    hits = Counter(phase for run in torn for phase in run.struck)
    assert sum(hits.values()) >= KILLS and min(hits[phase] for phase in kills.phases.PHASES) >= 2, hits


def test_the_ranking_is_the_same_to_the_bit(peace: Any, torn: list[Any]) -> None:
    wanted = (peace.path / "ranking.json").read_bytes()
    for run in torn:
        assert (run.path / "ranking.json").read_bytes() == wanted, run.struck


def test_so_is_every_other_file_and_none_is_left_over(kills: ModuleType, peace: Any, torn: list[Any]) -> None:
    """Connectors, the exported model, the bill but for its seconds and bytes, the features; nothing half-written."""
    for area in ("path", "features"):
        wanted = kills.files.contents(getattr(peace, area))
        assert len(wanted) > 10
        for run in torn:
            assert kills.files.differences(wanted, kills.files.contents(getattr(run, area))) == {}, run.struck


def test_nothing_is_left_to_do_behind_the_last_file_of_a_finished_run(peace: Any) -> None:
    """A run that is killed once all files are there counts as finished, and is not tidied again."""
    changes = [line.split(" ", 2)[2] for line in peace.trace.read_text().splitlines()]
    last = max(at for at, path in enumerate(changes) if "/.ranking.png." in path)
    behind = changes[last + 1 :]
    assert behind and all("/.report.html." in path for path in behind), behind


def test_a_live_run_keeps_its_directory_to_itself(
    kills: ModuleType, server: Any, peace: Any, world: Any, tmp_path: Path
) -> None:
    one, other = (kills.Run(server, world, tmp_path) for _ in range(2))
    [holder] = one.start(kills.Moment("training", 3))
    while not one.marker.exists():
        assert server.poll(holder) is None, one.said()
        time.sleep(0.01)
    before = kills.files.contents(one.path)
    one.output.unlink()
    assert other.wait(other.start()) == [2]
    said = one.said().strip().splitlines()[-1]
    assert said == (
        f"error: The run directory {one.path} is in use by a live run; wait for it, stop it, or set --run to another."
    )
    assert kills.files.differences(before, kills.files.contents(one.path)) == {}
    os.killpg(holder, signal.SIGKILL)
    one.wait([holder])
    one.finish()
    assert (one.path / "ranking.json").read_bytes() == (peace.path / "ranking.json").read_bytes()
    assert json.loads((one.path / "ledger.json").read_text())["ledgers"]

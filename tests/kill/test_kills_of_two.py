"""SIGKILL of one of two processes, or of both, and the same command again."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = [pytest.mark.kill, pytest.mark.distributed, pytest.mark.zoo, pytest.mark.slow, pytest.mark.timeout(1500)]

VICTIMS = ("group", "0", "1")
SEQUENCES = 2
"""Of each recipe."""


@pytest.fixture(scope="module")
def peace(kills: ModuleType, server: Any, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An uninterrupted run of two processes."""
    run = kills.Run(server, world, tmp_path_factory.mktemp("peace"), processes=2)
    run.finish(trace=True)
    yield run
    run.remove()


@pytest.fixture(scope="module")
def alone(kills: ModuleType, server: Any, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An uninterrupted run of one process."""
    run = kills.Run(server, world, tmp_path_factory.mktemp("alone"))
    run.finish()
    yield run
    run.remove()


@pytest.fixture(scope="module")
def torn(
    kills: ModuleType, server: Any, world: Any, peace: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Any]]:
    """Runs of two processes that were torn apart again and again, each finished in the end."""
    found = []
    for number in range(SEQUENCES):
        run = kills.Run(server, world, tmp_path_factory.mktemp("torn"), processes=2)
        for turn, moment in enumerate(kills.moments(peace.trace, 100 + number)):
            run.strike(kills.of(moment, VICTIMS[(turn + number) % len(VICTIMS)]))
        run.finish()
        found.append(run)
    yield found
    for run in found:
        run.remove()


def test_one_process_or_both_are_killed_in_several_phases(torn: list[Any]) -> None:
    struck = [phase for run in torn for phase in run.struck]
    assert len(struck) >= 4 * SEQUENCES and len(set(struck)) >= 4, struck


def test_the_ranking_is_that_of_a_run_in_peace(kills: ModuleType, peace: Any, torn: list[Any]) -> None:
    wanted = kills.files.numbers(peace.path / "ranking.json")
    for run in torn:
        found = kills.files.numbers(run.path / "ranking.json")
        assert found == pytest.approx(wanted, rel=0, abs=1e-6), run.struck


def test_and_that_of_one_process(kills: ModuleType, alone: Any, torn: list[Any]) -> None:
    wanted = kills.files.numbers(alone.path / "ranking.json") | {"/config/processes": 2}
    for run in torn:
        # Both are rounded to six places: a difference of one in the last is a little more than that as a float.
        found = kills.files.numbers(run.path / "ranking.json")
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6), run.struck


def test_no_file_is_missing_or_left_over(kills: ModuleType, peace: Any, torn: list[Any]) -> None:
    for area in ("path", "features"):
        wanted = kills.files.contents(getattr(peace, area))
        for run in torn:
            found = kills.files.differences(wanted, kills.files.contents(getattr(run, area)))
            assert {name: said for name, said in found.items() if said != "other"} == {}, run.struck


def test_two_live_processes_keep_their_directory_from_two_others(
    kills: ModuleType, server: Any, world: Any, tmp_path: Path
) -> None:
    """Nothing of the run is touched, and the others end with one sentence, not with a broken connection."""
    one, other = (kills.Run(server, world, tmp_path, processes=2) for _ in range(2))
    holders = one.start(kills.Moment("training", 3))
    while not one.marker.exists():
        assert server.poll(holders[0]) is None, one.said()
        time.sleep(0.01)
    before = kills.files.contents(one.path)
    one.output.unlink()
    assert other.wait(other.start()) == [2, 2]
    said = one.said()
    assert said.count(f"error: The run directory {one.path} is in use by a live run") == 1, said
    assert "Traceback" not in said, said
    assert kills.files.differences(before, kills.files.contents(one.path)) == {}
    os.killpg(holders[0], signal.SIGKILL)
    one.wait(holders)

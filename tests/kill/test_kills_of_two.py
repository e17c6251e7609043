"""SIGKILL of one of two processes, or of both, and the same command again."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

pytestmark = [pytest.mark.kill, pytest.mark.distributed, pytest.mark.zoo, pytest.mark.slow, pytest.mark.timeout(1500)]

VICTIMS = ("group", "0", "1")
SEQUENCES = 2


@pytest.fixture(scope="module")
def peace(kills: ModuleType, server: Any, vlm: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    run = kills.Run(server, vlm, tmp_path_factory.mktemp("peace"), processes=2)
    run.finish(trace=True)
    yield run
    run.remove()


@pytest.fixture(scope="module")
def torn(
    kills: ModuleType, server: Any, vlm: Any, peace: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Any]]:
    found = []
    for number in range(SEQUENCES):
        run = kills.Run(server, vlm, tmp_path_factory.mktemp("torn"), processes=2)
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
    for run in torn:
        assert kills.files.numbers(run.path / "ranking.json") == pytest.approx(
            kills.files.numbers(peace.path / "ranking.json"), abs=1e-6
        ), run.struck


def test_no_file_is_missing_or_left_over(kills: ModuleType, peace: Any, torn: list[Any]) -> None:
    for area in ("path", "features"):
        wanted = kills.files.contents(getattr(peace, area))
        for run in torn:
            found = kills.files.differences(wanted, kills.files.contents(getattr(run, area)))
            assert {name: said for name, said in found.items() if said != "other"} == {}, run.struck

"""Which process holds which LLMs: every law of the plan, and its words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyma_mllm.errors import HymaError
from hyma_mllm.search.placement import IDLE, Load, Placement, held_bytes, place, plan_lines

LOADS = st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=9)


@given(costs=LOADS, processes=st.integers(1, 12), groups=st.integers(0, 12))
def test_every_llm_has_one_group_and_every_group_an_llm(
    costs: list[tuple[float, float]], processes: int, groups: int
) -> None:
    loads = [Load(f"llm{number}", memory, flops) for number, (memory, flops) in enumerate(costs)]
    most = min(processes, len(costs))
    wanted = groups or max(number for number in range(1, most + 1) if processes % number == 0)
    if processes > 1 and (wanted > most or processes % wanted or wanted == 1):
        with pytest.raises(HymaError, match=r"search\.(groups|parallel) is"):
            place("pairs", loads, processes, 0, groups)
        return
    found = [place("pairs", loads, processes, process, groups) for process in range(processes)]
    if processes == 1:
        assert all(found[0].here(llm) for llm in range(len(loads))) and found[0].shares == 1
        return
    assert found[0].groups == wanted
    for llm in range(len(loads)):
        shares = sorted(one.share for one in found if one.here(llm))
        assert shares == list(range(processes // wanted))
    assert all(any(one.here(llm) for llm in range(len(loads))) for one in found)
    assert held_bytes(found[0], loads, 1) <= sum(load.bytes for load in loads) * (1 + 1e-9)
    assert held_bytes(found[0], loads, processes) == pytest.approx(
        processes // wanted * sum(load.bytes for load in loads)
    )
    # The rule of longest first: no group has more than its fair part and one LLM.
    dearest = max(max(load.bytes for load in loads) / sum(load.bytes for load in loads),
                  max(load.flops for load in loads) / sum(load.flops for load in loads))  # fmt: skip
    for kind in ("bytes", "flops"):
        whole = sum(getattr(load, kind) for load in loads)
        for group in range(wanted):
            part = sum(
                getattr(load, kind) for load, owner in zip(loads, found[0].owners, strict=True) if owner == group
            )
            assert part / whole <= 2 / wanted + dearest + 1e-9


def test_memory_and_work_are_both_spread() -> None:
    """One LLM large and idle, three small and busy: memory alone would pair the large one with nothing."""
    loads = [Load("large", 10.0, 1.0), Load("x", 1.0, 5.0), Load("y", 1.0, 5.0), Load("z", 1.0, 5.0)]
    found = place("pairs", loads, 2, 0)
    assert found.owners is not None
    together = [load.name for load, owner in zip(loads, found.owners, strict=True) if owner == found.owners[0]]
    assert together == ["large", "z"]


def test_the_plan_is_told() -> None:
    loads = [Load("a", 2e9, 3.0), Load("b", 1e9, 1.0)]
    lines = plan_lines(place("pairs", loads, 4, 0), loads)
    assert lines == [
        "pair-parallel: processes 0 to 1: a; 2.0 GB a process, 75 % of the LLMs' FLOPs, each with 1/2 of every batch",
        "pair-parallel: processes 2 to 3: b; 1.0 GB a process, 25 % of the LLMs' FLOPs, each with 1/2 of every batch",
    ]
    assert plan_lines(place("pairs", loads, 2, 0), loads)[1].startswith("pair-parallel: process 1: b; 1.0 GB a process")
    (line,) = plan_lines(place("data", loads, 2, 0), loads)
    assert line == "data-parallel: each of 2 processes holds all LLMs, 3.0 GB, and takes 1/2 of every batch"


def test_all_processes_take_as_many_turns_and_each_visit_once() -> None:
    groups, visits = [0, 1, 2, 0, 1, 2], [[0, 3], [4, 1], [2, 5]]
    turns = [Placement(2, process, (0, 1, 1), 2).turns(visits, groups) for process in (0, 1)]
    assert turns == [[(0, 2.0), (IDLE, 0.0)], [(1, 2.0), (2, 2.0)]]
    assert Placement(2, 1).turns(visits, groups) == [(0, 1.0), (1, 1.0), (2, 1.0)]
    # With two processes a group, the weight makes up for the groups only: shares of a batch have a mean.
    assert Placement(4, 1, (0, 1, 1), 2).turns(visits, groups) == turns[0]

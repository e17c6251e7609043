"""What a run needs beside what there is: peaks, refusals, and settings that were tried."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyma_mllm.errors import HymaError
from hyma_mllm.planning.machine import room_of
from hyma_mllm.planning.needs import Change, Need, Phase, Plan, Room, halves, refuse_what_cannot_fit, setting, what_fits

ROOM = Room({"cache": 100.0, "run": 50.0, "memory": 10.0}, one_disk=False)
PHASES: tuple[Phase, ...] = ("always", "loading", "embedding", "training", "scoring")


@dataclass(frozen=True)
class Search:
    batch: int = 16
    methods: tuple[str, ...] = ("hyma", "grid")


@dataclass(frozen=True)
class Config:
    search: Search = field(default_factory=Search)
    answers: int = 8


def plan(config: Config, memory: float = 10.0) -> Plan:
    """A batch of 1 takes 1 while training, an answer 1 while scoring, and each method 2."""
    needs = (
        Need("weights", "memory", 2.0 * len(config.search.methods)),
        Need("activations", "memory", float(config.search.batch), "training"),
        Need("answers", "memory", float(config.answers), "scoring"),
    )
    return Plan(needs, replace(ROOM, free={"memory": memory}))


CHANGES: list[Change[Config]] = [
    *(setting("answers", size) for size in halves(8, 1)),
    setting("search.methods", ["hyma"]),
    *(setting("search.batch", size) for size in halves(16, 2)),
]


@given(st.lists(st.tuples(st.sampled_from(PHASES), st.integers(0, 99)), max_size=9))
def test_phases_do_not_add_up(drawn: list[tuple[Phase, int]]) -> None:
    found = Plan(tuple(Need("x", "memory", size, phase) for phase, size in drawn), ROOM)
    always = sum(size for phase, size in drawn if phase == "always")
    others = [sum(size for phase, size in drawn if phase == one) for one in PHASES[1:]]
    assert found.peak("memory") == always + max(others)
    assert found.peak("cache") == 0


def test_one_disk_holds_the_run_as_well() -> None:
    needs = (Need("features", "cache", 70.0), Need("checkpoints", "run", 40.0))
    assert Plan(needs, ROOM).short() is None
    shared = Plan(needs, Room({"cache": 100.0}, one_disk=True))
    assert shared.peak("cache") == 110 and shared.short() == "cache" and shared.largest("cache").what == "features"


def test_the_table_has_every_need_and_the_peaks() -> None:
    cells = [list(column.cells) for column in plan(Config()).table().columns]
    assert cells[0] == ["activations", "answers", "weights", "at its peak"]
    assert cells[3][-1] == "0.00 GB free memory for each process"


def test_what_fits_is_returned_and_nothing_said() -> None:
    assert refuse_what_cannot_fit(Config(), lambda c: plan(c, 20.0), CHANGES).short() is None


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        # 20 are needed: one setting is enough, the least change first.
        (19.0, "it would fit with search.methods [hyma], or search.batch 8."),
        (12.0, "it would fit with search.batch 8."),
        # No single setting, but two of them: 4 + 4, or 2 + 8.
        (10.0, "with answers 4 and search.batch 4, or search.methods [hyma] and search.batch 8."),
        # Three of them, none of which can be left out.
        (4.0, "it would fit with answers 2 and search.methods [hyma] and search.batch 2."),
        (1.0, "no setting makes it fit; list fewer models"),
    ],
)
def test_a_refusal_names_settings_that_were_tried(memory: float, said: str) -> None:
    with pytest.raises(HymaError) as refused:
        refuse_what_cannot_fit(Config(), lambda c: plan(c, memory), CHANGES)
    words = str(refused.value)
    assert said in words and "most of it for activations" in words and words.endswith(".") and ". " not in words


@given(memory=st.floats(3.0, 25.0))
def test_every_offer_fits_when_it_is_set(memory: float) -> None:
    by_words = {change.words: change for change in CHANGES}
    for offer in what_fits(Config(), lambda c: plan(c, memory).short() is None, CHANGES):
        config = Config()
        for words in offer.split(" and "):
            config = by_words[words].apply(config)
        assert plan(config, memory).short() is None


def test_settings_reach_nested_and_plain_options() -> None:
    assert setting("search.batch", 3).apply(Config()) == Config(Search(batch=3))
    assert setting("answers", 1).apply(Config()).answers == 1
    assert setting("llm.checkpointing", True).words == "llm.checkpointing true"
    assert list(halves(9, 2)) == [4, 2] and list(halves(1, 1)) == []


def test_the_room_is_this_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = room_of(tmp_path / "no" / "such" / "run", torch.device("cpu"))
    assert alone.one_disk and set(alone.free) == {"cache", "memory"} and min(alone.free.values()) > 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shared = room_of(tmp_path, torch.device("cpu"))
    assert shared.free["memory"] == pytest.approx(alone.free["memory"] / 4, rel=0.2)

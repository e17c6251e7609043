"""Successive halving: its schedule by hand, its resumption, and that who stopped stands still."""

import itertools
import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.errors import HymaError
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.budget import Budget
from hyma_mllm.search.config import HalvingConfig
from hyma_mllm.search.halving import RUNG
from hyma_mllm.search.held import HeldConnectors
from hyma_mllm.search.interrupt import SearchInterruptedError, StopRequest
from hyma_mllm.search.method import all_connectors
from hyma_mllm.search.methods import Method, Search
from hyma_mllm.search.plan import Leg
from hyma_mllm.search.race import survivors
from hyma_mllm.search.task import VLMTask

Maker = Callable[..., Search]
PAIRS = 6


def logged(search: Search, event: str) -> list[dict[str, object]]:
    return [line for line in map(json.loads, (search.run.path / "log.jsonl").open()) if line["event"] == event]


def test_survivors_are_the_better_half() -> None:
    assert survivors([0, 2, 3, 5], [9.0, 99.0, 7.0, 8.0, 99.0, 10.0], 2) == [0, 5]
    assert survivors([0, 2, 3], [1.0, 0.0, 1.0, 1.0], 2) == [0, 2]  # equal ones in grid order, rounded up
    assert survivors([4], [0.0] * 5, 3) == [4]


@given(scores=st.lists(st.integers(0, 5), min_size=1, max_size=12), eta=st.floats(1.01, 6))
def test_no_pair_that_stops_is_better_than_one_that_goes_on(scores: list[float], eta: float) -> None:
    members = list(range(0, len(scores), 2))
    kept = survivors(members, scores, eta)
    assert kept and set(kept) <= set(members) and len(kept) >= len(members) / eta - 1e-6
    stopped = [scores[pair] for pair in members if pair not in kept]
    assert max(stopped, default=-1) <= min(scores[pair] for pair in kept)


def test_the_schedule_is_the_one_of_paper_and_pencil(search: Maker) -> None:
    """Samples for 90 visits in three rungs of 30: five steps of six pairs, ten of three, fifteen of two."""
    one = search(budget=Budget(samples=90 * 16 / PAIRS), halving=HalvingConfig(eta=2, rungs=3), methods=["halving"])
    found = one.run_method("halving", "linear", 0, None)
    assert sorted(found.outcome.visits) == [5, 5, 5, 15, 30, 30]
    assert found.outcome.step == 30
    rungs = logged(one, "rung")
    assert [len(line["members"]) for line in rungs] == [6, 3, 2]  # type: ignore[arg-type]
    # Each rung's members are the best of the one before, by the validation score at its end.
    seen = [next(iter(line["scores"].values())) for line in logged(one, "evaluation")]  # type: ignore[attr-defined]
    for scores, (now, then) in zip(seen, itertools.pairwise(rungs), strict=False):
        assert then["members"] == survivors(now["members"], scores, 2)  # type: ignore[arg-type]
    # One schedule over all rungs: a third of it in each.
    rates = [line["lr"] for line in logged(one, "step")]
    assert rates[5] == pytest.approx(one.config.rival_optimiser.rate(35000, 100000), rel=1e-3)
    assert rates[29] < 0.02 * one.config.rival_optimiser.lr
    # The order is the rung reached and the validation score there.
    reached = [sum(pair in line["members"] for line in rungs) for pair in range(PAIRS)]  # type: ignore[operator]
    wanted = [RUNG * rung + seen[rung - 1][pair] for pair, rung in enumerate(reached)]
    assert found.ranking.order_by == pytest.approx(wanted, abs=1e-4)  # the log has four decimals


def test_flops_are_shared_equally_between_rungs(search: Maker) -> None:
    one = search(budget=Budget(flops=3e7), halving=HalvingConfig(eta=2, rungs=3), methods=["halving"])
    found = one.run_method("halving", "linear", 0, None)
    spec, spent = one.config.spec("linear"), 0.0
    steps = [line["losses"] for line in logged(one, "step")]
    for rung, line in enumerate(logged(one, "rung")):
        price = one.task.visit_flops(spec, line["members"], 16)  # type: ignore[arg-type]
        taken = sum({int(k) for k in losses} == set(line["members"]) for losses in steps)  # type: ignore[attr-defined, arg-type]
        assert taken == (3e7 - spent) / (3 - rung) // price
        spent += taken * price
    assert found.ledger.phases["training"].flops == spent <= 3e7
    # A validation in each rung, and one beside the test at the end.
    evaluation = found.ledger.phases["evaluation"].flops
    task = one.task
    assert isinstance(task, VLMTask)
    assert evaluation == 4 * task.scoring_flops(spec, task.validation) + task.scoring_flops(spec, task.test)


def test_a_pair_that_stopped_keeps_the_connector_it_had(search: Maker) -> None:
    """The same race stopped after its first rung holds the same connectors of the pairs that go no further."""
    samples = 90 * 16 / PAIRS
    long = search(budget=Budget(samples=samples), halving=HalvingConfig(rungs=3), methods=["halving"])
    whole = long.run_method("halving", "mlp1", 0, None)
    stopped = [pair for pair, visits in enumerate(whole.outcome.visits) if visits == 5]
    assert len(stopped) == 3
    # All pairs at the rates of the first rung, which is five steps and a third of the schedule.
    short = search()
    network = short.network("halving", short.config.spec("mlp1"), 0)
    pairs = short.pairs(range(PAIRS), 0)
    trainer = short.trainer(short.plan("halving", "mlp1", 0, network, pairs, 5), network)
    trainer.run_leg(Leg(pairs, 0, 5, end=1 / 3))
    short.accelerator.free_memory()
    assert trainer.done == 5
    assert whole.network is not None
    found, wanted = all_connectors(whole.network, PAIRS), all_connectors(network, PAIRS)
    for name, value in wanted.items():
        same = torch.allclose(found[name], value, atol=2e-5)
        assert same == (int(name.split(".")[0]) in stopped), name


def test_held_connectors_are_put_back(task: VLMTask) -> None:
    bank = ConnectorBank(task.grid, ConnectorSpec.named("linear"), 0)
    before = all_connectors(bank, PAIRS)
    held = HeldConnectors(bank, [0, 5])
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.mul_(2.0)
    held.put_back()
    for name, value in all_connectors(bank, PAIRS).items():
        factor = 2.0 if int(name.split(".")[0]) in (0, 5) else 1.0
        assert torch.equal(value, before[name] * factor)


class StopAt(StopRequest):
    """A signal that comes after some looks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.left = looks

    def __bool__(self) -> bool:
        self.left -= 1
        self.signal = "SIGINT"
        return self.left < 0


@pytest.mark.parametrize("method", ["halving", "mordal"])
@pytest.mark.parametrize("looks", [2, 7, 14])
def test_a_race_that_was_stopped_ends_like_one_that_was_not(search: Maker, method: Method, looks: int) -> None:
    def make() -> Search:
        return search(budget=Budget(samples=90 * 16 / PAIRS), methods=[method], checkpoint_every=3)

    straight = make().run_method(method, "linear", 0, None)
    broken = make()
    broken.stop = StopAt(looks)
    with pytest.raises(SearchInterruptedError, match="run the same command again to go on"):
        broken.run_method(method, "linear", 0, None)
    broken.accelerator.free_memory()
    broken.stop = StopRequest()
    resumed = broken.run_method(method, "linear", 0, None)
    assert resumed.ranking == straight.ranking
    assert resumed.outcome.visits == straight.outcome.visits
    for phase, cost in straight.ledger.phases.items():
        assert resumed.ledger.phases[phase].flops == cost.flops
    assert straight.network is not None and resumed.network is not None
    wanted = all_connectors(straight.network, PAIRS)
    assert all(torch.equal(value, wanted[name]) for name, value in all_connectors(resumed.network, PAIRS).items())
    assert any(line["event"] == "resumed" for line in map(json.loads, (broken.run.path / "log.jsonl").open()))


def test_a_race_of_another_configuration_is_not_resumed(search: Maker) -> None:
    one = search(budget=Budget(samples=240), methods=["halving"], checkpoint_every=2)
    one.stop = StopAt(3)
    with pytest.raises(SearchInterruptedError):
        one.run_method("halving", "linear", 0, None)
    one.accelerator.free_memory()
    one.stop = StopRequest()
    one.config.halving.eta = 3
    with pytest.raises(HymaError, match="race differ"):
        one.run_method("halving", "linear", 0, None)
    one.accelerator.free_memory()


@pytest.mark.parametrize(
    ("values", "sentence"), [({"eta": 1.0}, "halving.eta is 1.0"), ({"rungs": 0}, "halving.rungs is 0")]
)
def test_what_cannot_be_halved_is_refused(values: dict[str, float], sentence: str) -> None:
    with pytest.raises(HymaError, match=sentence):
        HalvingConfig(**values)  # type: ignore[arg-type]

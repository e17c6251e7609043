"""Budgets: what they buy, that no method spends more, and that the same work costs the same everywhere."""

import itertools
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyma_mllm.errors import HymaError
from hyma_mllm.search.budget import Budget, period, steps_within
from hyma_mllm.search.ledger import Cost, Ledger
from hyma_mllm.search.methods import Search
from hyma_mllm.search.plan import RESOLUTION, UNLIMITED, Leg
from hyma_mllm.search.samplers import PairSampler, PairSampling

Maker = Callable[..., Search]


@given(
    costs=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    limit=st.integers(0, 2000),
    told=st.booleans(),
)
def test_steps_are_those_that_a_walk_through_the_costs_affords(costs: list[int], limit: int, told: bool) -> None:
    spent, wanted = 0, 0
    for cost in itertools.cycle(costs):
        spent += cost
        if spent > limit:
            break
        wanted += 1
    assert steps_within(limit, lambda step: costs[step % len(costs)], len(costs) if told else 0) == wanted


@pytest.mark.parametrize("kind", ["fair", "round", "cyclic"])
@pytest.mark.parametrize("groups", [None, [0, 1, 0, 1, 0, 1, 1]])
@pytest.mark.parametrize("per_visit", [0, 2, 3])
def test_every_period_visits_every_pair_equally_often(
    kind: PairSampling, groups: list[int] | None, per_visit: int
) -> None:
    pairs = PairSampler(tuple(range(7)), per_visit, kind, 5, groups)
    length = period(pairs)
    for start in range(0, 3 * length, length):
        seen = [pair for step in range(start, start + length) for visit in pairs.visits(step) for pair in visit]
        assert len({seen.count(pair) for pair in range(7)}) == 1
    assert period(PairSampler(tuple(range(7)), 2, "random", 5)) == 0


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"flops": 1e9, "seconds": 3.0}, "sets flops and seconds; set one"),
        ({"flops": 0.0}, "budget.flops is 0.0; write a positive number"),
        ({"samples": -1.0}, "budget.samples is -1.0"),
        ({"seconds": float("nan")}, "budget.seconds is nan"),
    ],
)
def test_a_budget_that_is_none_is_refused(values: dict[str, float], sentence: str) -> None:
    with pytest.raises(HymaError, match=sentence):
        Budget(**values)


def test_a_budget_says_itself() -> None:
    assert [str(b) for b in (Budget(), Budget(flops=1e11), Budget(seconds=3))] == [
        "no limit",
        "1e+11 flops",
        "3 seconds",
    ]
    assert not Budget().given and Budget(samples=1).given


def test_a_leg_of_seconds_follows_the_clock() -> None:
    pairs = PairSampler((0,), 0, "fair", 0)
    leg = Leg(pairs, 4, UNLIMITED, from_second=10.0, to_second=20.0, begin=0.5, end=1.0)
    assert leg.fraction(4, 999.0) == 0.0  # its first step is always taken
    assert leg.position(5, 15.0) == (round(0.75 * RESOLUTION), RESOLUTION)
    assert leg.position(5, 25.0) == (RESOLUTION, RESOLUTION)
    whole = Leg(pairs, 0, 30)
    assert [whole.position(step, 1.0) for step in (0, 29)] == [(0, 30), (29, 30)]
    second = Leg(pairs, 30, 40, begin=0.5, end=1.0)
    assert second.position(35, 1.0) == (round(0.775 * RESOLUTION), RESOLUTION)  # the middle of the sixth of ten


BILL = Ledger("hyma", "linear", 0, {"training": Cost(flops=1e7, samples_per_pair=100)})


@pytest.mark.parametrize("method", ["hyma", "grid", "constrained-grid", "random", "halving", "mordal"])
@pytest.mark.parametrize("budget", [Budget(flops=9e6), Budget(samples=115), Budget(flops=4.1e7)])
def test_no_method_spends_more_and_none_leaves_a_step(search: Maker, method: str, budget: Budget) -> None:
    one = search(budget=budget, sampler="round", pairs_per_visit=4, grid_steps=7, warm_start="ridge")
    found = one.run_method(method, "linear", 0, BILL)  # type: ignore[arg-type]
    paid = found.ledger.phases["training"]
    seen = (0 if method == "hyma" else 70) + sum(found.outcome.visits) * 16 / 6  # the closed form read every row once
    step = 16 if budget.flops is None else 2 * paid.flops / found.outcome.step  # a step is less than twice their mean
    spent, limit = (paid.flops, budget.flops) if budget.flops is not None else (seen, budget.samples)
    assert limit is not None
    assert found.outcome.step >= 1
    assert spent <= limit
    if method not in ("random", "halving", "mordal"):
        assert spent + step > limit


def test_a_step_that_is_not_paid_for_is_said(search: Maker) -> None:
    one = search(budget=Budget(flops=10.0), methods=["grid"])
    assert one.run_method("grid", "linear", 0, None).outcome.step == 1
    lines = [json.loads(line) for line in (one.run.path / "log.jsonl").open()]
    assert [line["reason"] for line in lines if line["event"] == "budget"] == [
        "search.budget pays for no step of a linear training; one is taken all the same."
    ]


def test_the_rate_ends_where_the_budget_does(search: Maker) -> None:
    one = search(budget=Budget(samples=16 * 20), methods=["grid"])
    one.run_method("grid", "linear", 0, None)
    rates = [json.loads(line)["lr"] for line in (one.run.path / "log.jsonl").open() if '"step"' in line[:20]]
    config = one.config.rival_optimiser
    assert rates == pytest.approx([config.rate(step, 20) for step in range(20)])


@pytest.mark.parametrize("method", ["hyma", "grid", "halving", "mordal"])
def test_seconds_end_a_training(search: Maker, method: str) -> None:
    one = search(budget=Budget(seconds=0.15), methods=["hyma", "halving", "grid", "mordal"])
    found = one.run_method(method, "linear", 0, None)  # type: ignore[arg-type]
    paid = found.ledger.phases["training"]
    assert found.outcome.step >= 1
    # The last step of each of its legs may end late.
    assert paid.seconds <= 0.15 + 5 * paid.seconds / found.outcome.step + 0.3
    rates = [json.loads(line)["lr"] for line in (one.run.path / "log.jsonl").open() if '"step"' in line[:20]]
    assert len(rates) == found.outcome.step and min(rates) >= 0


def test_the_same_visits_cost_the_same_in_every_method(search: Maker) -> None:
    """FLOPs are a sum over visits of a pair, whoever makes them."""
    one = search(grid_steps=4)
    spec = one.config.spec("linear")
    price = [one.task.visit_flops(spec, [pair], 16) for pair in range(6)]
    for method in ("grid", "constrained-grid", "random", "halving", "mordal"):
        found = one.run_method(method, "linear", 0, BILL)  # type: ignore[arg-type]
        wanted = sum(count * cost for count, cost in zip(found.outcome.visits, price, strict=True))
        assert found.ledger.phases["training"].flops == pytest.approx(wanted, rel=1e-12), method
        trained = 6 if method != "random" else sum(count > 0 for count in found.outcome.visits)
        assert found.ledger.phases["training"].samples_per_pair == 16 * sum(found.outcome.visits) / trained


@given(
    parts=st.dictionaries(
        st.sampled_from(["embedding", "training", "evaluation"]),
        st.builds(
            Cost,
            samples_per_pair=st.floats(0, 1e6),
            steps=st.integers(0, 10**6),
            flops=st.floats(0, 1e18),
            seconds=st.floats(0, 1e6),
            peak_bytes=st.integers(0, 2**40),
        ),
    ),
    shared=st.booleans(),
)
def test_a_total_is_the_sum_of_its_parts(parts: dict[str, Cost], shared: bool) -> None:
    ledger = Ledger("m", "linear", 0, parts, 16, shared)  # type: ignore[arg-type]
    paid = {phase: cost for phase, cost in parts.items() if not (shared and phase == "embedding")}
    total = ledger.total()
    assert total.flops == pytest.approx(sum(cost.flops for cost in paid.values()))
    assert total.seconds == pytest.approx(sum(cost.seconds for cost in paid.values()))
    assert total.peak_bytes == max([cost.peak_bytes for cost in paid.values()], default=0)
    training = parts.get("training", Cost())
    assert (total.steps, total.samples_per_pair) == (training.steps, training.samples_per_pair)

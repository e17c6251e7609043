"""Orders of the fidelity benchmark's ablations: each against a plain calculation, and what they cost."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.stats

from hyma_mllm.pairs import PairGrid
from hyma_mllm.search.budget import Budget
from hyma_mllm.search.measures import mutual_knn
from hyma_mllm.search.methods import Search
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.search.similarity import views


@pytest.fixture
def fidelity(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("fidelity")


@pytest.fixture
def bench(fidelity: ModuleType, search: Callable[..., Search], tmp_path: Path) -> Any:
    def made(changes: dict[str, Any], scale: float | None = None, hypernetwork: dict[str, Any] | None = None) -> Search:
        return search(**{"optimiser": OptimiserConfig(lr=1e-2)} | changes)

    return fidelity.Bench(made, fidelity.keeper(tmp_path), {})


def test_places_of_the_later_looks_are_averaged(fidelity: ModuleType) -> None:
    looks = [[9.0, 0.0, 0.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [5.0, 5.0, 7.0]]
    # The later half: places 3 1 2 and 1.5 1.5 3.
    assert fidelity.orders.averaged(looks) == [2.25, 1.25, 2.5]
    assert fidelity.orders.averaged([[2.0, 1.0]]) == [2.0, 1.0]


@pytest.mark.parametrize(("vision", "text"), [(7, 4), (2, 5), (3, 3), (1, 1)])
def test_landmarks_have_every_model_once_at_least(fidelity: ModuleType, vision: int, text: int) -> None:
    grid = PairGrid(tuple(map(str, range(vision))), (8,) * vision, tuple(map(str, range(text))), (8,) * text)
    members = fidelity.orders.diagonal(grid)
    pairs = [grid.pair(member) for member in members]
    assert {pair.vision for pair in pairs} == set(range(vision))
    assert {pair.text for pair in pairs} == set(range(text))
    assert len(members) == max(vision, text)


def test_gains_are_told_by_a_ridge_over_the_models(fidelity: ModuleType) -> None:
    grid = PairGrid(("a", "b", "c"), (8, 8, 8), ("x", "y"), (8, 8))
    scores, members, after = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0], [0, 3, 4], [15.0, 0.0, 0.0, 41.0, 53.0, 0.0]
    found = fidelity.orders.calibrated(grid, scores, members, after)
    design = np.array([[k // 2 == v for v in range(3)] + [k % 2 == t for t in range(2)] for k in range(6)], float)
    gains, seen = np.array([5.0, 1.0, 3.0]), design[members]
    centre, mean = seen.mean(0), gains.mean()
    weights = np.linalg.solve((seen - centre).T @ (seen - centre) + np.eye(5), (seen - centre).T @ (gains - mean))
    told = np.array(scores) + mean + (design - centre) @ weights
    for pair in range(6):
        assert found[pair] == pytest.approx(after[pair] if pair in members else told[pair])


def test_looks_are_test_scores_on_the_way(fidelity: ModuleType, bench: Any) -> None:
    search = bench.make({"steps": 6, "evaluate_every": 2})
    plain = search.task
    search.task, looks = fidelity.orders.watched(plain)
    found = search.run_method("hyma", "linear", 0, None)
    assert len(looks) == 4 and looks[-1] == looks[-2] == found.ranking.scores["retrieval"]
    halfway = bench.make({"steps": 6, "evaluate_every": 2})
    assert looks[0] != looks[-1] and halfway.run_method("hyma", "linear", 0, None).ranking == found.ranking


def test_landmarks_are_paid_and_change_the_order_only(fidelity: ModuleType, bench: Any) -> None:
    budget, contestants = Budget(flops=1e8), fidelity.Contestant
    own = fidelity.compete(bench, contestants("hyma", "hyma"), "linear", 0, budget)
    found = fidelity.compete(bench, contestants("landmarks", "hyma", order="landmarks"), "linear", 0, budget)
    assert found["test"] == own["test"] and found["order_by"] != own["order_by"] == own["test"]
    task, spec = bench.make({}).task, bench.make({}).config.spec("linear")
    extra = sum(task.visit_flops(spec, [pair], 16) for pair in fidelity.orders.diagonal(task.grid))
    assert found["flops"] == pytest.approx(own["flops"] + fidelity.LANDMARKS["vlm"].steps * extra, rel=1e-12)


def test_a_prior_is_standardised_neighbours_beside_standardised_scores(fidelity: ModuleType, bench: Any) -> None:
    budget, orders = Budget(flops=1e8), fidelity.orders
    own = fidelity.compete(bench, fidelity.Contestant("hyma", "hyma"), "linear", 3, budget)
    found = fidelity.compete(bench, fidelity.Contestant("prior", "hyma", order="prior"), "linear", 3, budget)
    task = bench.make({}).task
    seen = views(task, orders.PRIOR_ROWS, 3)
    shared = [mutual_knn(seen.vision[pair.vision], seen.text[pair.text]) for pair in task.grid.pairs()]
    weight = orders.PRIOR_WEIGHT
    wanted = (1 - weight) * scipy.stats.zscore(own["test"]) + weight * scipy.stats.zscore(shared)
    np.testing.assert_allclose(found["order_by"], wanted, atol=1e-9)
    assert found["test"] == own["test"]
    assert found["flops"] == pytest.approx(own["flops"] + 2 * 70**2 * (16 + 24 + 20 + 20 + 12), rel=1e-12)


def test_another_reading_of_a_training_trains_nothing(
    fidelity: ModuleType, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {"loss": [3.0, 1.0], "blind loss": [4.0, 1.5], "blind": [2.0, 9.0], "test": [5.0, 10.0]}
    record = losses | {"label": "hyma", "order_by": [5.0, 10.0], "connector": "linear", "seed": 0}
    trained: list[str] = []

    def compete(bench: Any, one: Any, connector: str, seed: int, budget: Budget) -> dict[str, Any]:
        trained.append(one.label)
        return record

    monkeypatch.setattr(fidelity, "compete", compete)
    monkeypatch.setattr(
        fidelity.oracle, "strong_oracle", lambda *_: fidelity.oracle.Oracle([[1.0]], ["x"], 1e9, 1.0, 1.0, 1.0, 1.0)
    )
    base = fidelity.Contestant("hyma", "hyma")
    readings = [
        fidelity.Contestant(order, "hyma", order=order, trained_as="hyma")
        for order in ("gain over blind", "loss", "loss gain")
    ]
    elsewhere = fidelity.Contestant("of another family", "hyma", families=("mlp1",))
    arguments = Namespace(case="vlm", quick=True, candidates=[], connectors=["linear"], shares=[0.5], seeds=1)
    runs = fidelity.run_case(bench, [base, elsewhere, *readings], arguments)["runs"]
    assert trained == ["hyma"]
    assert {run["label"]: run["order_by"] for run in runs} == {
        "hyma": [5.0, 10.0],
        "gain over blind": [3.0, 1.0],
        "loss": [-3.0, -1.0],
        "loss gain": [1.0, 0.5],
    }

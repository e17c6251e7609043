"""Each method over the synthetic task: what it trains, what it pays, what it answers."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch

from hyma_mllm.errors import HymaError
from hyma_mllm.hypernetwork.presets import Preset
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.budget import Budget
from hyma_mllm.search.closed_form import ClosedFormConfig
from hyma_mllm.search.config import PolishConfig
from hyma_mllm.search.ledger import Cost, Ledger
from hyma_mllm.search.methods import METHODS, Found, Method, Search, SearchConfig, all_connectors
from hyma_mllm.search.samplers import PairSampling
from hyma_mllm.search.task import VLMTask

Maker = Callable[..., Search]


def untrained(search: Search, method: Method, connector: str = "linear") -> list[float]:
    spec = search.config.spec(connector)
    task = search.task
    return task.scores(search.network(method, spec, 0), spec, task.test)["retrieval"]


@pytest.mark.parametrize(
    ("preset", "connector"),
    [("default", "linear"), ("default", "mlp1"), ("hyma", "linear"), ("hyma", "mlp1"), ("hyper-align", "linear")],
)
def test_every_preset_learns_every_pair(search: Maker, preset: Preset, connector: str) -> None:
    one = search(preset, connectors=[connector], steps=60)
    before = untrained(one, "hyma", connector)
    found = one.run_method("hyma", connector, 0, None)
    after = found.ranking.scores["retrieval"]
    assert sum(after) / len(after) > sum(before) / len(before) + 15
    assert all(b > a for a, b in zip(before, after, strict=True))
    assert found.ledger.phases["training"].samples_per_pair == 60 * 16


@pytest.mark.parametrize("sampler", ["fair", "random", "cyclic"])
def test_each_sampler_learns_and_is_billed_for_what_it_shows(search: Maker, sampler: PairSampling) -> None:
    one = search(sampler=sampler, pairs_per_visit=2, steps=45)
    before = untrained(one, "hyma")
    found = one.run_method("hyma", "linear", 0, None)
    visits = found.outcome.visits
    assert sum(found.ranking.scores["retrieval"]) > sum(before)
    paid = found.ledger.phases["training"]
    assert paid.samples_per_pair == pytest.approx(16 * sum(visits) / 6)
    if sampler == "fair":
        assert visits == [45] * 6
    else:
        assert sum(visits) == 45 * 2
        assert max(visits) - min(visits) <= (0 if sampler == "cyclic" else 20)
    # A random or cyclic step shows a third of the pairs and costs a third.
    whole = search(sampler="fair", steps=45).run_method("hyma", "linear", 0, None).ledger.phases["training"].flops
    task, spec = one.task, one.config.spec("linear")
    loss = task.visit_flops(spec, range(6), 16) * 45
    assert paid.flops >= loss * sum(visits) / (45 * 6) * 0.8
    assert (paid.flops < 0.6 * whole) == (sampler != "fair")


def test_rivals_are_held_to_hymas_cost(search: Maker) -> None:
    one = search(pairs_per_visit=2, sampler="cyclic", steps=30)
    hyma = one.run_method("hyma", "linear", 0, None)
    paid = hyma.ledger.phases["training"]
    constrained = one.run_method("constrained-grid", "linear", 0, hyma.ledger)
    assert constrained.ledger.phases["training"].samples_per_pair == paid.samples_per_pair == 160
    assert constrained.ledger.phases["training"].steps == 10
    assert constrained.outcome.visits == [10] * 6
    assert constrained.ledger.batch == hyma.ledger.batch == 16
    grid = one.run_method("grid", "linear", 0, None)
    assert grid.ledger.phases["training"].samples_per_pair == 30 * 16
    assert grid.outcome.visits == [30] * 6
    assert sum(grid.ranking.scores["retrieval"]) > sum(constrained.ranking.scores["retrieval"])


@pytest.mark.parametrize("affords", [0.0, 0.5, 2.5, 100.0])
def test_random_trains_what_hymas_flops_afford_and_reports_all(search: Maker, affords: float) -> None:
    one = search()
    task, spec = one.task, one.config.spec("linear")
    dearest = max(task.visit_flops(spec, [k], 16) for k in range(6)) * one.config.grid_steps
    bill = Ledger("hyma", "linear", 0, {"training": Cost(flops=affords * dearest)})
    found = one.run_method("random", "linear", 0, bill)
    trained = [k for k, visits in enumerate(found.outcome.visits) if visits]
    assert all(found.outcome.visits[k] == 30 for k in trained)
    paid = found.ledger.phases["training"].flops
    if affords < 1:
        assert len(trained) == 1
    else:
        assert paid <= affords * dearest
        assert len(trained) >= min(int(affords), 6)
    before = untrained(one, "random")
    after = found.ranking.scores["retrieval"]
    assert len(after) == 6
    assert all(after[k] == before[k] for k in range(6) if k not in trained)
    assert any(after[k] > before[k] for k in trained)


def test_a_grid_pair_does_not_feel_its_neighbours(search: Maker) -> None:
    """The stacked grid gives each pair the connector that it gets when only some of the pairs are trained."""
    one = search()
    grid = one.run_method("grid", "linear", 0, None)
    bill = Ledger("hyma", "linear", 0, {"training": Cost(flops=2.5e6)})
    some = one.run_method("random", "linear", 0, bill)
    trained = [k for k, visits in enumerate(some.outcome.visits) if visits]
    assert 0 < len(trained) < 6
    whole, part = weights_of(grid), weights_of(some)
    for name, value in whole.items():
        if int(name.split(".")[0]) in trained:
            torch.testing.assert_close(part[name], value, atol=1e-5, rtol=1e-4)
        else:
            assert not torch.allclose(part[name], value, atol=1e-3)


def test_the_total_is_the_sum_of_its_parts(search: Maker) -> None:
    one = search(evaluate_every=5)
    found = one.run_method("hyma", "linear", 0, None)
    training, evaluation = found.ledger.phases["training"], found.ledger.phases["evaluation"]
    total = found.ledger.total()
    assert total.flops == training.flops + evaluation.flops
    assert total.seconds == training.seconds + evaluation.seconds
    assert total.peak_bytes == max(training.peak_bytes, evaluation.peak_bytes)
    assert (total.steps, total.samples_per_pair) == (10, 160)
    task, spec = one.task, one.config.spec("linear")
    # Two validations on the way (steps 5 and 10), then validation and test at the end.
    wanted = 3 * task.scoring_flops(spec, task.validation) + task.scoring_flops(spec, task.test)
    assert evaluation.flops == wanted


def weights_of(found: Found) -> dict[str, torch.Tensor]:
    assert found.network is not None
    return all_connectors(found.network, 6)


def run_twice(search: Maker, method: Method, seeds: tuple[int, int]) -> list[Found]:
    bill = Ledger("hyma", "mlp1", 0, {"training": Cost(flops=1e7, samples_per_pair=160)})
    changes = {"connectors": ["mlp1"], "pairs_per_visit": 4}
    return [search(**changes).run_method(method, "mlp1", seed, bill) for seed in seeds]


@pytest.mark.parametrize(
    "method", ["hyma", "grid", "constrained-grid", "random", "halving", "mordal", "whitened", "consensus"]
)
def test_the_same_seed_gives_the_same_ranking_twice(search: Maker, method: Method) -> None:
    one, other = run_twice(search, method, (0, 0))
    assert one.ranking == other.ranking
    assert one.ledger.phases["training"].flops == other.ledger.phases["training"].flops
    weights = [weights_of(found) for found in (one, other)]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_another_seed_gives_another_training(search: Maker) -> None:
    one, other = run_twice(search, "hyma", (0, 1))
    weights = [weights_of(found) for found in (one, other)]
    assert not any(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_all_connectors_are_each_pairs_own(task: VLMTask) -> None:
    spec = SearchConfig(connectors=["linear"]).spec("linear")
    bank = ConnectorBank(task.grid, spec, 0)
    found = all_connectors(bank, len(task.grid))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        name: shape
        for k in range(len(task.grid))
        for name, shape in (
            (f"{k}.0.weight", task.grid.shape(k)[::-1]),
            (f"{k}.0.bias", task.grid.shape(k)[1:]),
        )
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": ["grid", "random"]}, "list hyma too"),
        ({"methods": []}, "at least one entry"),
        ({"seeds": []}, "at least one entry"),
        ({"connectors": []}, "at least one entry"),
        ({"connectors": ["mlp"]}, "'mlp' is unknown"),
        ({"steps": 0}, "search.steps is 0"),
        ({"grid_steps": -1}, "search.grid_steps is -1"),
        ({"similarity_rows": 1}, "search.similarity_rows is 1"),
        ({"methods": ["hyma", "gird"]}, "There is no method gird"),
        ({"methods": ["halving"]}, "list hyma too, or set search.budget"),
        ({"methods": ["cka", "unimodal"]}, "training-free methods only"),
        ({"methods": ["hyma", "random"], "budget": Budget(seconds=3)}, "how many pairs it can train"),
        ({"methods": ["hyma"], "budget": Budget(seconds=3), "polish": PolishConfig(top=1)}, "search.polish.top to 0"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(HymaError, match=sentence):
        SearchConfig(**changes)  # type: ignore[arg-type]


def test_more_than_there_is_is_refused(search: Maker) -> None:
    with pytest.raises(HymaError, match="pairs_per_visit is 7 but the grid has 6 pairs"):
        search(pairs_per_visit=7).run_method("hyma", "linear", 0, None)
    with pytest.raises(HymaError, match=r"search\.batch is 71 but the training split has 70 rows"):
        search(batch=71).run_method("grid", "linear", 0, None)


def test_every_name_has_a_method_and_every_method_a_name() -> None:
    assert list(METHODS) == list(get_args(Method))
    assert SearchConfig().handed_over() == "hyma"
    assert SearchConfig(methods=["cka", "whitened", "grid"]).handed_over() == "whitened"
    assert SearchConfig(methods=["grid", "cka", "hyma"]).ordered_methods() == ["hyma", "grid", "cka"]


@pytest.mark.parametrize(
    ("changes", "base", "sentence"),
    [
        ({"methods": ["hyma", "cka"]}, "factored", "search.methods lists cka"),
        ({"methods": ["whitened", "hyma"]}, "factored", "search.methods lists whitened"),
        ({"warm_start": "ridge"}, "shape", "search.warm_start is ridge"),
        ({}, "closed_form", "search.closed_form.kind is consensus"),
    ],
)
def test_what_an_mllm_search_cannot_do_is_refused(changes: dict[str, object], base: str, sentence: str) -> None:
    with pytest.raises(HymaError, match=sentence):
        SearchConfig(**changes).check_causal(base)  # type: ignore[arg-type]
    SearchConfig().check_causal("factored")
    SearchConfig(methods=["hyma", "halving"]).check_causal(None)
    SearchConfig(methods=["hyma", "words"], warm_start="words").check_causal(None)
    SearchConfig(closed_form=ClosedFormConfig("words")).check_causal("closed_form")


@pytest.mark.parametrize(
    ("changes", "base", "sentence"),
    [
        ({"methods": ["hyma", "words"]}, "factored", "search.methods lists words"),
        ({"warm_start": "words"}, "shape", "search.warm_start is words"),
        ({"closed_form": ClosedFormConfig("words")}, "closed_form", "search.closed_form.kind is words"),
    ],
)
def test_what_a_search_over_encoders_cannot_do_is_refused(changes: dict[str, object], base: str, sentence: str) -> None:
    with pytest.raises(HymaError, match=sentence):
        SearchConfig(**changes).check_contrastive(base)  # type: ignore[arg-type]
    SearchConfig(closed_form=ClosedFormConfig("words"), warm_start="ridge").check_contrastive("factored")

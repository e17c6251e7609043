"""Rivals that train nothing, closed-form starts on the bill, and polished pairs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from hyma_mllm.data.rows import Row
from hyma_mllm.errors import HymaError
from hyma_mllm.search.budget import Budget
from hyma_mllm.search.closed_form import ClosedForm, ClosedFormConfig, closed_forms
from hyma_mllm.search.config import PolishConfig
from hyma_mllm.search.flops import as_connector_flops
from hyma_mllm.search.free import labels_of
from hyma_mllm.search.interrupt import SearchInterruptedError, StopRequest
from hyma_mllm.search.ledger import Cost
from hyma_mllm.search.linear_start import training_start
from hyma_mllm.search.method import all_connectors, all_states
from hyma_mllm.search.methods import Method, Search
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.search.polish import added
from hyma_mllm.search.similarity import Measure, pair_scores, views
from hyma_mllm.search.starts import contrastive
from hyma_mllm.search.task import VLMTask
from hyma_mllm.search.unimodal import unimodal_scores

Maker = Callable[..., Search]


def the_task(search: Search) -> VLMTask:
    assert isinstance(search.task, VLMTask)
    return search.task


def states(search: Search, kind: ClosedForm, connector: str) -> tuple[list[dict[str, torch.Tensor]], float]:
    """Closed-form connectors and their FLOPs, without the door that is tested."""
    spec, task = search.config.spec(connector), the_task(search)
    found = closed_forms(task, ClosedFormConfig(kind=kind, strength=search.config.closed_form.strength))
    written = sum(as_connector_flops(spec, task.grid.shape(pair)) for pair in range(6))
    return [training_start(state, spec) for state in found.states], found.flops + written


@pytest.mark.parametrize("kind", get_args(ClosedForm))
@pytest.mark.parametrize("connector", ["linear", "mlp1"])
def test_a_closed_form_is_scored_as_it_is(search: Maker, kind: ClosedForm, connector: str) -> None:
    one = search(connectors=[connector], closed_form=ClosedFormConfig(strength=0.5))
    found = one.run_method(kind, connector, 0, None)
    wanted, flops = states(one, kind, connector)
    assert found.network is not None
    kept = all_states(found.network, 6)
    assert all(torch.equal(kept[k][name], value) for k in range(6) for name, value in wanted[k].items())
    assert found.ranking.order_by is None and set(found.ranking.scores) == {"retrieval", "zero-shot/latent"}
    paid = found.ledger.phases["training"]
    assert (paid.flops, paid.steps, paid.samples_per_pair) == (flops, 0, 70)
    assert found.ledger.batch == 0 and paid.seconds > 0
    assert sum(found.ranking.scores["retrieval"]) / 6 > 60  # chance is 17


@pytest.mark.parametrize("measure", ["cka", "mutual-knn", "cca", "gromov-wasserstein"])
def test_a_measure_ranks_without_a_score(search: Maker, measure: Measure) -> None:
    one = search()
    found = one.run_method(measure, "linear", 3, None)
    wanted, flops = pair_scores(measure, views(the_task(one), 2000, 3), one.task.grid, 3)
    assert found.ranking.order_by == wanted and not found.ranking.scores and found.network is None
    assert set(found.ledger.phases) == {"evaluation"}
    assert found.ledger.phases["evaluation"].flops == flops > 0
    assert found.ledger.total().samples_per_pair == 0


def test_the_unimodal_rival_reads_the_labels(search: Maker) -> None:
    one = search()
    labels = torch.arange(120) % 4
    one.labels = labels
    found = one.run_method("unimodal", "linear", 0, None)
    assert found.ranking.order_by == unimodal_scores(the_task(one), labels, 2000, 0)[0]
    line = json.loads((one.run.path / "log.jsonl").read_text().splitlines()[-1])
    assert line["event"] == "unimodal" and line["measures"]


@pytest.mark.parametrize("method", ["grid", "random", "halving"])
def test_a_warm_start_begins_at_the_closed_form_and_pays_for_it(search: Maker, method: Method) -> None:
    one = search(warm_start="ridge", budget=Budget(samples=400), grid_steps=3)
    spec = one.config.spec("linear")
    wanted, flops = states(one, "ridge", "linear")
    begun = all_states(one.network(method, spec, 0), 6)
    assert all(torch.equal(begun[k][name], value) for k in range(6) for name, value in wanted[k].items())
    found = one.run_method(method, "linear", 0, None)
    price = [one.task.visit_flops(spec, [pair], 16) for pair in range(6)]
    trained = sum(count * cost for count, cost in zip(found.outcome.visits, price, strict=True))
    paid = found.ledger.phases["training"]
    assert paid.flops == pytest.approx(flops + trained, rel=1e-12)
    visited = 6 if method != "random" else sum(count > 0 for count in found.outcome.visits)
    assert paid.samples_per_pair == 70 + 16 * sum(found.outcome.visits) / visited


def test_hyma_adds_to_the_closed_form_and_pays_for_it(search: Maker) -> None:
    one, plain = search(base="closed_form", connectors=["mlp1"]), search(base="factored", connectors=["mlp1"])
    spec = one.config.spec("mlp1")
    wanted, flops = states(one, "consensus", "mlp1")
    begun = all_states(one.network("hyma", spec, 0), 6)
    for k in range(6):
        for name, value in wanted[k].items():
            torch.testing.assert_close(begun[k][name], value, atol=1e-6, rtol=1e-5)
    bills = [each.run_method("hyma", "mlp1", 0, None).ledger.phases["training"] for each in (one, plain)]
    assert bills[0].flops == pytest.approx(bills[1].flops + flops, rel=1e-12)


def test_another_task_has_no_closed_form(search: Maker) -> None:
    with pytest.raises(HymaError, match="The method cka needs stored features of both sides"):
        contrastive(object(), "The method cka")  # type: ignore[arg-type]


POLISH = PolishConfig(top=2, steps=40, optimiser=OptimiserConfig(lr=1e-2))


def test_polishing_trains_the_best_pairs_only_and_keeps_the_better_connector(search: Maker) -> None:
    before = search(steps=3).run_method("hyma", "linear", 0, None)
    one = search(steps=3, polish=POLISH)
    after = one.run_method("hyma", "linear", 0, None)
    scores = before.ranking.details["validation retrieval"]
    top = sorted(sorted(range(6), key=lambda pair: -scores[pair])[:2])
    line = next(line for line in map(json.loads, (one.run.path / "log.jsonl").open()) if line["event"] == "polished")
    assert line["pairs"] == top and line["kept"]  # so few steps leave something to be gained
    now = after.ranking.details["validation retrieval"]
    assert before.network is not None and after.network is not None
    old, new = all_connectors(before.network, 6), all_connectors(after.network, 6)
    for name, value in old.items():
        assert torch.equal(new[name], value) == (int(name.split(".")[0]) not in line["kept"])
    for pair in range(6):
        assert now[pair] > scores[pair] if pair in line["kept"] else now[pair] == scores[pair]
    # 40 steps of two of six pairs are on the bill, and no validation is left out.
    task, spec = the_task(one), one.config.spec("linear")
    extra = 40 * sum(task.visit_flops(spec, [pair], 16) for pair in top)
    bills = [found.ledger.phases["training"] for found in (before, after)]
    assert bills[1].flops == pytest.approx(bills[0].flops + extra, rel=1e-12)
    assert bills[1].steps == 43 and bills[1].samples_per_pair == 3 * 16 + 40 * 16 * 2 / 6
    validations = 2 * task.scoring_flops(spec, task.validation)
    evaluations = [found.ledger.phases["evaluation"].flops for found in (before, after)]
    assert evaluations[1] == pytest.approx(evaluations[0] + validations, rel=1e-12)


def test_polishing_is_within_the_budget(search: Maker) -> None:
    # 40 steps of two of six pairs take as many samples as 14 steps of all.
    found = search(budget=Budget(samples=20 * 16), polish=POLISH).run_method("hyma", "linear", 0, None)
    assert sorted(found.outcome.visits) == [6] * 4 + [46] * 2
    assert found.ledger.phases["training"].samples_per_pair <= 20 * 16
    whole = search(budget=Budget(flops=2e8), polish=POLISH).run_method("hyma", "linear", 0, None)
    assert whole.outcome.step > 40 and whole.ledger.phases["training"].flops <= 2e8
    with pytest.raises(HymaError, match=r"search\.polish alone takes"):
        search(budget=Budget(flops=1e6), polish=POLISH).run_method("hyma", "linear", 0, None)


class StopAt(StopRequest):
    """A signal that comes after some looks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.left = looks

    def __bool__(self) -> bool:
        self.left -= 1
        self.signal = "SIGINT"
        return self.left < 0


def test_polishing_that_was_stopped_goes_on_without_training_again(search: Maker) -> None:
    changes = {"steps": 6, "polish": POLISH, "checkpoint_every": 5}
    straight = search(**changes).run_method("hyma", "linear", 0, None)
    broken = search(**changes)
    broken.stop = StopAt(20)
    with pytest.raises(SearchInterruptedError, match="hyma-linear-0/polish"):
        broken.run_method("hyma", "linear", 0, None)
    broken.accelerator.free_memory()
    broken.stop = StopRequest()
    resumed = broken.run_method("hyma", "linear", 0, None)
    assert resumed.ranking == straight.ranking
    lines = [json.loads(line) for line in (broken.run.path / "log.jsonl").open()]
    assert [line["method"] for line in lines if line["event"] == "resumed"] == ["hyma", "hyma+polish"]
    assert sum(line["event"] == "step" and line["method"] == "hyma" for line in lines) == 6
    for phase, cost in straight.ledger.phases.items():
        assert resumed.ledger.phases[phase].flops == cost.flops


def test_two_bills_are_one() -> None:
    found = added(Cost(10.0, 5, 1e3, 2.0, 7), Cost(30.0, 4, 1e2, 1.0, 9), pairs=6, of=2)
    assert found == Cost(20.0, 9, 1.1e3, 3.0, 9)


@pytest.mark.parametrize(
    ("values", "sentence"), [({"top": -1}, "polish.top is -1"), ({"steps": 0}, "polish.steps is 0")]
)
def test_what_cannot_be_polished_is_refused(values: dict[str, int], sentence: str) -> None:
    with pytest.raises(HymaError, match=sentence):
        PolishConfig(**values)  # type: ignore[arg-type]


def test_labels_are_numbered_per_class_set() -> None:
    def row(label: str | None, of: str | None = "a") -> Row:
        return Row("k", Path("x"), ("t",), "c", label, of)

    found = labels_of([row("dog"), row(None), row("cat"), row("dog", "b"), row("dog")])
    assert found is not None and found.tolist() == [1, -1, 0, 2, 1]
    assert labels_of([row("dog"), row(None)]) is None and labels_of([]) is None

"""Every pair goes as far from its closed form as its validation score likes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyma_mllm.errors import HymaError
from hyma_mllm.hypernetwork.network import Hypernetwork
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.blend import between
from hyma_mllm.search.config import PolishConfig, SearchConfig
from hyma_mllm.search.method import all_states
from hyma_mllm.search.methods import Search
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.search.task import VLMTask

Maker = Callable[..., Search]
SHARES = [0.0, 0.3, 1.0]


@pytest.mark.parametrize("connector", ["linear", "mlp1"])
@pytest.mark.parametrize("rate", [3e-2, 3e-4])
def test_each_pair_holds_the_best_of_the_way(search: Maker, task: VLMTask, connector: str, rate: float) -> None:
    options = {"optimiser": OptimiserConfig(lr=rate), "steps": 12}
    one = search("closed-form", blend=SHARES, **options)
    spec, grid = one.config.spec(connector), one.task.grid
    found = one.run_method("hyma", connector, 0, None)
    assert isinstance(found.network, ConnectorBank)
    plain = search("closed-form", blend=[1.0], **options).run_method("hyma", connector, 0, None)
    assert isinstance(plain.network, Hypernetwork)

    starts = one.starts("hyma", spec)
    assert starts is not None
    trained, held = all_states(plain.network, len(grid)), all_states(found.network, len(grid))
    lines = map(json.loads, (one.run.path / "log.jsonl").open())
    chosen = next(line["shares"] for line in lines if line["event"] == "blended")
    table = []
    for share in SHARES:
        states = [{k: s[k] + share * (t[k] - s[k]) for k in s} for s, t in zip(starts.states, trained, strict=True)]
        table.append(one.task.validate(ConnectorBank(grid, spec, 0, states), spec).scores["retrieval"])
        for pair in (pair for pair in range(len(grid)) if chosen[pair] == share):
            for name, value in held[pair].items():
                torch.testing.assert_close(value, states[pair][name], rtol=1e-5, atol=1e-6)
    scores = torch.tensor(table)
    assert found.ranking.details["validation retrieval"] == pytest.approx(scores.amax(0).tolist(), abs=1e-6)
    last = [max(share for share, line in zip(SHARES, table, strict=True) if line[k] == max(c)) for k, c in
            enumerate(zip(*table, strict=True))]  # fmt: skip
    assert chosen == last

    looks = found.ledger.phases["evaluation"].flops - plain.ledger.phases["evaluation"].flops
    assert looks == pytest.approx(len(SHARES) * task.scoring_flops(spec, task.validation))
    assert found.ledger.phases["training"].flops == plain.ledger.phases["training"].flops


def test_nothing_is_blended_without_a_closed_form(search: Maker) -> None:
    assert isinstance(search("default").run_method("hyma", "linear", 0, None).network, Hypernetwork)


def test_a_blended_pair_is_polished_from_what_it_holds(search: Maker) -> None:
    polish = PolishConfig(top=2, steps=5, optimiser=OptimiserConfig(lr=1e-3))
    blended = search("closed-form").run_method("hyma", "linear", 0, None)
    found = search("closed-form", polish=polish).run_method("hyma", "linear", 0, None)
    before, after = (one.ranking.details["validation retrieval"] for one in (blended, found))
    assert all(b >= a for a, b in zip(before, after, strict=True))


def test_whoever_is_stopped_while_polishing_pays_for_the_looks_once(search: Maker, tmp_path: Path) -> None:
    polish = PolishConfig(top=1, steps=4, optimiser=OptimiserConfig(lr=1e-3))
    first = search("closed-form", polish=polish, checkpoint_every=2)
    again = search("closed-form", polish=polish, checkpoint_every=2)
    bill = first.run_method("hyma", "linear", 0, None).ledger.phases
    # Killed behind the last checkpoint of the hypernetwork, before the first of the polishing.
    kept = first.run.path / "checkpoints"
    assert kept.is_dir()
    shutil.copytree(kept, again.run.path / "checkpoints")
    for polished in (again.run.path / "checkpoints").rglob("polish"):
        shutil.rmtree(polished)
    resumed = again.run_method("hyma", "linear", 0, None).ledger.phases
    assert "resumed" in (again.run.path / "log.jsonl").read_text()
    for phase, cost in bill.items():
        assert (resumed[phase].flops, resumed[phase].steps) == (cost.flops, cost.steps)


def test_the_ends_of_the_way_are_exact() -> None:
    start: dict[str, Tensor] = {"w": torch.randn(3, 2)}
    end = {"w": torch.randn(3, 2)}
    assert torch.equal(between(start, end, 0.0)["w"], start["w"])
    assert torch.equal(between(start, end, 1.0)["w"], end["w"])
    torch.testing.assert_close(between(start, end, 0.5)["w"], (start["w"] + end["w"]) / 2)


@pytest.mark.parametrize("shares", [[], [1.5], [-0.1, 1.0], [float("nan")]])
def test_shares_are_between_start_and_end(shares: list[float]) -> None:
    with pytest.raises(HymaError, match=r"search\.blend"):
        SearchConfig(blend=shares)

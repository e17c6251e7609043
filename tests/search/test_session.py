from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from hyma_mllm.errors import HymaError
from hyma_mllm.hypernetwork.presets import HypernetworkConfig
from hyma_mllm.objectives.contrastive import ContrastiveConfig, ContrastiveObjective
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.search import session
from hyma_mllm.search.interrupt import SearchInterruptedError, StopRequest
from hyma_mllm.search.ledger import Cost, Ledger
from hyma_mllm.search.methods import Found, Method, Search, SearchConfig, all_connectors
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.search.task import VLMTask

EMBEDDING = Cost(samples_per_pair=120, flops=5.0, seconds=1.0)
FAST = OptimiserConfig(lr=1e-2)


class StopAfter(StopRequest):
    """A signal that comes after some looks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.left = looks

    def __bool__(self) -> bool:
        self.left -= 1
        self.signal = "SIGINT"
        return self.left < 0


class CountedSearch(Search):
    """Keeps the names of the trainings that it began."""

    began: list[str]
    found: dict[str, Found]

    def run_method(self, method: Method, connector: str, seed: int, hyma: Ledger | None) -> Found:
        name = f"{method}-{connector}-{seed}"
        self.began.append(name)
        self.found[name] = super().run_method(method, connector, seed, hyma)
        return self.found[name]


Maker = Callable[..., CountedSearch]


@pytest.fixture
def search(task: VLMTask, tmp_path: Path, accelerator: Accelerator) -> Maker:
    def make(
        folder: str = "run", stop: StopRequest | None = None, methods: list[Method] | None = None
    ) -> CountedSearch:
        config = SearchConfig(
            methods=methods or ["random", "grid", "hyma", "constrained-grid"],
            connectors=["linear"],
            hidden=8,
            seeds=[3, 4],
            steps=6,
            grid_steps=9,
            batch=16,
            optimiser=FAST,
            rival_optimiser=FAST,
            evaluate_every=3,
            checkpoint_every=2,
        )
        found = CountedSearch(
            config,
            HypernetworkConfig(),
            partial(ContrastiveObjective, ContrastiveConfig(scale=20.0)),
            task,
            None,
            None,
            accelerator,
            RunDirectory(tmp_path / folder, {}),
            StopRequest() if stop is None else stop,
        )
        found.began, found.found = [], {}
        return found

    return make


ALL = [f"{method}-linear-{seed}" for seed in (3, 4) for method in ("hyma", "random", "grid", "constrained-grid")]


def test_hyma_comes_first_and_all_results_are_on_disk(search: Maker) -> None:
    one = search()
    rankings, ledgers = session.run_all(one, EMBEDDING)
    assert one.began == ALL == [f"{r.method}-{r.connector}-{r.seed}" for r in rankings]
    assert [ledger.method for ledger in ledgers] == [ranking.method for ranking in rankings]
    assert {path.stem for path in (one.run.path / "results").iterdir()} == set(ALL)
    assert all(ledger.phases["embedding"] == EMBEDDING for ledger in ledgers)
    assert all(
        ledger.total().flops == sum(ledger.phases[p].flops for p in ("training", "evaluation")) for ledger in ledgers
    )
    kept = {path.stem for path in (one.run.path / "connectors").iterdir()}
    assert kept == {"hyma-linear-3", "grid-linear-3"}
    saved = load_file(one.run.path / "connectors" / "hyma-linear-3.safetensors")
    wanted = all_connectors(one.found["hyma-linear-3"].network, 6)
    assert all(torch.equal(saved[name], value) for name, value in wanted.items())
    assert not list((one.run.path / "checkpoints").glob("*/step-*"))


def test_what_is_finished_is_not_trained_again(search: Maker) -> None:
    one = search()
    first = session.run_all(one, EMBEDDING)
    one.run.close()
    again = search()
    assert session.run_all(again, EMBEDDING) == first
    assert again.began == []
    (again.run.path / "results" / "random-linear-4.json").unlink()
    again.run.close()
    third = search()
    rankings, ledgers = session.run_all(third, EMBEDDING)
    assert third.began == ["random-linear-4"]
    assert rankings == first[0]
    # It was held to the stored bill of HYMA.
    assert [led.phases["training"].flops for led in ledgers] == [led.phases["training"].flops for led in first[1]]


@pytest.mark.parametrize("looks", [1, 8])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(search: Maker, looks: int) -> None:
    straight, _ = session.run_all(search("straight"), EMBEDDING)
    broken = search("broken", StopAfter(looks))
    with pytest.raises(SearchInterruptedError, match="run the same command again to go on"):
        session.run_all(broken, EMBEDDING)
    broken.accelerator.free_memory()
    broken.run.close()
    done = len(list((broken.run.path / "results").glob("*.json")))
    resumed = search("broken")
    rankings, _ = session.run_all(resumed, EMBEDDING)
    assert rankings == straight
    assert resumed.began == ALL[done:]


def test_rivals_of_every_kind_are_kept_and_read_again(search: Maker) -> None:
    one = search(methods=["cka", "halving", "whitened", "hyma"])
    first = session.run_all(one, EMBEDDING)
    assert [ranking.method for ranking in first[0][:4]] == ["hyma", "cka", "halving", "whitened"]
    kept = {path.stem for path in (one.run.path / "connectors").iterdir()}
    assert kept == {"hyma-linear-3", "halving-linear-3", "whitened-linear-3"}
    bills = {ledger.method: ledger.phases for ledger in first[1] if ledger.seed == 3}
    assert bills["halving"]["training"].flops <= bills["hyma"]["training"].flops
    assert "training" not in bills["cka"]
    one.run.close()
    again = search(methods=["cka", "halving", "whitened", "hyma"])
    assert session.run_all(again, EMBEDDING) == first
    assert again.began == []


def test_a_search_without_hyma_is_a_search(search: Maker) -> None:
    one = search(methods=["grid"])
    rankings, _ = session.run_all(one, EMBEDDING)
    assert [ranking.seed for ranking in rankings] == [3, 4]


def test_sizes_are_said(search: Maker) -> None:
    said: list[str] = []
    session.print_sizes(search(), said.append)
    assert len(said) == 1
    connectors = sum(
        search("other").config.spec("linear").parameters(*shape)
        for shape in ((20, 16), (20, 16), (12, 16), (20, 24), (20, 24), (12, 24))
    )
    assert f"6 connectors {connectors / 1e6:.2f} M" in said[0] and said[0].startswith("linear: hypernetwork")


@pytest.mark.parametrize("content", ["{}", '{"ranking": {}, "ledger": {"phases": {"training": {"miles": 1}}}}'])
def test_a_result_that_is_none_is_named(search: Maker, content: str) -> None:
    one = search()
    (one.run.path / "results").mkdir()
    (one.run.path / "results" / "hyma-linear-3.json").write_text(content)
    with pytest.raises(HymaError, match=r"results/hyma-linear-3.json of the run directory is not a result"):
        session.run_all(one, EMBEDDING)


def test_changed_inputs_are_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", {})
    session.hold_inputs(run, {"photos": "1", "dinov2": "a"})
    session.hold_inputs(run, {"photos": "1", "dinov2": "a"})
    with pytest.raises(HymaError, match=r"photos has changed since the run .* began \(it was 1, it is 2\)"):
        session.hold_inputs(run, {"photos": "2", "dinov2": "a"})

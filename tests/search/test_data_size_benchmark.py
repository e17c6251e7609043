"""The data-size benchmark on the synthetic task: who runs how often, what is kept, the lines of its table."""

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hyma_mllm.search.methods import Search
from hyma_mllm.search.ranking import interval
from hyma_mllm.search.task import VLMTask


@pytest.fixture
def data_size(
    load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, search: Callable[..., Search]
) -> ModuleType:
    """The script, its data in the place of the built-in default's."""
    script = load_script("data_size")

    def bench(arguments: Namespace, unit: Callable[..., Any]) -> Any:
        def make(changes: dict[str, Any], scale: float | None, hypernetwork: dict[str, Any]) -> Search:
            made = search(hypernetwork.get("preset", "closed-form"), **changes)
            assert isinstance(made.task, VLMTask)
            made.task = replace(made.task, train=made.task.train[: arguments.limit or None])
            return made

        rows = arguments.limit or 70
        return script.fidelity.Bench(make, unit, {"splits": {"train": rows, "test": 30}})

    monkeypatch.setattr(script.fidelity, "vlm_bench", bench)
    return script


def test_every_size_is_run_once_and_the_curve_is_the_mean_over_seeds(data_size: ModuleType, tmp_path: Path) -> None:
    arguments = Namespace(run=tmp_path, connectors=["linear", "mlp1"], seeds=2, split_seed=2, threads=1)
    sizes = [data_size.run_size(limit, arguments) for limit in (40, 0)]
    assert [size["pictures"] for size in sizes] == [40, 70]
    for size in sizes:
        assert len(size["runs"]) == 2 * (4 * 2 + 3)  # the closed forms have no seed
        for seed in (0, 1):
            same = {run["label"]: run for run in size["runs"] if (run["connector"], run["seed"]) == ("linear", seed)}
            assert 0 < same["constrained grid"]["flops"] <= same["hyma"]["flops"]
    kept = sorted(tmp_path.rglob("*.json"))
    ages = [path.stat().st_mtime_ns for path in kept]
    assert [data_size.run_size(limit, arguments) for limit in (40, 0)] == json.loads(json.dumps(sizes))
    assert [path.stat().st_mtime_ns for path in kept] == ages

    found = data_size.lines(sizes)
    assert len(found) == 2 * 2 * 7
    line = next(x for x in found if (x["pictures"], x["connector"], x["label"]) == (40, "mlp1", "grid"))
    runs = [run for run in sizes[0]["runs"] if (run["connector"], run["label"]) == ("mlp1", "grid")]
    assert line["mean"] == interval([float(np.mean(run["test"])) for run in runs])
    best = [run["test"][run["validation"].index(max(run["validation"]))] for run in runs]
    assert line["handed_over"] == interval(best)
    assert data_size.table(found).row_count == 14
    assert data_size.picture(found, tmp_path / "x.png").stat().st_size > 5000

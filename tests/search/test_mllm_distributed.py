"""Two processes search the tiny causal task as one does: with shares of the batch, and with one LLM each."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from hyma_mllm.errors import HymaError
from hyma_mllm.search.placement import IDLE, Placement, place

WORKER = Path(__file__).with_name("mllm_worker.py")


def launch(folder: Path, processes: int) -> str:
    """Run the worker; its output. Judged by what it wrote: gloo's shutdown aborts now and then."""
    folder.mkdir()
    launcher = [sys.executable]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(
        [*launcher, str(WORKER), str(folder)], capture_output=True, text=True, env=environment, timeout=400, check=False
    )
    return found.stdout + found.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("mllm")
    for processes in (1, 2):
        output = launch(base / str(processes), processes)
        assert (base / str(processes) / "pairs-grid.json").exists(), output[-3000:]
    return base / "1", base / "2"


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["hyma", "grid"])
@pytest.mark.parametrize("parallel", ["data", "pairs"])
def test_two_processes_find_what_one_finds(folders: tuple[Path, Path], parallel: str, method: str) -> None:
    one, two = folders
    facts = [json.loads((folder / f"{parallel}-{method}.json").read_text()) for folder in folders]
    assert [fact["world"] for fact in facts] == [1, 2]
    assert facts[0]["held"] == [0, 1]
    assert len(facts[1]["held"]) == (1 if parallel == "pairs" else 2)
    single, double = load_file(one / f"{parallel}-{method}.st"), load_file(two / f"{parallel}-{method}.st")
    assert set(single) == set(double)
    for name, value in single.items():
        torch.testing.assert_close(double[name], value, atol=2e-4, rtol=0)
    for name, values in facts[0]["details"].items():
        assert facts[1]["details"][name] == pytest.approx(values, abs=1e-3)
    assert facts[1]["flops"] == pytest.approx(facts[0]["flops"], rel=1e-6)


@given(
    costs=st.lists(st.floats(0.1, 10), min_size=1, max_size=9),
    processes=st.integers(1, 9),
)
def test_every_llm_has_one_process_and_every_process_an_llm(costs: list[float], processes: int) -> None:
    if processes > len(costs) and processes > 1:
        with pytest.raises(HymaError, match=r"search\.parallel is pairs"):
            place("pairs", costs, processes, 0)
        return
    found = [place("pairs", costs, processes, process) for process in range(processes)]
    for llm in range(len(costs)):
        assert sum(one.here(llm) for one in found) == 1
    assert all(any(one.here(llm) for llm in range(len(costs))) for one in found)


def test_all_processes_take_as_many_turns_and_each_visit_once() -> None:
    groups, visits = [0, 1, 2, 0, 1, 2], [[0, 3], [4, 1], [2, 5]]
    turns = [Placement(2, process, (0, 1, 1)).turns(visits, groups) for process in (0, 1)]
    assert turns == [[(0, 2.0), (IDLE, 0.0)], [(1, 2.0), (2, 2.0)]]
    assert Placement(2, 1).turns(visits, groups) == [(0, 1.0), (1, 1.0), (2, 1.0)]

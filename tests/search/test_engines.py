"""Every file of accelerate_configs that a CPU can start: tiny tasks, interrupted and resumed, train as one process."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("launch_worker.py")
CONFIGS = Path(__file__).parents[2] / "accelerate_configs"
KINDS = ("hyma", "bank", "nan", "data", "pairs")
FILES = {"hyma": "hyma", "bank": "bank", "nan": "nan"} | {
    f"{parallel}-{method}": parallel for parallel in ("data", "pairs") for method in ("hyma", "grid")
}

Started = tuple[subprocess.Popen[str], ...]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(config: str, folder: Path, processes: int, kinds: tuple[str, ...], *options: str) -> subprocess.Popen[str]:
    """`accelerate launch` with a file of ours, as a user would."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += [*options, str(WORKER), str(folder), str(processes), *kinds]
    # DeepSpeed looks for ninja on PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": path, "TQDM_DISABLE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finished(folder: Path, kinds: tuple[str, ...], *started: subprocess.Popen[str]) -> Path:
    """The folder, once the processes are done. Judged by what they wrote: gloo's shutdown aborts now and then."""
    output = "".join(process.communicate(timeout=400)[0] for process in started)
    for name, kind in FILES.items():
        assert kind not in kinds or (folder / f"{name}.json").exists(), output[-6000:]
    return folder


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs a file once, whichever test asks first."""
    base, done = tmp_path_factory.mktemp("engines"), {}

    def run(config: str, processes: int = 2, kinds: tuple[str, ...] = KINDS, flag: str = "") -> Path:
        folder = base / (flag or config)
        if folder not in done:
            folder.mkdir()
            options = ("--main_process_port", free_port(), "--num_processes", str(processes))
            given = (flag, *kinds) if flag else kinds
            done[folder] = finished(folder, kinds, start(config, folder, processes, given, *options))
        return done[folder]

    return run


@pytest.fixture(scope="module")
def alone(launched: Callable[..., Path]) -> Path:
    """What one process finds, uninterrupted."""
    return launched("single", 1)


def check(alone: Path, found: Path, world: int, engine: str, kinds: tuple[str, ...] = KINDS) -> None:
    for name, kind in FILES.items():
        if kind not in kinds:
            continue
        one, many = (json.loads((folder / f"{name}.json").read_text()) for folder in (alone, found))
        assert (one["world"], many["world"]) == (1, world)
        assert many["engine"] == engine
        if "skipped" in one:
            assert one["skipped"] == many["skipped"] == (1 if kind == "nan" else 0)
        assert many["flops"] == pytest.approx(one["flops"], rel=1e-6)
        for detail, values in one.get("details", {}).items():
            assert many["details"][detail] == pytest.approx(values, abs=1e-3)
        single, double = load_file(alone / f"{name}.st"), load_file(found / f"{name}.st")
        assert set(single) == set(double)
        for weight, value in single.items():
            torch.testing.assert_close(
                double[weight], value, atol=2e-4, rtol=0, msg=lambda text, w=weight, n=name: f"{n} {w} {text}"
            )
        check_losses(alone, found, name, kind)


def check_losses(alone: Path, found: Path, name: str, kind: str) -> None:
    """Each step's loss of each pair, once in the log, and a resumption where there was one."""
    method = name.removeprefix(f"{kind}-")
    logs = [[json.loads(line) for line in (folder / kind / "log.jsonl").open()] for folder in (alone, found)]
    logs = [[line for line in log if line.get("method") == method] for log in logs]
    # Steps behind the last checkpoint are taken, and logged, again.
    one, many = ({line["step"]: line["losses"] for line in log if line["event"] == "step"} for log in logs)
    assert set(one) == set(many) and len(one) >= 4
    for step, losses in one.items():
        assert many[step] == pytest.approx(losses, abs=1e-4)
    if kind in ("hyma", "bank"):
        assert any(line["event"] == "resumed" for line in logs[1])
    else:
        assert len([line for line in logs[1] if line["event"] == "step"]) == len(many)


@pytest.mark.distributed
def test_two_cpu_processes(alone: Path, launched: Callable[..., Path]) -> None:
    check(alone, launched("cpu_2"), 2, "MULTI_CPU")


@pytest.mark.engines
@pytest.mark.distributed
def test_four_processes_in_two_groups_of_two(alone: Path, launched: Callable[..., Path]) -> None:
    """The file for several GPUs, with the LLMs in two groups of processes that share every batch."""
    kinds = ("hyma", "pairs")
    found = launched("multi_gpu", 4, kinds)
    check(alone, found, 4, "MULTI_CPU", kinds)
    held = json.loads((found / "pairs-hyma.json").read_text())["held"]
    assert len(held) == 1


@pytest.mark.engines
@pytest.mark.distributed
def test_two_machines(alone: Path, tmp_path: Path) -> None:
    options = ("--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", free_port())
    both = [start("multi_node", tmp_path, 2, ("hyma",), *options, "--machine_rank", str(rank)) for rank in range(2)]
    check(alone, finished(tmp_path, ("hyma",), *both), 2, "MULTI_CPU", ("hyma",))


@pytest.mark.engines
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed(alone: Path, launched: Callable[..., Path], stage: int) -> None:
    pytest.importorskip("deepspeed")
    check(alone, launched(f"deepspeed_zero{stage}"), 2, "DEEPSPEED")


@pytest.mark.slow
@pytest.mark.engines
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_with_offload(alone: Path, launched: Callable[..., Path], stage: int) -> None:
    """DeepSpeed compiles its CPU optimiser at the first start."""
    pytest.importorskip("deepspeed")
    if shutil.which("c++") is None:
        pytest.skip("DeepSpeed's offload needs a C++ compiler")
    kinds = ("hyma",)
    check(alone, launched(f"deepspeed_zero{stage}_offload", 2, kinds), 2, "DEEPSPEED", kinds)


@pytest.mark.engines
@pytest.mark.distributed
def test_fsdp2(alone: Path, launched: Callable[..., Path]) -> None:
    """Accelerate starts none on a CPU: here two CPU processes are told to shard as fsdp2.yaml says."""
    check(alone, launched("cpu_2", flag="fsdp2"), 2, "FSDP")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_says_when_to_use_it_and_keeps_float32(path: Path) -> None:
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("When:" in line for line in head) and any(f"{path.stem}.yaml" in line for line in head)
    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert plain["mixed_precision"] == "no" and plain["use_cpu"] is False

"""SIGKILL of recipes/finetune.py, and the same command again: weights and log must be those of a run in peace."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finetune_run as runs
import pytest

pytestmark = [pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(1500)]

PATIENCE = 300
STEPS = 20
# Eight rows, two by two, three batches to a step: an epoch is of two steps.
TRAINING = ("--batch", 2, "--accumulate", 3, "--epochs", STEPS // 2, "--dropout", 0.3, "--dtype", "fp32")
TRAINING += ("--lr", 0.01, "--projector_lr", 0.01, "--checkpoint_every", 3)

Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    exported = runs.export_model(tmp_path_factory.mktemp("model"))
    data = runs.write_data(tmp_path_factory.mktemp("data"))
    return lambda out, *more: runs.options(exported, data, out, *TRAINING, *more)


def start(options: list[str], output: Path, processes: int = 1) -> list[Any]:
    """The recipe in processes of its own."""
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | quiet | {"ACCELERATE_USE_CPU": "true"}
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    found = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        with output.open("a") as stream:
            told = [sys.executable, str(runs.RECIPE), *options]
            found.append(subprocess.Popen(told, stdout=stream, stderr=stream, env=environment | own))
    return found


def finish(options: list[str], output: Path, processes: int = 1) -> None:
    codes = [process.wait(PATIENCE) for process in start(options, output, processes)]
    assert codes == [0] * processes, output.read_text()[-3000:]


def strike(options: list[str], output: Path, moment: Callable[[], bool], processes: int = 1) -> None:
    """Start, and kill every process at a moment."""
    started, waited = start(options, output, processes), time.monotonic()
    while not moment():
        assert started[0].poll() is None, output.read_text()[-3000:]
        assert time.monotonic() - waited < PATIENCE
        time.sleep(0.001)
    for process in started:
        process.kill()
    assert [process.wait() for process in started] == [-signal.SIGKILL] * processes


def steps(out: Path) -> int:
    log = out / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def test_kills_while_it_trains_and_exports(command: Command, tmp_path: Path) -> None:
    peace, out, output = tmp_path / "peace", tmp_path / "torn", tmp_path / "output.txt"
    finish(command(peace), output)
    assert steps(peace) == STEPS
    moments = [
        lambda: steps(out) == 1,
        lambda: steps(out) >= 6,
        lambda: steps(out) >= 13,
        lambda: (out / "adapter").exists(),
        lambda: any(out.glob(".merged.*.tmp")),
    ]
    for moment in moments:
        strike(command(out), output, moment)
        assert not (out / "merged").exists()
    finish(command(out), output)
    runs.assert_same(out, peace)


@pytest.mark.distributed
def test_kills_of_two_processes(command: Command, tmp_path: Path) -> None:
    peace, out, output = tmp_path / "peace", tmp_path / "torn", tmp_path / "output.txt"
    finish(command(peace), output, 2)
    for done in (4, 8):
        strike(command(out), output, lambda done=done: steps(out) >= done, 2)  # type: ignore[misc]
    assert any((out / "checkpoints").iterdir())
    # One process alone takes other rows in a step.
    [alone] = start(command(out), tmp_path / "alone.txt")
    assert alone.wait(PATIENCE) == 2
    assert "(processes was 2 and is 1)" in (tmp_path / "alone.txt").read_text()
    finish(command(out), output, 2)
    runs.assert_same(out, peace)

"""Many processes fill one store: each row once, the same bytes as by one, whoever is killed, and one line for all."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_store import toy_writer

from hyma_mllm.data.claims import Claims, Owner, claim_name
from hyma_mllm.data.embedding import EmbeddingConfig, StoreTarget, embed
from hyma_mllm.data.features import FeatureStore
from hyma_mllm.data.job_progress import JobProgress
from hyma_mllm.data.manifest import Manifest
from hyma_mllm.data.shared_shards import Progress, SharedShards
from hyma_mllm.data.store_writer import StoreWriter
from hyma_mllm.errors import HymaError

ROWS, WIDTH, SHARD_ROWS = 58, 5, 4
SHARDS = 15
KEYS = [f"row/{row}" for row in range(ROWS)]
CONFIG = EmbeddingConfig(batch_size=2, shard_rows=SHARD_ROWS, workers=2)
ELSEWHERE = replace(Owner.myself(), machine="elsewhere", token="other")


def load(item: int) -> Tensor:
    return torch.cos(torch.arange(WIDTH) * 3.0 + item)


def forward(items: list[Tensor]) -> dict[str, Tensor]:
    return {"a": torch.stack(items).exp()}


def target(path: Path, model: str = "toy") -> StoreTarget:
    return StoreTarget(path, model, "r1", "image", WIDTH, unit_norm=False)


def fill(path: Path, log: list[int] | None = None, config: EmbeddingConfig = CONFIG, rows: int = ROWS) -> FeatureStore:
    def logged(item: int) -> Tensor:
        if log is not None:
            log.append(item)
        return load(item)

    return embed(KEYS[:rows], logged, forward, {"a": target(path)}, "s1", config, "toy")["a"]


def writer(path: Path) -> StoreWriter:
    """Of a store that was begun."""
    made = toy_writer(path, KEYS, WIDTH, SHARD_ROWS)
    with made.lock():
        made.start()
    return made


def rows_of(made: StoreWriter, shard: int) -> Tensor:
    return torch.stack([load(item) for item in made.rows_of(shard)]).exp()


def contents(path: Path) -> dict[str, bytes]:
    """All that a reader of the store sees, but what the manifest says of seconds."""
    files = {file.name: file.read_bytes() for file in path.iterdir() if file.name != ".lock"}
    manifest = Manifest.read(path / "manifest.json")
    return files | {"manifest.json": replace(manifest, seconds=0.0).to_json().encode()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store as one process writes it."""
    path = tmp_path_factory.mktemp("whole") / "store"
    torch.testing.assert_close(fill(path)[:], torch.stack([load(item) for item in range(ROWS)]).exp())
    return contents(path)


WORKER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import test_shared_embedding as t

path, log, seconds, sticks_at = Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])
shown = open(log, "a")
batches = 0

def load(item):
    print("load", item, file=shown, flush=True)
    return t.load(item)

def forward(items):
    global batches
    batches += 1
    if batches == sticks_at:
        print("stuck", file=shown, flush=True)
        time.sleep(600)
    time.sleep(seconds)
    return t.forward(items)

print("ready", file=shown, flush=True)
while not (path.parent / "go").exists():
    time.sleep(0.005)
rows = len(t.embed(t.KEYS, load, forward, {"a": t.target(path)}, "s1", t.CONFIG, "toy")["a"])
print("rows", rows, file=shown, flush=True)
"""


class Workers:
    """Processes that were started by themselves and fill one store together."""

    def __init__(self, folder: Path, sticks_at: list[int], seconds: float = 0.05) -> None:
        self.store = folder / "store"
        self.logs = [folder / f"{number}.log" for number in range(len(sticks_at))]
        here = os.fspath(Path(__file__).parent)
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(WORKER), here, self.store, log, str(seconds), str(at)],
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for log, at in zip(self.logs, sticks_at, strict=True)
        ]
        for number in range(len(sticks_at)):
            self.wait_for(number, "ready")
        (folder / "go").touch()

    def lines(self, number: int) -> list[str]:
        return self.logs[number].read_text().splitlines() if self.logs[number].exists() else []

    def wait_for(self, number: int, line: str) -> None:
        deadline = time.monotonic() + 120
        while line not in self.lines(number):
            assert self.processes[number].poll() is None, self.processes[number].communicate()[1]
            assert time.monotonic() < deadline, f"no {line} from {number}"
            time.sleep(0.02)

    def loaded(self, number: int) -> list[int]:
        return [int(line.split()[1]) for line in self.lines(number) if line.startswith("load ")]

    def end(self, number: int) -> str:
        """What a worker that must end well wrote to its terminal."""
        shown = self.processes[number].communicate(timeout=120)[1]
        assert self.processes[number].returncode == 0, shown
        assert self.lines(number)[-1] == f"rows {ROWS}"
        return shown

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.mark.distributed
def test_three_processes_compute_each_row_once(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with Workers(tmp_path, sticks_at=[0, 0, 0]) as workers:
        shown = [workers.end(number) for number in range(3)]
    assert Counter(item for number in range(3) for item in workers.loaded(number)) == Counter(range(ROWS))
    assert all(workers.loaded(number) for number in range(3))
    assert contents(workers.store) == whole
    # Each terminal has the one line of the whole job, and it ends with every row.
    assert all(f"{ROWS}/{ROWS}" in text and "row/s" in text for text in shown)


@pytest.mark.distributed
def test_a_killed_process_is_replaced_by_the_others(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with Workers(tmp_path, sticks_at=[0, 4, 0]) as workers:
        workers.wait_for(1, "stuck")
        began = time.monotonic()
        workers.processes[1].send_signal(signal.SIGKILL)  # nobody waits for it yet: it stays a zombie
        for number in (0, 2):
            workers.end(number)
        # Far less than the patience with processes of other machines.
        assert time.monotonic() - began < 30
    counts = Counter(item for number in range(3) for item in workers.loaded(number))
    assert set(counts) == set(range(ROWS))
    again = {item for item, count in counts.items() if count > 1}
    assert again and again <= set(workers.loaded(1))
    assert contents(workers.store) == whole


@pytest.mark.distributed
def test_all_are_killed_and_another_goes_on(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with Workers(tmp_path, sticks_at=[4, 4]) as workers:
        for number in range(2):
            workers.wait_for(number, "stuck")
        for process in workers.processes:
            process.kill()
            process.wait(30)
    done = {file.name for file in workers.store.glob("shard-*.json")}
    assert done and list(workers.store.glob(".*.claim"))
    log: list[int] = []
    fill(workers.store, log)
    assert len(log) == len(set(log)) == ROWS - SHARD_ROWS * len(done)
    assert contents(workers.store) == whole


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.integers(1, 30),
    shard_rows=st.integers(1, 9),
    batch_size=st.integers(1, 5),
    workers=st.integers(0, 2),
    runs=st.integers(1, 4),
)
def test_any_number_of_runs_write_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, rows: int, shard_rows: int, batch_size: int, workers: int, runs: int
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    config = EmbeddingConfig(batch_size, shard_rows, workers=workers)
    fill(folder / "alone", config=config, rows=rows)
    log: list[int] = []
    with ThreadPoolExecutor(runs) as pool:
        list(pool.map(lambda _: fill(folder / "store", log, config, rows), range(runs)))
    assert contents(folder / "store") == contents(folder / "alone")
    assert Counter(log) == Counter(range(rows))


def put_claim(path: Path, shard: int, owner: Owner) -> None:
    (path / claim_name(shard)).write_text(json.dumps(asdict(owner)))


def test_a_silent_process_of_another_machine_is_waited_for_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    monkeypatch.setattr("hyma_mllm.data.claims.PATIENCE_SECONDS", 0.6)
    monkeypatch.setattr("hyma_mllm.data.embedding.WAIT_SECONDS", 0.05)
    made = writer(tmp_path / "store")
    put_claim(made.path, 3, ELSEWHERE)
    (made.path / claim_name(7)).write_text("")  # killed between its two first moments
    began = time.monotonic()
    log: list[int] = []
    fill(made.path, log)
    assert time.monotonic() - began >= 0.6
    late = [item for shard in (3, 7) for item in made.rows_of(shard)]
    assert sorted(log) == list(range(ROWS)) and sorted(log[-8:]) == late
    assert contents(made.path) == whole


def test_a_shard_that_another_is_at_is_waited_for(tmp_path: Path, whole: dict[str, bytes]) -> None:
    made = writer(tmp_path / "store")
    with Claims(made.path) as other:
        assert other.take(5)

        def deliver() -> None:
            deadline = time.monotonic() + 60
            while made.undone() != [5] and time.monotonic() < deadline:
                time.sleep(0.01)
            made.write(5, rows_of(made, 5), seconds=0.0)
            other.release(5)

        thread = threading.Thread(target=deliver)
        thread.start()
        log: list[int] = []
        fill(made.path, log)
        thread.join()
    assert sorted(log) == [item for item in range(ROWS) if item not in made.rows_of(5)]
    assert contents(made.path) == whole


def test_who_comes_too_late_changes_nothing(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """A process that slept until others took over its shard, or finished the store, and computed other bits."""
    made = writer(tmp_path / "store")
    made.write(0, rows_of(made, 0), seconds=0.0)
    made.write(0, rows_of(made, 0) + 1, seconds=0.0)
    fill(made.path)
    made.write(2, rows_of(made, 2) + 1, seconds=0.0)
    assert contents(made.path) == whole


def test_an_error_in_one_process_reaches_the_others_too(tmp_path: Path) -> None:
    """What one gives back after a NaN the next takes up, and finds it as well: nobody waits for ever."""

    def poisoned(items: list[Tensor]) -> dict[str, Tensor]:
        found = forward(items)["a"]
        found[[torch.equal(item, load(21)) for item in items]] = float("nan")
        return {"a": found}

    def go(_: int) -> str:
        try:
            embed(KEYS, load, poisoned, {"a": target(tmp_path / "store")}, "s1", CONFIG, "toy")
        except HymaError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(go, range(3)))
    assert all("row/21 in toy is not finite" in text for text in said)
    assert not list((tmp_path / "store").glob(".*.claim"))
    assert len(fill(tmp_path / "store")) == ROWS


def test_runs_that_ask_for_different_stores_share_what_they_have_in_common(tmp_path: Path) -> None:
    def both(items: list[Tensor]) -> dict[str, Tensor]:
        time.sleep(0.01)
        found = forward(items)["a"]
        return {"a": found, "b": found + 1, "c": found + 2}

    def go(names: str) -> None:
        embed(KEYS, load, both, {name: target(tmp_path / name, name) for name in names}, "s1", CONFIG, "toy")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(go, ["ab", "bc"]))
    expected = torch.stack([load(item) for item in range(ROWS)]).exp()
    for number, name in enumerate("abc"):
        torch.testing.assert_close(FeatureStore.open(tmp_path / name)[:], expected + number)


def test_shards_are_taken_from_where_a_process_starts(tmp_path: Path) -> None:
    made = writer(tmp_path / "store")
    with SharedShards({"a": made}, start=0.5) as one, SharedShards({"a": made}) as other:
        orders = [[one.take(), other.take()] for _ in range(3)]
        assert [[taken.shard for taken in pair if taken] for pair in orders] == [[7, 0], [8, 1], [9, 2]]
        rest = [one.take() for _ in range(SHARDS - 6)]
        assert [taken.shard for taken in rest if taken] == [10, 11, 12, 13, 14, 3, 4, 5, 6]
        assert one.take() is other.take() is None
        assert not one.is_done()


def test_one_line_counts_the_rows_of_all_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = writer(tmp_path / "store")
    made.write(0, rows_of(made, 0), seconds=0.0)
    put_claim(made.path, 4, replace(ELSEWHERE, rows=3))
    put_claim(made.path, 5, replace(ELSEWHERE, rows=1))
    with SharedShards({"a": made}) as shards, JobProgress(shards, ROWS, "toy", quiet=False) as line:
        assert shards.progress() == Progress(rows=4 + 3 + 1, processes=1)
        taken = shards.take()
        assert taken is not None and taken.shard == 1
        shards.note(taken, 2)
        assert shards.progress() == Progress(rows=10, processes=2)
        line.look(now=True)
        (made.path / claim_name(4)).unlink()  # killed, and cleared away
        line.look(now=True)
        assert shards.progress().rows == 7
    shown = capsys.readouterr().err.replace("\r", "\n")
    lines = [text for text in shown.splitlines() if text.strip()]
    assert lines[0].startswith("toy:") and f" 8/{ROWS} " in lines[0]
    assert f" 10/{ROWS} " in shown and "2 processes" in shown and "row/s" in shown
    assert f" 7/{ROWS} " in lines[-1]


def test_a_quiet_process_shows_and_reads_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = writer(tmp_path / "store")
    with SharedShards({"a": made}) as shards:
        shards.progress = None  # type: ignore[assignment, method-assign]
        with JobProgress(shards, ROWS, "toy", quiet=True) as line:
            line.look(now=True)
    assert capsys.readouterr().err == ""

"""Embedding: order, shared passes, resume after a kill bit by bit, refusals that leave nothing half-written."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from hyma_mllm.data.embedding import EmbeddingConfig, StoreTarget, embed
from hyma_mllm.data.features import FeatureStore
from hyma_mllm.data.store_writer import StoreWriter
from hyma_mllm.errors import HymaError

ROWS, WIDTH = 23, 6
KEYS = [f"picture/{row}" for row in range(ROWS)]
CONFIG = EmbeddingConfig(batch_size=4, shard_rows=6, workers=2)
MODEL = torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(1))


def load(item: int) -> Tensor:
    return torch.sin(torch.arange(3) * 7.0 + item)


def forward(items: list[Tensor]) -> dict[str, Tensor]:
    return {"a": torch.stack(items) @ MODEL.T}


def target(path: Path, **change: Any) -> StoreTarget:
    return StoreTarget(
        **{"path": path, "model": "toy", "revision": "r1", "kind": "image", "width": WIDTH, "unit_norm": False} | change
    )


def run(
    path: Path,
    forward: Callable[[list[Tensor]], Mapping[str, Tensor]] = forward,
    config: EmbeddingConfig = CONFIG,
    source: str = "s1",
    keys: list[str] = KEYS,
    **change: Any,
) -> FeatureStore:
    return embed(keys, load, forward, {"a": target(path, **change)}, source, config, "toy")["a"]


def shard_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("shard-*.safetensors")}


def expected() -> Tensor:
    return torch.stack([load(item) for item in range(ROWS)]) @ MODEL.T


class Recorder:
    """A forward that remembers its batches, and dies in the n-th."""

    def __init__(self, dies_in: int | None = None) -> None:
        self.batches: list[int] = []
        self.dies_in = dies_in

    def __call__(self, items: list[Tensor]) -> dict[str, Tensor]:
        if len(self.batches) == self.dies_in:
            raise KeyboardInterrupt
        self.batches.append(len(items))
        return forward(items)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_rows_stand_in_order(tmp_path: Path, workers: int) -> None:
    store = run(tmp_path / "store", config=EmbeddingConfig(batch_size=4, shard_rows=6, workers=workers))
    torch.testing.assert_close(store[:], expected())
    assert list(store.keys) == KEYS
    assert [shard.rows for shard in store.manifest.shards] == [6, 6, 6, 5]
    assert (store.manifest.source, store.manifest.compute_dtype) == ("s1", "fp32")


def test_a_finished_store_is_not_computed_again(tmp_path: Path) -> None:
    first = run(tmp_path / "store")
    recorder = Recorder()
    assert run(tmp_path / "store", recorder).manifest == first.manifest
    assert recorder.batches == []


@pytest.mark.parametrize("dies_in", [0, 1, 3, 5, 6])
def test_resume_goes_on_at_the_first_missing_shard(tmp_path: Path, dies_in: int) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "store", Recorder(dies_in))
    with pytest.raises(HymaError, match="unfinished"):
        FeatureStore.open(tmp_path / "store")
    rest = Recorder()
    resumed = run(tmp_path / "store", rest)
    assert rest.batches == [4, 2, 4, 2, 4, 2, 4, 1][dies_in // 2 * 2 :]
    assert shard_bytes(tmp_path / "store") == shard_bytes(tmp_path / "whole")
    assert resumed.manifest.shards == whole.manifest.shards


def test_seconds_add_up_over_resumes_and_split_over_stores(tmp_path: Path) -> None:
    def slow(items: list[Tensor]) -> dict[str, Tensor]:
        time.sleep(0.05)
        out = forward(items)["a"]
        return {"a": out, "b": out}

    calls = Recorder(dies_in=4)
    targets = {name: target(tmp_path / name) for name in "ab"}
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        embed(KEYS, load, lambda items: (calls(items), slow(items))[1], targets, "s1", CONFIG, "toy")
    stores = embed(KEYS, load, slow, targets, "s1", CONFIG, "toy")
    seconds = [store.manifest.seconds for store in stores.values()]
    assert seconds[0] == seconds[1]
    assert 8 * 0.05 <= sum(seconds) <= time.perf_counter() - began


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_embedding as t
calls = []
def forward(items):
    calls.append(1)
    if len(calls) == 6:
        os._exit(9)
    return t.forward(items)
t.run(Path(sys.argv[2]), forward)
"""


def test_resume_after_the_process_is_killed(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    here = os.fspath(Path(__file__).parent)
    killed = subprocess.run([sys.executable, "-c", KILLED, here, os.fspath(tmp_path / "store")], capture_output=True)
    assert killed.returncode == 9, killed.stderr
    assert len(shard_bytes(tmp_path / "store")) == 2
    run(tmp_path / "store")
    assert shard_bytes(tmp_path / "store") == shard_bytes(tmp_path / "whole")


def test_left_over_and_damaged_files_of_a_killed_run(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    path = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        run(path, Recorder(dies_in=5))
    (path / ".shard-00002.safetensors.123.tmp").write_bytes(b"half")
    (path / "shard-00000.safetensors").write_bytes(b"damaged")
    rest = Recorder()
    run(path, rest)
    assert rest.batches == [4, 2, 4, 2, 4, 1]
    assert shard_bytes(path) == shard_bytes(tmp_path / "whole")
    assert not list(path.glob(".*.tmp")) and not (path / "plan.json").exists()


def test_a_kill_between_the_last_shard_and_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: StoreWriter) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(StoreWriter, "finish", killed)
        run(tmp_path / "store")
    recorder = Recorder()
    torch.testing.assert_close(run(tmp_path / "store", recorder)[:], expected())
    assert recorder.batches == []


def test_one_pass_feeds_several_stores_and_only_those_that_lack_it(tmp_path: Path) -> None:
    def two(items: list[Tensor]) -> dict[str, Tensor]:
        out = forward(items)["a"]
        return {"a": out, "b": out[:, :2] + 1, "nobody asked": out}

    calls = Recorder()
    run(tmp_path / "a")
    manifest = (tmp_path / "a" / "manifest.json").read_bytes()
    targets = {"a": target(tmp_path / "a"), "b": target(tmp_path / "b", model="toy@1", width=2)}
    stores = embed(KEYS, load, lambda items: (calls(items), two(items))[1], targets, "s1", CONFIG, "toy")
    torch.testing.assert_close(stores["b"][:], expected()[:, :2] + 1)
    assert stores["b"].manifest.model == "toy@1"
    assert len(calls.batches) == 8
    assert (tmp_path / "a" / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_storage(tmp_path: Path, name: Any, dtype: torch.dtype) -> None:
    store = run(tmp_path / "store", config=EmbeddingConfig(batch_size=4, shard_rows=6, storage_dtype=name))
    assert store[:].dtype == dtype
    torch.testing.assert_close(store[:], expected().to(dtype))
    assert store.manifest.dtype == name


def test_bf16_compute_runs_the_forward_under_autocast(tmp_path: Path) -> None:
    seen = set()

    def watched(items: list[Tensor]) -> dict[str, Tensor]:
        out = forward(items)
        seen.add((out["a"].dtype, torch.is_grad_enabled()))
        return out

    store = run(tmp_path / "store", watched, EmbeddingConfig(compute_dtype="bf16"))
    assert seen == {(torch.bfloat16, False)}
    assert (store.manifest.compute_dtype, store.manifest.dtype) == ("bf16", "fp32")
    torch.testing.assert_close(store[:], expected(), rtol=0.05, atol=0.05)


def poisoned(value: float) -> Callable[[list[Tensor]], dict[str, Tensor]]:
    def bad(items: list[Tensor]) -> dict[str, Tensor]:
        out = forward(items)["a"]
        for row, item in enumerate(items):
            if torch.equal(item, load(9)):
                out[row, 4] = value
        return {"a": out}

    return bad


def test_nan_is_refused_by_key_and_the_shards_before_it_are_kept(tmp_path: Path) -> None:
    with pytest.raises(HymaError, match=r"picture/9 in toy is not finite"):
        run(tmp_path / "store", poisoned(float("nan")))
    assert list(shard_bytes(tmp_path / "store")) == ["shard-00000.safetensors"]


def test_too_large_for_fp16(tmp_path: Path) -> None:
    config = EmbeddingConfig(batch_size=4, storage_dtype="fp16")
    with pytest.raises(HymaError, match=r"picture/9 by toy is too large for fp16"):
        run(tmp_path / "store", poisoned(7e4), config)


def test_the_claim_of_unit_norm_is_checked(tmp_path: Path) -> None:
    with pytest.raises(HymaError, match="unit norm is claimed"):
        run(tmp_path / "store", unit_norm=True)
    store = run(
        tmp_path / "unit", lambda items: {"a": torch.nn.functional.normalize(forward(items)["a"])}, unit_norm=True
    )
    assert store.manifest.unit_norm


def test_another_width_than_the_card(tmp_path: Path) -> None:
    with pytest.raises(HymaError, match=r"toy returned features of shape \(4, 6\) where \(4, 5\)"):
        run(tmp_path / "store", width=5)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"revision": "r2"}, "revision r1, but revision r2"),
        ({"source": "s2"}, "source s1, but source s2"),
        ({"keys": KEYS[::-1]}, "keys_sha256"),
        ({"keys": KEYS[:-1]}, "rows 23, but rows 22"),
        ({"model": "other"}, "store of toy with model toy, but model other"),
        ({"config": EmbeddingConfig(batch_size=4, shard_rows=6, storage_dtype="bf16")}, "dtype fp32, but dtype bf16"),
    ],
)
def test_a_store_of_something_else_is_refused(
    tmp_path: Path, finished: bool, change: dict[str, Any], words: str
) -> None:
    path = tmp_path / "store"
    if finished:
        run(path)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(path, Recorder(dies_in=5))
    before = shard_bytes(path)
    with pytest.raises(HymaError, match=words) as caught:
        run(path, **change)
    assert f"delete {path}" in str(caught.value)
    assert shard_bytes(path) == before


@pytest.mark.parametrize(("keys", "words"), [([], "no rows"), (["a", "b", "a"], "key a stands twice .* row 2")])
def test_bad_keys(tmp_path: Path, keys: list[str], words: str) -> None:
    with pytest.raises(HymaError, match=words):
        run(tmp_path / "store", keys=keys)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "config", [EmbeddingConfig(batch_size=0), EmbeddingConfig(shard_rows=0), EmbeddingConfig(workers=-1)]
)
def test_bad_configuration(tmp_path: Path, config: EmbeddingConfig) -> None:
    with pytest.raises(HymaError, match="at least"):
        run(tmp_path / "store", config=config)


def test_a_corrupted_finished_store_is_found(tmp_path: Path) -> None:
    run(tmp_path / "store")
    file = tmp_path / "store" / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(HymaError, match="corrupted"):
        run(tmp_path / "store")


def test_too_little_disk_is_said_up_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=ROWS * WIDTH * 4 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    recorder = Recorder()
    with pytest.raises(HymaError, match="MB free and the features need"):
        run(tmp_path / "store", recorder)
    assert recorder.batches == []


def test_a_disk_that_fills_up_leaves_whole_shards_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched, pytest.raises(HymaError, match="is full; free some space and rerun"):
        patched.setattr(os, "fsync", full)
        run(tmp_path / "store")
    names = {file.name for file in (tmp_path / "store").iterdir()}
    shards = {f"shard-0000{shard}.{end}" for shard in (0, 1) for end in ("json", "safetensors")}
    assert names == {".lock", "plan.json", "keys.json"} | shards
    torch.testing.assert_close(run(tmp_path / "store")[:], expected())


def test_a_path_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HymaError, match="cannot be written"):
        run(tmp_path / "file" / "store")


def test_a_store_that_is_locked_for_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyma_mllm.data.store_writer.LOCK_SECONDS", 0.1)
    (tmp_path / "store").mkdir()
    with FileLock(tmp_path / "store" / ".lock"), pytest.raises(HymaError, match="being written by another run"):
        # From another thread: the lock of this one must not look like the run's own.
        ThreadPoolExecutor(1).submit(run, tmp_path / "store").result(30)


def test_an_error_while_loading_surfaces(tmp_path: Path) -> None:
    def broken(item: int) -> Tensor:
        if item == 7:
            raise HymaError("picture/7 is unreadable")
        return load(item)

    for workers in (0, 2):
        with pytest.raises(HymaError, match="picture/7 is unreadable"):
            embed(
                KEYS,
                broken,
                forward,
                {"a": target(tmp_path / "s")},
                "s1",
                EmbeddingConfig(4, 6, workers=workers),
                "toy",
            )


def test_decoding_overlaps_with_the_forward_pass(tmp_path: Path) -> None:
    def slow_load(item: int) -> Tensor:
        time.sleep(0.01)
        return load(item)

    def slow_forward(items: list[Tensor]) -> dict[str, Tensor]:
        time.sleep(0.02)
        return forward(items)

    seconds = {}
    for workers in (0, 4):
        config = EmbeddingConfig(batch_size=4, workers=workers)
        targets = {"a": target(tmp_path / f"{workers}")}
        seconds[workers] = embed(KEYS, slow_load, slow_forward, targets, "s1", config, "toy")["a"].manifest.seconds
    assert seconds[4] < 0.75 * seconds[0]


RANKS = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_embedding as t
from accelerate import Accelerator
from hyma_mllm.data.embedding import embed
from hyma_mllm.errors import HymaError

out = Path(sys.argv[2])
accelerator = Accelerator()
rank = accelerator.process_index
calls = t.Recorder()
def go(name, forward=calls, **change):
    targets = {"a": t.target(out / name, **change)}
    return embed(t.KEYS, t.load, forward, targets, "s1", t.CONFIG, "toy", accelerator)["a"]
rows = len(go("store"))
batches = list(calls.batches)
go("store")
try:
    go("store", revision="r2")
    refused = ""
except HymaError as error:
    refused = str(error)
result = {"world": accelerator.num_processes, "batches": batches, "again": calls.batches, "rows": rows}
(out / f"rank{rank}.json").write_text(json.dumps(result | {"refused": refused}))
accelerator.wait_for_everyone()
os._exit(0)
"""


@pytest.mark.distributed
def test_two_processes_share_the_shards(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(RANKS))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*launch, os.fspath(script), os.fspath(Path(__file__).parent), os.fspath(tmp_path)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    results = [tmp_path / f"rank{rank}.json" for rank in range(2)]
    assert all(file.is_file() for file in results), done.stderr
    first, second = (json.loads(file.read_text()) for file in results)
    assert first["world"] == second["world"] == 2
    assert sorted(first["batches"] + second["batches"]) == sorted([4, 2, 4, 2, 4, 2, 4, 1])
    assert first["again"] == first["batches"] and second["again"] == second["batches"]
    assert first["rows"] == second["rows"] == ROWS
    assert first["refused"] == second["refused"] != ""
    assert shard_bytes(tmp_path / "store") == shard_bytes(tmp_path / "whole")

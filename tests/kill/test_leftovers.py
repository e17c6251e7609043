"""What a kill leaves where no later step would come across it."""

import json
from pathlib import Path

import pytest
import torch

from hyma_mllm.data.embedding import EmbeddingConfig, StoreTarget, embed
from hyma_mllm.data.library import CostFile
from hyma_mllm.run_directory import RunDirectory

KEYS = ["a", "b", "c"]


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_run_directory_is_swept_of_what_a_killed_run_was_writing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    RunDirectory(run, {"a": 1}).close()
    whole = names(run)
    (run / "connectors").mkdir()
    kept = [run / ".notes.tmp", run / "connectors" / "x.3.tmp", run / ".x.tmp.txt"]
    for file in [*kept, run / ".ranking.json.123.tmp", run / "connectors" / ".x.safetensors.9.tmp"]:
        file.write_text("half")
    for half in (".best.123.tmp", ".best.123.old"):
        (run / half / "text").mkdir(parents=True)
        (run / half / "text" / "config.json").write_text("{}")
    RunDirectory(run, {"a": 1}).close()
    assert names(run) == whole | {"connectors"} | {file.relative_to(run).as_posix() for file in kept}


def test_a_run_directory_in_use_is_not_swept(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", {"a": 1})
    half = tmp_path / "run" / ".ranking.json.123.tmp"
    half.write_text("half")
    with pytest.raises(Exception, match="in use by a live run"):
        RunDirectory(tmp_path / "run", {"a": 1})
    assert half.exists()
    run.close()


def embedded(store: Path, calls: list[int]) -> torch.Tensor:
    def forward(batch: list[int]) -> dict[str, torch.Tensor]:
        calls.extend(batch)
        return {"m": torch.tensor(batch, dtype=torch.float32)[:, None].repeat(1, 2)}

    target = StoreTarget(store, "m", "r", "image", 2, unit_norm=False)
    config = EmbeddingConfig(batch_size=1, shard_rows=2, workers=0)
    found = embed(KEYS, lambda number: number + 1, forward, {"m": target}, "s", config, "m")["m"]
    return torch.as_tensor(found[torch.arange(len(KEYS))])


def test_a_store_whose_writer_was_killed_behind_the_manifest_is_cleared(tmp_path: Path) -> None:
    calls: list[int] = []
    embedded(tmp_path / "store", calls)
    whole = names(tmp_path / "store")
    assert calls == [1, 2, 3]
    for left in ("plan.json", "shard-00001.json", ".manifest.json.12.tmp", ".shard-00000.claim"):
        (tmp_path / "store" / left).write_text("{}")
    assert embedded(tmp_path / "store", calls)[:, 0].tolist() == [1, 2, 3]
    assert names(tmp_path / "store") == whole and calls == [1, 2, 3]


@pytest.mark.parametrize("left", ["", '{"flops_per', None])
def test_a_cost_that_was_cut_short_is_measured_again(left: str | None, tmp_path: Path) -> None:
    if left is not None:
        (tmp_path / "store.cost.json").write_text(left)
    cost = CostFile(tmp_path / "store")
    assert not cost.known
    cost.measure(lambda: torch.ones(2, 3) @ torch.ones(3, 5))
    assert names(tmp_path) == {"store.cost.json"}
    again = CostFile(tmp_path / "store")
    assert again.known and again.flops_per_item == cost.flops_per_item == 2 * 2 * 3 * 5
    assert json.loads((tmp_path / "store.cost.json").read_text()) == {"flops_per_item": 60.0}

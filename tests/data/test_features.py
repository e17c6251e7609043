"""Reading a store: rows in every way of asking, verification of every kind of damage, alignment."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_store import toy_writer

from hyma_mllm.data.features import FeatureStore, check_aligned
from hyma_mllm.data.manifest import DTYPES, Manifest, hash_keys
from hyma_mllm.data.sharded_rows import ShardedRows
from hyma_mllm.errors import HymaError

ROWS, WIDTH = 11, 5


def write_store(
    path: Path, features: Tensor, keys: list[str] | None = None, unit_norm: bool = False, shard_rows: int = 4
) -> Path:
    keys = keys or [f"k{row}" for row in range(len(features))]
    names = {dtype: name for name, dtype in DTYPES.items()}
    writer = toy_writer(path, keys, features.shape[1], shard_rows, names[features.dtype], unit_norm)
    with writer.lock():
        writer.start()
        for shard in writer.missing():
            rows = writer.rows_of(shard)
            writer.write(shard, features[rows.start : rows.stop], seconds=0.5)
        writer.finish()
    return path


@pytest.fixture(scope="module")
def features() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(tmp_path: Path, features: Tensor) -> Path:
    return write_store(tmp_path / "store", features)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, features: Tensor) -> FeatureStore:
    return FeatureStore.open(write_store(tmp_path_factory.mktemp("shared") / "store", features))


def test_a_finished_store_says_what_it_is(path: Path) -> None:
    store = FeatureStore.open(path, revision="r1", source="s1")
    assert len(store) == ROWS
    assert list(store.keys) == [f"k{row}" for row in range(ROWS)]
    assert [shard.rows for shard in store.manifest.shards] == [4, 4, 3]
    assert store.manifest.seconds == 1.5
    assert torch.__version__.startswith(store.manifest.versions["torch"])
    assert Manifest.read(path / "manifest.json") == store.manifest
    assert sorted(file.name for file in path.iterdir() if not file.name.startswith(".")) == [
        "keys.json",
        "manifest.json",
        *(f"shard-{shard:05d}.safetensors" for shard in range(3)),
    ]


@given(st.slices(ROWS))
def test_slices_are_those_of_the_list(shared: FeatureStore, features: Tensor, rows: slice) -> None:
    wanted = torch.as_tensor(range(ROWS)[rows], dtype=torch.int64)
    assert torch.equal(shared[rows], features[wanted])


@given(st.lists(st.integers(-ROWS, ROWS - 1), max_size=30))
def test_rows_in_any_order_and_number(shared: FeatureStore, features: Tensor, rows: list[int]) -> None:
    index = torch.tensor(rows, dtype=torch.int64)
    assert torch.equal(shared[rows], features[index])
    assert torch.equal(shared[index], features[index])


def test_a_mask_selects(shared: FeatureStore, features: Tensor) -> None:
    mask = features[:, 0] > 0
    assert torch.equal(shared[mask], features[mask])


@pytest.mark.parametrize("rows", [[ROWS], [-ROWS - 1], torch.ones(ROWS + 1, dtype=torch.bool)])
def test_rows_that_do_not_exist(shared: FeatureStore, rows: list[int] | Tensor) -> None:
    with pytest.raises(IndexError):
        shared[rows]


@given(st.integers(1, ROWS), st.slices(ROWS))
def test_first_rows_of_joined_stores(shared: FeatureStore, features: Tensor, count: int, rows: slice) -> None:
    joined = ShardedRows.joined([shared.rows, shared.rows])
    twice = torch.cat([features, features])
    assert len(joined) == 2 * ROWS and joined.width == WIDTH
    assert torch.equal(joined[[0, -1, ROWS, ROWS - 1]], twice[[0, -1, ROWS, ROWS - 1]])
    first = joined.first(ROWS + count)
    assert len(first) == ROWS + count and torch.equal(first[:], twice[: ROWS + count])
    wanted = torch.as_tensor(range(ROWS + count)[rows], dtype=torch.int64)
    assert torch.equal(first[rows], twice[wanted])


def test_writing_to_a_mapped_view_leaves_the_store_alone(path: Path, features: Tensor) -> None:
    FeatureStore.open(path)[0:2].zero_()
    assert torch.equal(FeatureStore.open(path)[:], features)


def test_a_flipped_byte_is_found(path: Path) -> None:
    file = path / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(HymaError, match=r"shard-00001\.safetensors is corrupted"):
        FeatureStore.open(path)


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_shard_is_found(path: Path, verify: bool) -> None:
    file = path / "shard-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(HymaError, match=r"shard-00002\.safetensors"):
        FeatureStore.open(path, verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_shard_is_found(path: Path, verify: bool) -> None:
    (path / "shard-00000.safetensors").unlink()
    with pytest.raises(HymaError, match=r"shard-00000\.safetensors"):
        FeatureStore.open(path, verify=verify)


def forge(path: Path, shard: int, content: Tensor) -> None:
    """Replace a shard and make its hash agree, as a faulty writer would."""
    file = path / f"shard-{shard:05d}.safetensors"
    file.write_bytes(safetensors.torch.save({"features": content}))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["shards"][shard]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_is_named(path: Path, features: Tensor, value: float) -> None:
    content = features[4:8].clone()
    content[2, 3] = value
    forge(path, 1, content)
    with pytest.raises(HymaError, match=r"feature of k6 .* is not finite"):
        FeatureStore.open(path)


def test_a_shard_of_another_shape_or_dtype(path: Path, features: Tensor) -> None:
    forge(path, 1, features[4:7].clone())
    with pytest.raises(HymaError, match=r"holds \(3, 5\)"):
        FeatureStore.open(path, verify=False)
    forge(path, 1, features[4:8].half())
    with pytest.raises(HymaError, match=r"float16 where the manifest says \(4, 5\) fp32"):
        FeatureStore.open(path)


def test_large_finite_features_are_fine(tmp_path: Path) -> None:
    huge = torch.full((2, 3), 3e38)
    assert torch.equal(FeatureStore.open(write_store(tmp_path / "store", huge))[:], huge)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unit_norm_is_verified_where_claimed(tmp_path: Path, features: Tensor, dtype: torch.dtype) -> None:
    unit = torch.nn.functional.normalize(features, dim=1)
    FeatureStore.open(write_store(tmp_path / "good", unit.to(dtype), unit_norm=True))
    unit[9] *= 1.05
    write_store(tmp_path / "bad", unit.to(dtype), unit_norm=True)
    with pytest.raises(HymaError, match=r"feature of k9 .* has norm 1\.0"):
        FeatureStore.open(tmp_path / "bad")


@pytest.mark.parametrize(("expected", "what"), [({"revision": "r2"}, "revision r1"), ({"source": "s2"}, "source s1")])
def test_another_revision_or_source(path: Path, expected: dict[str, str], what: str) -> None:
    with pytest.raises(HymaError, match=f"was written from {what}, not .2; delete"):
        FeatureStore.open(path, **expected)


def test_no_store_and_an_unfinished_one(path: Path, tmp_path: Path) -> None:
    with pytest.raises(HymaError, match="does not exist"):
        FeatureStore.open(tmp_path / "nowhere")
    (path / "manifest.json").unlink()
    with pytest.raises(HymaError, match="unfinished"):
        FeatureStore.open(path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "model": "toy"}', '{"format": 1, "shards": [{"a": 1}]}']
)
def test_a_broken_manifest(path: Path, text: str) -> None:
    (path / "manifest.json").write_text(text)
    with pytest.raises(HymaError, match=r"manifest\.json"):
        FeatureStore.open(path)


@pytest.mark.parametrize("change", [{"dtype": "int4"}, {"rows": ROWS - 1}, {"shards": []}])
def test_a_manifest_that_contradicts_the_store(path: Path, change: dict[str, object]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(HymaError):
        FeatureStore.open(path)


def test_changed_keys_are_found(path: Path) -> None:
    keys = json.loads((path / "keys.json").read_text())
    (path / "keys.json").write_text(json.dumps(keys[::-1]))
    with pytest.raises(HymaError, match=r"keys\.json does not hold the keys"):
        FeatureStore.open(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=3), max_size=4), st.lists(st.text(max_size=3), max_size=4))
def test_the_hash_of_keys_tells_lists_apart(a: list[str], b: list[str]) -> None:
    assert (hash_keys(a) == hash_keys(b)) == (a == b)


def test_alignment_names_the_first_row_that_differs(tmp_path: Path, features: Tensor) -> None:
    keys = [f"k{row}" for row in range(ROWS)]
    swapped = [*keys[:6], keys[7], keys[6], *keys[8:]]
    a = FeatureStore.open(write_store(tmp_path / "a", features, keys))
    same = FeatureStore.open(write_store(tmp_path / "same", features[:, :2].contiguous(), keys, shard_rows=6))
    b = FeatureStore.open(write_store(tmp_path / "b", features, swapped))
    short = FeatureStore.open(write_store(tmp_path / "short", features[:9], keys[:9]))
    check_aligned([a, same])
    check_aligned([a])
    check_aligned([])
    with pytest.raises(HymaError, match="part at row 6: k6 against k7"):
        check_aligned([a, same, b])
    with pytest.raises(HymaError, match=r"\(11 rows\) and .* \(9 rows\) part at row 9"):
        check_aligned([a, short])

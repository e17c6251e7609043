"""Plain tensors and the authors' release as stores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from hyma_mllm.data import imports
from hyma_mllm.data.features import check_aligned
from hyma_mllm.data.imports import import_tensor
from hyma_mllm.errors import HymaError
from hyma_mllm.zoo.release_names import RELEASE_IMAGE_NAMES, RELEASE_NAMES, release_zoo_id


@pytest.fixture(scope="module")
def features() -> Tensor:
    return torch.nn.functional.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), dim=1)


def save(path: Path, features: Any) -> Path:
    if path.suffix == ".npy":
        np.save(path, features)
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file(features, path)
    else:
        torch.save(features, path)
    return path


def test_every_format_gives_the_same_rows(tmp_path: Path, features: Tensor) -> None:
    files = {
        "bare.pt": features,
        "dict.pt": {"embeddings": features, "model": "x"},
        "plain.npy": features.numpy(),
        "double.npy": features.double().numpy(),
        "one.safetensors": {"x": features},
    }
    for name, content in files.items():
        store = import_tensor(save(tmp_path / name, content), tmp_path / f"{name}.store", "m", unit_norm=True)
        assert torch.equal(store[:], features), name
        assert list(store.keys) == [str(row) for row in range(9)]
        assert (store.manifest.dtype, store.manifest.unit_norm, store.manifest.model) == ("fp32", True, "m")


def test_the_old_format_of_torch_save(tmp_path: Path, features: Tensor) -> None:
    torch.save(features, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(import_tensor(tmp_path / "old.pt", tmp_path / "store", "m")[:], features)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_half_precision_is_kept(tmp_path: Path, features: Tensor, dtype: torch.dtype, name: str) -> None:
    store = import_tensor(save(tmp_path / "x.pt", features.to(dtype)), tmp_path / "store", "m", unit_norm=True)
    assert store.manifest.dtype == name
    assert torch.equal(store[:], features.to(dtype))


def test_several_shards_and_keys(tmp_path: Path, features: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "IMPORT_SHARD_ROWS", 4)
    keys = [f"cc3m/{row}" for row in range(9)]
    path = save(tmp_path / "x.pt", features)
    store = import_tensor(path, tmp_path / "store", "m", keys=keys, kind="text")
    assert [shard.rows for shard in store.manifest.shards] == [4, 4, 1]
    assert list(store.keys) == keys and store.manifest.kind == "text"
    assert torch.equal(store[:], features)
    again = import_tensor(path, tmp_path / "store", "m", keys=keys, kind="text")
    assert again.manifest == store.manifest
    with pytest.raises(HymaError, match="delete"):
        import_tensor(save(path, features.flip(0)), tmp_path / "store", "m", keys=keys, kind="text")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(3), r"shape \(3,\)"),
        (torch.zeros(0, 3), r"shape \(0, 3\)"),
        (torch.zeros(3, 2, dtype=torch.int64), "int64"),
        ({"a": torch.zeros(1, 1), "b": torch.zeros(1, 1)}, "2 tensors"),
        ({}, "0 tensors"),
        ("text", "0 tensors"),
        (Path("code"), "cannot be read"),
        (torch.tensor([[1.0], [float("nan")]]), "feature of 1 in .* is not finite"),
    ],
)
def test_what_is_no_feature_tensor(tmp_path: Path, content: Any, words: str) -> None:
    path = save(tmp_path / "x.pt", content)
    with pytest.raises(HymaError, match=words) as caught:
        import_tensor(path, tmp_path / "store", "m")
    assert "x.pt" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.npy", "x.safetensors"])
def test_damaged_files(tmp_path: Path, features: Tensor, name: str) -> None:
    whole = {"x.pt": features, "x.npy": features.numpy(), "x.safetensors": {"a": features}}[name]
    content = save(tmp_path / name, whole).read_bytes()
    for damaged in (b"", b"nonsense", content[:-20]):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(HymaError, match="cannot be read as a tensor"):
            import_tensor(tmp_path / name, tmp_path / "store", "m")


def test_pickled_objects_in_an_npy_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(HymaError, match="cannot be read"):
        import_tensor(tmp_path / "x.npy", tmp_path / "store", "m")


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(HymaError, match=r"none of \.pt"):
        import_tensor(tmp_path / "x.csv", tmp_path / "store", "m")
    with pytest.raises(HymaError, match="does not exist"):
        import_tensor(tmp_path / "nothing.pt", tmp_path / "store", "m")


def test_keys_that_do_not_fit(tmp_path: Path, features: Tensor) -> None:
    path = save(tmp_path / "x.pt", features)
    with pytest.raises(HymaError, match="9 rows, but 2 keys"):
        import_tensor(path, tmp_path / "store", "m", keys=["a", "b"])
    with pytest.raises(HymaError, match="key a stands twice"):
        import_tensor(path, tmp_path / "store", "m", keys=["a"] * 9)


def test_rows_that_are_not_unit_where_claimed(tmp_path: Path, features: Tensor) -> None:
    path = save(tmp_path / "x.pt", features * 2)
    with pytest.raises(HymaError, match=r"feature of 0 .* norm 2\.0000"):
        import_tensor(path, tmp_path / "store", "m", unit_norm=True)
    assert not import_tensor(path, tmp_path / "store", "m").manifest.unit_norm


def test_two_sets_of_other_length(tmp_path: Path, features: Tensor) -> None:
    stores = [
        import_tensor(save(tmp_path / f"{rows}.pt", features[:rows].clone()), tmp_path / f"{rows}", "m")
        for rows in (9, 7)
    ]
    with pytest.raises(HymaError, match="part at row 7"):
        check_aligned(stores)


def test_the_names_of_the_release_are_known_to_timm() -> None:
    timm = pytest.importorskip("timm")
    assert len(RELEASE_NAMES) == 12
    known = set(timm.list_models(pretrained=True))
    assert set(RELEASE_IMAGE_NAMES.values()) <= known
    with pytest.raises(HymaError, match="did you mean vit_s16"):
        release_zoo_id("vit_s_16")

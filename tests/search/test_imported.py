"""From files of features to a ranking: import, search, and what is left to hand over."""

import json
import logging
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hyma_mllm import cli, export
from hyma_mllm.data.collection import DataConfig
from hyma_mllm.data.features import FeatureStore
from hyma_mllm.data.standardise import StandardiseConfig
from hyma_mllm.data.store_directory import count_rows, find_tensors, import_directory, open_stores, store_cards
from hyma_mllm.errors import HymaError
from hyma_mllm.search import imported
from hyma_mllm.search.imported import caption_groups, prepare_imported
from hyma_mllm.stitched.vlm import StitchedVLM
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.release_names import release_zoo_id

RECIPE = Path(__file__).parents[2] / "recipes" / "vlm.py"
ROWS = 160
RELEASE = {"deit_b16": 12, "eva2-ft_l16": 16, "vit_s16": 8, "minilm": 6, "mpnet": 10}
SMALL = [
    "--search.methods=[hyma, grid]",
    "--search.connectors=[linear]",
    "--search.seeds=[0]",
    "--search.steps=6",
    "--search.grid_steps=6",
    "--search.batch=16",
    "--search.evaluate_every=3",
    "--search.checkpoint_every=3",
]


def features(widths: dict[str, int], rows: int = ROWS) -> dict[str, Tensor]:
    """Unit rows: every model is a random view of the same latents."""
    g = torch.Generator().manual_seed(0)
    latent = torch.randn(rows, 5, generator=g)
    return {name: F.normalize(latent @ torch.randn(5, width, generator=g), dim=1) for name, width in widths.items()}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "release"
    folder.mkdir()
    for name, rows in features(RELEASE).items():
        torch.save(rows, folder / f"{name}.pt")
    return folder


def write_plain(folder: Path, image: dict[str, int], text: dict[str, int]) -> Path:
    made = features(image | text)
    for side, names in (("images", image), ("texts", text)):
        (folder / side).mkdir(parents=True)
        for name in names:
            np.save(folder / side / f"{name}.npy", made[name].numpy())
    return folder


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the recipe's main in this process; a HymaError comes through."""

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *arguments])
        runpy.run_path(str(RECIPE))["main"]()

    return call


def hyma(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hyma", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def no_zoo(name: str) -> ModelCard:
    raise HymaError(f"{name} is out of reach.")


def test_import_prints_every_store(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "stores"
    assert hyma(monkeypatch, "import", str(release), str(target)) == 0
    out = capsys.readouterr().out
    made = features(RELEASE)
    for name, width in RELEASE.items():
        side = "texts" if name in ("minilm", "mpnet") else "images"
        (line,) = [line.split() for line in out.splitlines() if line.split()[:1] == [release_zoo_id(name)]]
        assert line[1:5] == [side[:-1], str(ROWS), str(width), "fp32"] and line[-1] == f"{side}/{name}"
        store = FeatureStore.open(target / side / name)
        assert torch.equal(store[:], made[name]) and store.manifest.unit_norm
    assert count_rows(target) == ROWS


def test_folders_tell_the_side_and_files_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_plain(tmp_path / "plain", {"b@8": 4, "a": 6}, {"minilm": 5})
    (folder / "images" / "README.txt").write_text("x")
    found = find_tensors(folder)
    assert [(file.side, file.model) for file in found] == [("image", "a"), ("image", "b@8"), ("text", "minilm")]
    assert "README.txt" in caplog.text
    import_directory(folder, tmp_path / "stores")
    cards = store_cards(tmp_path / "stores", "image", ["b@8", "b@8#2"])
    assert [(card.id, card.width) for card in cards] == [("b@8", 4), ("b@8#2", 4)]
    one, two = open_stores(tmp_path / "stores", "image", cards)
    assert one is two and one.manifest.model == "b@8"
    with pytest.raises(HymaError, match=r"no image features of c; known are a, b@8"):
        store_cards(tmp_path / "stores", "image", ["c"])


def test_what_cannot_be_imported(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(HymaError, match="does not exist"):
        find_tensors(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HymaError, match="holds no features"):
        find_tensors(tmp_path / "empty")
    torch.save(features({"x": 4}, rows=ROWS - 1)["x"], release / "roberta.pt")
    assert hyma(monkeypatch, "import", str(release), str(tmp_path / "stores")) == 2
    err = capsys.readouterr().err
    assert "(160 rows)" in err and "(159 rows)" in err and "roberta" in err and err.count("\n") == 1
    (release / "roberta.pt").rename(release / "vit_s17.pt")
    with pytest.raises(HymaError, match=r"vit_s17.*did you mean vit_s16"):
        find_tensors(release)
    (release / "vit_s17.pt").unlink()
    np.save(release / "vit_s16.npy", np.ones((ROWS, 3), dtype=np.float32))
    with pytest.raises(HymaError, match=r"vit_s16.npy and .*vit_s16.pt would become one store"):
        find_tensors(release)


def test_stores_that_cannot_be_searched(tmp_path: Path) -> None:
    stores = tmp_path / "stores"
    with pytest.raises(HymaError, match=r"images holds no feature stores; .*hyma import"):
        count_rows(stores)
    import_directory(write_plain(tmp_path / "a", {"i": 4}, {"t": 5}), stores)
    (stores / "images" / "i").rename(stores / "texts" / "i")
    (stores / "images" / "half").mkdir()
    with pytest.raises(HymaError, match="half is unfinished"):
        count_rows(stores)
    with pytest.raises(HymaError, match="holds image features; move it out"):
        store_cards(stores, "text")
    with pytest.raises(HymaError, match="give one of the two"):
        DataConfig(stores=stores, sources=["corpus:fluent"])


def test_the_task_joins_row_to_row(release: Path, tmp_path: Path) -> None:
    stores = tmp_path / "stores"
    import_directory(release, stores)
    image, text = store_cards(stores, "image"), store_cards(stores, "text")
    plain = StandardiseConfig(image_power="none", centre=False)
    prepared = prepare_imported(stores, image, text, DataConfig(stores=stores, limit=100), plain)
    task, made = prepared.task, features(RELEASE)
    assert task.grid.vision_widths == (12, 16, 8) and task.grid.text_widths == (6, 10)
    for found, name in zip(task.images, ("deit_b16", "eva2-ft_l16", "vit_s16"), strict=True):
        torch.testing.assert_close(found[:], made[name][:100])
    assert all(len(found) == 100 for found in task.texts) and task.zero_shot == [] and prepared.rows == []
    batch = task.batch(task.train, seed=0, number=0)
    assert torch.equal(batch.captions, batch.pictures)
    members = torch.cat([task.train, task.validation, task.test])
    assert sorted(members.tolist()) == list(range(100))


def test_captions_are_equal_where_every_encoder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imported, "CHUNK_ROWS", 3)
    made = features({"i": 4, "s": 3, "t": 5}, rows=7)
    made["s"][5], made["t"][5] = made["s"][1], made["t"][1]
    made["t"][6] = made["t"][0]  # one of two encoders
    for side, names in (("images", "i"), ("texts", "st")):
        (tmp_path / "f" / side).mkdir(parents=True)
        for name in names:
            torch.save(made[name], tmp_path / "f" / side / f"{name}.pt")
    stores = [store for store in import_directory(tmp_path / "f", tmp_path / "stores") if store.manifest.kind == "text"]
    assert caption_groups(stores, 7).tolist() == [0, 1, 2, 3, 4, 1, 5]


def test_from_release_files_to_a_ranking(
    release: Path,
    recipe: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "model_info", offline)
    monkeypatch.setattr(export, "image_card", no_zoo)
    stores, run = tmp_path / "stores", tmp_path / "run"
    import_directory(release, stores)
    options = [f"--run={run}", f"--data.stores={stores}", *SMALL]
    recipe("--dry-run", *options)
    out = capsys.readouterr().out
    assert "3 image x 2 text encoders = 6 pairs; 160 imported rows" in out and not run.exists()
    with caplog.at_level(logging.INFO, logger="hyma_mllm"):
        recipe(*options)
    assert caplog.text.count("No concept of the 160 imported rows is known") == 1
    assert caplog.text.count("will stitch when the encoders can be fetched") == 1
    result = json.loads((run / "ranking.json").read_text())
    assert [entry["id"] for entry in result["text"]] == [release_zoo_id("minilm"), release_zoo_id("mpnet")]
    assert result["tasks"] == ["retrieval"] and result["config"]["data"]["stores"] == str(stores)
    for ranking in result["rankings"]:
        scores = ranking["scores"]["retrieval"]
        assert len(scores) == 6 and all(0 <= score <= 100 for score in scores)
    assert sum(result["data"]["splits"].values()) == ROWS and list(result["data"]["rows"].values()) == [ROWS]
    assert (run / "report.html").exists() and (run / "ranking.png").exists()
    assert not (run / "best").exists() and len(list((run / "connectors").iterdir())) == 2
    # `config.yaml` says everything: it starts the same run, which stops at what cannot be had again.
    before = (run / "ranking.json").read_bytes()
    again = tmp_path / "again.yaml"
    again.write_text((run / "config.yaml").read_text())
    recipe(f"--config={again}", f"--run={run}")
    assert (run / "ranking.json").read_bytes() == before


def test_too_large_a_batch_is_refused_first(release: Path, recipe: Callable[..., None], tmp_path: Path) -> None:
    import_directory(release, tmp_path / "stores")
    with pytest.raises(HymaError, match=r"search\.batch is 512 but about 120 of 160"):
        recipe(f"--run={tmp_path / 'run'}", f"--data.stores={tmp_path / 'stores'}", "--search.batch=512")
    assert not (tmp_path / "run").exists()


@pytest.mark.zoo
def test_encoders_of_the_zoo_are_stitched(
    recipe: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_plain(tmp_path / "plain", {"efficientnet-lite0": 1280}, {"minilm-l6": 384, "my-own": 6})
    stores, run = tmp_path / "stores", tmp_path / "run"
    import_directory(folder, stores)
    options = [
        f"--run={run}",
        f"--data.stores={stores}",
        "--text_encoders=[minilm-l6]",
        *SMALL,
        "--search.methods=[hyma]",
    ]
    with monkeypatch.context() as patched:
        patched.setattr(export, "text_card", no_zoo)
        recipe(*options)
    assert not (run / "best").exists()
    revisions = json.loads((run / "ranking.json").read_text())
    assert revisions["text"][0]["revision"].startswith("sha256:")
    assert revisions["vision"][0]["revision"].startswith("sha256:")
    # The text encoder can be had now.
    assert hyma(monkeypatch, "export", str(run), "--to", str(tmp_path / "late")) == 0
    recipe(*options)
    one, two = (StitchedVLM.from_pretrained(path) for path in (tmp_path / "late", run / "best"))
    assert one.config.text_id == "minilm-l6" and one.config.vision_id == "efficientnet-lite0"
    assert torch.equal(one.encode_text(["a red apple"]), two.encode_text(["a red apple"]))

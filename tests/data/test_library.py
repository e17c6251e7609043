"""Features are computed once per model and source, whatever lists them, and charged when they are read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hyma_mllm.data import library as module
from hyma_mllm.data.collection import Part
from hyma_mllm.data.embedding import EmbeddingConfig
from hyma_mllm.data.library import Library
from hyma_mllm.data.rows import Row
from hyma_mllm.errors import HymaError
from hyma_mllm.zoo.cards import ModelCard

TEXT = ModelCard("words", "text", "test", "r1", 2, 4, "MIT")
IMAGE = ModelCard("eyes", "image", "test", "r1", 3, 9, "MIT", tokens=1, resolution=4)
WEIGHT = torch.arange(6.0).reshape(2, 3)


@dataclass
class Source:
    name: str = "plain"
    licence: str = "MIT"
    fingerprint: str = "f"

    def rows(self) -> Any:
        raise AssertionError("the library reads the part's rows")


class FakeText:
    passes = 0

    def __init__(self, card: ModelCard) -> None:
        self.card = card

    def encode(self, texts: list[str], batch_size: int = 32) -> Tensor:
        FakeText.passes += len(texts)
        return torch.tensor([[len(text), text.count("a")] for text in texts], dtype=torch.float32)


class FakeImage:
    loads = 0

    def __init__(self, *cards: ModelCard) -> None:
        FakeImage.loads += 1
        self.cards = cards

    def transform(self, picture: Image.Image) -> Tensor:
        return torch.tensor(picture.getpixel((0, 0)), dtype=torch.float32)[:2]

    def pooled(self, pixels: Tensor) -> Mapping[str, Tensor]:
        return {card.id: pixels @ WEIGHT + number for number, card in enumerate(self.cards)}


@pytest.fixture
def parts(tmp_path: Path) -> list[Part]:
    found = []
    for name, count in (("one", 3), ("two", 2)):
        rows = []
        for number in range(count):
            path = tmp_path / f"{name}{number}.png"
            Image.new("RGB", (4, 4), (number, 10 + number, 0)).save(path)
            rows.append(Row(f"{name}/{number}", path, (f"a {name}",), f"{name} {number}"))
        found.append(Part(Source(name), f"{name}-print", rows))
    return found


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "load_text_encoder", lambda card, device: FakeText(card))
    monkeypatch.setattr(module, "load_image_encoder", lambda *cards, device: FakeImage(*cards))
    monkeypatch.setattr(module, "share_weights", lambda cards: [list(cards)])
    FakeText.passes = FakeImage.loads = 0


def test_pictures_of_all_parts_in_order_and_a_control_costs_nothing(parts: list[Part]) -> None:
    cards = [IMAGE, replace(IMAGE, id="eyes@2"), replace(IMAGE, id="eyes#2")]
    first, second, control = Library(EmbeddingConfig(workers=0)).images(cards, parts)
    expected = torch.tensor([[0.0, 10], [1, 11], [2, 12], [0, 10], [1, 11]]) @ WEIGHT
    torch.testing.assert_close(first[:], expected)
    torch.testing.assert_close(second[:], expected + 1)
    assert control is first
    assert FakeImage.loads == 1  # one model for both parts, both blocks and the control


def test_a_second_run_reads_and_pays_the_same(parts: list[Part]) -> None:
    before = Library(EmbeddingConfig(workers=0))
    features = before.images([IMAGE], parts)[0][:]
    after = Library(EmbeddingConfig(workers=0))
    assert torch.equal(after.images([IMAGE], parts)[0][:], features)
    assert FakeImage.loads == 1
    assert after.bill == before.bill
    # 2 x 3 multiply-adds a picture, five pictures.
    assert after.bill.flops == 5 * 2 * 6 and after.bill.items == 5


def test_texts_and_new_weights(parts: list[Part]) -> None:
    items = [(part.fingerprint, part.captions) for part in parts]
    (found,) = Library(EmbeddingConfig(workers=0)).texts([TEXT], items)
    assert found[:].tolist() == [[5, 1]] * 5
    passes = FakeText.passes
    Library(EmbeddingConfig(workers=0)).texts([TEXT], items)
    assert FakeText.passes == passes
    Library(EmbeddingConfig(workers=0)).texts([replace(TEXT, revision="r2")], items)
    assert FakeText.passes == 2 * passes  # other weights are another store


def test_a_width_that_the_card_does_not_state(parts: list[Part]) -> None:
    with pytest.raises(HymaError, match=r"eyes returned features of shape \(3, 3\) where \(3, 4\)"):
        Library(EmbeddingConfig(workers=0)).images([replace(IMAGE, width=4)], parts)

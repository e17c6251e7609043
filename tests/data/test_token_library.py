"""Vision tokens: stored or computed they are the same, their size is known before, and their statistics are right."""

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from hyma_mllm.data import token_library as module
from hyma_mllm.data.collection import Part
from hyma_mllm.data.rows import Row
from hyma_mllm.data.token_library import ComputedTokens, StoredTokens, TokenConfig, TokenLibrary, channel_statistics
from hyma_mllm.errors import HymaError
from hyma_mllm.zoo.cards import ModelCard

CARD = ModelCard("eyes:4px", "image", "test", "r1", 3, 12, "MIT", tokens=4, resolution=4)
CONFIG = TokenConfig(workers=0, batch_size=2)


@dataclass
class Source:
    name: str = "plain"
    licence: str = "MIT"
    fingerprint: str = "f"

    def rows(self) -> Any:
        raise AssertionError("the library reads the part's rows")


class FakeTower(nn.Module):
    """Four tokens of width 3 from the first two channels: [batch, 2] @ [2, 12]."""

    loads = passes = 0

    def __init__(self, card: ModelCard, device: Any = "cpu") -> None:
        super().__init__()
        FakeTower.loads += 1
        self.card = card
        self.weight = nn.Parameter(torch.arange(24.0).reshape(2, 12), requires_grad=False)

    def preprocess(self, picture: Image.Image) -> Tensor:
        return torch.tensor(picture.getpixel((0, 0)), dtype=torch.float32)[:2]

    def tokens(self, pixels: Tensor) -> Tensor:
        FakeTower.passes += len(pixels)
        return (pixels @ self.weight).unflatten(1, (4, 3))


@pytest.fixture
def parts(tmp_path: Path) -> list[Part]:
    found = []
    for name, count in (("one", 3), ("two", 4)):
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
    monkeypatch.setattr(module, "load_tower", FakeTower)
    FakeTower.loads = FakeTower.passes = 0


def expected() -> Tensor:
    first = torch.tensor([[0.0, 10], [1, 11], [2, 12], [0, 10], [1, 11], [2, 12], [3, 13]])
    return (first @ torch.arange(24.0).reshape(2, 12)).unflatten(1, (4, 3))


ROWS = torch.tensor([6, 0, 3, 3, 2])


def test_stored_tokens_are_read_by_row_and_cost_nothing_twice(parts: list[Part]) -> None:
    library = TokenLibrary(CONFIG)
    source, control = library.tokens([CARD, replace(CARD, id="eyes:4px#2")], parts)
    assert isinstance(source, StoredTokens) and control is source and len(source) == 7
    assert source[ROWS].dtype == torch.float32
    assert torch.equal(source[ROWS], expected()[ROWS])
    assert source[ROWS[:0]].shape == (0, 4, 3)
    assert FakeTower.loads == 1
    again = TokenLibrary(CONFIG)
    assert torch.equal(again.tokens([CARD], parts)[0][ROWS], expected()[ROWS])
    assert FakeTower.loads == 1 and again.bill == library.bill
    # 2 x 12 multiply-adds a picture, seven pictures.
    assert library.bill.flops == 7 * 2 * 24 and library.bill.items == 7


def test_what_is_over_the_budget_is_computed_and_equal(parts: list[Part]) -> None:
    library = TokenLibrary(replace(CONFIG, disk_gb=0))
    (source,) = library.tokens([CARD], parts)
    assert isinstance(source, ComputedTokens) and len(source) == 7
    assert torch.equal(source[ROWS], expected()[ROWS])
    assert library.bill.items == 4 and library.bill.flops == 4 * 2 * 24
    before = FakeTower.passes
    assert torch.equal(source[ROWS.flip(0)], expected()[ROWS.flip(0)])
    assert FakeTower.passes == before  # still in memory
    assert torch.equal(source[torch.tensor([1])], expected()[1:2])
    assert FakeTower.passes == before + 1
    assert source[ROWS[:0]].shape == (0, 4, 3)


def test_memory_of_computed_tokens_is_bounded_and_the_oldest_go(parts: list[Part]) -> None:
    (source,) = TokenLibrary(replace(CONFIG, disk_gb=0, memory_mb=2 * 24e-6)).tokens([CARD], parts)
    source[torch.tensor([0, 1, 2])]
    before = FakeTower.passes
    source[torch.tensor([2, 1])]
    assert FakeTower.passes == before
    source[torch.tensor([0])]  # was pushed out
    assert FakeTower.passes == before + 1


def test_the_plan_says_what_is_stored_before_anything_is_computed(parts: list[Part]) -> None:
    other = replace(CARD, id="more:4px", revision="r2")
    size = 7 * 12 * 2
    library = TokenLibrary(replace(CONFIG, disk_gb=1.5 * size / 1e9))
    plans = library.plan([CARD, other, replace(CARD, id="eyes:4px#2")], parts)
    assert FakeTower.loads == 0
    assert [(plan.bytes, plan.stored) for plan in plans] == [(size, True), (size, False), (size, True)]
    assert "7 pictures x 4 tokens x 3" in str(plans[0]) and "computed as they are asked for" in str(plans[1])
    library.tokens([CARD], parts)
    # What is there already stays stored, under any budget.
    assert TokenLibrary(replace(CONFIG, disk_gb=0)).plan([CARD], parts)[0].stored


def test_bytes_of_the_plan_are_those_on_disk(parts: list[Part], tmp_path: Path) -> None:
    library = TokenLibrary(replace(CONFIG, storage_dtype="fp32"))
    library.tokens([CARD], parts)
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    headers = 128 * len(files)
    assert library.plan([CARD], parts)[0].bytes <= sum(file.stat().st_size for file in files) <= 7 * 48 + headers


def test_other_weights_are_another_store(parts: list[Part]) -> None:
    TokenLibrary(CONFIG).tokens([CARD], parts)
    TokenLibrary(CONFIG).tokens([replace(CARD, revision="r2")], parts)
    assert FakeTower.loads == 2


@pytest.mark.parametrize("disk", [0.0, 8.0])
def test_tokens_too_large_for_fp16_are_named(disk: float, parts: list[Part], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTower, "tokens", lambda self, pixels: torch.full((len(pixels), 4, 3), 1e5))
    with pytest.raises(HymaError, match=r"one/0.*eyes:4px.*bf16"):
        TokenLibrary(replace(CONFIG, disk_gb=disk)).tokens([CARD], parts)[0][torch.tensor([0])]


@pytest.mark.parametrize("disk", [0.0, 8.0])
def test_a_row_that_is_not_there(disk: float, parts: list[Part]) -> None:
    (source,) = TokenLibrary(replace(CONFIG, disk_gb=disk)).tokens([CARD], parts)
    for row in (-1, 7):
        with pytest.raises(IndexError, match="of 7"):
            source[torch.tensor([row])]


@pytest.mark.parametrize("setting", [{"disk_gb": -1.0}, {"memory_mb": -1.0}, {"batch_size": 0}])
def test_bad_settings(setting: dict[str, Any]) -> None:
    with pytest.raises(HymaError, match=f"tokens.{next(iter(setting))}"):
        TokenConfig(**setting)


def test_threads_change_nothing(parts: list[Part]) -> None:
    for disk in (0.0, 8.0):
        (source,) = TokenLibrary(TokenConfig(workers=2, batch_size=2, disk_gb=disk)).tokens([CARD], parts)
        assert torch.equal(source[ROWS], expected()[ROWS])


@dataclass
class Held:
    values: Tensor

    @property
    def card(self) -> ModelCard:
        return dataclasses.replace(CARD, width=self.values.shape[2])

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.values[rows]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(2, 40), offset=st.sampled_from([0.0, 1e3]))
def test_statistics_are_those_of_all_tokens_at_once(seed: int, rows: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows + 5, 4, 6, generator=generator) * torch.rand(6, generator=generator).add(0.1) + offset
    chosen = torch.randperm(rows + 5, generator=generator)[:rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STATISTICS_ROWS", 7)
        mean, deviation = channel_statistics(Held(values), chosen)
    flat = values[chosen].flatten(0, 1).double()
    torch.testing.assert_close(mean, flat.mean(0), rtol=1e-10, atol=1e-10)
    alone = flat.std(0, correction=0)
    expected = torch.maximum(alone, 0.1 * alone.median())
    torch.testing.assert_close(deviation, expected, rtol=1e-8, atol=1e-8)


def test_near_constant_channels_get_a_share_of_the_usual_deviation() -> None:
    values = torch.randn(50, 4, 5)
    values[..., 1] = 3.0
    values[..., 2] = 3.0 + 1e-5 * torch.randn(50, 4)
    mean, deviation = channel_statistics(Held(values), torch.arange(50))
    usual = values.flatten(0, 1).double().std(0, correction=0).median().expand(2)
    torch.testing.assert_close(deviation[1:3], 0.1 * usual)
    assert mean[1] == 3
    assert torch.equal(channel_statistics(Held(torch.ones(3, 4, 2)), torch.arange(3))[1], torch.ones(2).double())
    with pytest.raises(ValueError, match="no rows"):
        channel_statistics(Held(values), torch.arange(0))

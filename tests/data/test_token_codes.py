"""Stored forms of vision tokens: their size, their largest error, and stores written and read in them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hyma_mllm.data import token_library
from hyma_mllm.data.collection import Part
from hyma_mllm.data.manifest import STORED_DTYPES
from hyma_mllm.data.rows import Row
from hyma_mllm.data.token_codes import BLOCK, TokenDtype, as_features, decode, encode, row_bytes, row_entries
from hyma_mllm.data.token_library import TokenConfig, TokenLibrary
from hyma_mllm.errors import HymaError
from hyma_mllm.zoo.cards import ModelCard

FORMS: tuple[TokenDtype, ...] = ("fp32", "fp16", "bf16", "fp8", "int8")
CODED: tuple[TokenDtype, ...] = ("fp8", "int8")


def drawn(seed: int, pictures: int, tokens: int, width: int, spread: float) -> Tensor:
    """Tokens whose channels differ in size by up to e^spread, as those of towers do."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(width, generator=generator))
    return torch.randn(pictures, tokens, width, generator=generator) * sizes


def block_peaks(values: Tensor) -> Tensor:
    """[..., width]: the largest magnitude in the block of each value, by plain loops."""
    peaks = torch.empty_like(values)
    for start in range(0, values.shape[-1], BLOCK):
        part = values[..., start : start + BLOCK]
        peaks[..., start : start + BLOCK] = part.abs().max(-1, keepdim=True).values
    return peaks


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    pictures=st.integers(1, 3),
    tokens=st.integers(1, 5),
    width=st.integers(1, 200),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
)
def test_errors_keep_to_their_bounds(seed: int, pictures: int, tokens: int, width: int, spread: float) -> None:
    values = drawn(seed, pictures, tokens, width, spread)
    peaks = block_peaks(values)
    bounds = {
        "fp32": torch.zeros_like(values),
        "bf16": values.abs() * 2**-8,
        "int8": peaks / 254 * (1 + 1e-5),
        # Half a step of four binary digits; below its least normal number fp8 has fixed steps of 2^-9.
        "fp8": torch.maximum(values.abs() / 16, peaks / 448 * 2**-10) * (1 + 1e-5),
    }
    for form, bound in bounds.items():
        rows = encode(values, form)  # type: ignore[arg-type]
        assert rows.shape == (pictures, row_entries(form, tokens, width))  # type: ignore[arg-type]
        assert rows.dtype == STORED_DTYPES[form]
        assert rows.nbytes == pictures * row_bytes(form, tokens, width)  # type: ignore[arg-type]
        error = (decode(rows, form, tokens, width) - values).abs()  # type: ignore[arg-type]
        assert bool((error <= bound).all()), form


@pytest.mark.parametrize("form", CODED)
def test_a_code_of_a_code_is_itself(form: TokenDtype) -> None:
    once = decode(encode(drawn(0, 2, 3, 130, 2.0), form), form, 3, 130)
    torch.testing.assert_close(decode(encode(once, form), form, 3, 130), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", CODED)
def test_a_huge_channel_spoils_only_its_own_block(form: TokenDtype) -> None:
    values = drawn(1, 1, 2, 3 * BLOCK, 0.0)
    quiet = decode(encode(values, form), form, 2, 3 * BLOCK)
    values[..., 5] = 1e6
    loud = decode(encode(values, form), form, 2, 3 * BLOCK)
    assert torch.equal(loud[..., BLOCK:], quiet[..., BLOCK:])
    assert loud[0, 0, 5] == pytest.approx(1e6)


@pytest.mark.parametrize("form", FORMS)
def test_zeros_and_no_pictures(form: TokenDtype) -> None:
    assert not decode(encode(torch.zeros(2, 3, 70), form), form, 3, 70).any()
    assert decode(encode(torch.zeros(0, 3, 70), form), form, 3, 70).shape == (0, 3, 70)


def test_codes_take_half_of_sixteen_bits() -> None:
    assert row_bytes("fp16", 576, 1024) == 576 * 1024 * 2
    for form in CODED:
        assert row_bytes(form, 576, 1024) == 576 * (1024 + 16 * 4)


@pytest.mark.parametrize("form", CODED)
def test_rows_with_no_code_are_not_numbers_and_others_are_untouched(form: TokenDtype) -> None:
    values = drawn(2, 3, 2, 65, 1.0)
    good = as_features(values, form)
    assert torch.equal(good.to(torch.uint8), encode(values, form))
    values[1, 0, 64] = float("inf")
    bad = as_features(values, form)
    assert bool(bad[1].isnan().all()) and torch.equal(bad[[0, 2]], good[[0, 2]])


class Tower(torch.nn.Module):
    """Two tokens of width 70 from the first channel of the picture's corner."""

    def __init__(self, card: ModelCard, device: object = "cpu") -> None:
        super().__init__()
        self.card = card
        self.weight = torch.nn.Parameter(drawn(3, 1, 2, 70, 2.0)[0], requires_grad=False)

    def preprocess(self, picture: Image.Image) -> Tensor:
        return torch.tensor(float(picture.getpixel((0, 0))[0]))  # type: ignore[index]

    def tokens(self, pixels: Tensor) -> Tensor:
        return (1 + pixels)[:, None, None] * self.weight


class Blind(Tower):
    """Sees no finite number in the second picture."""

    def tokens(self, pixels: Tensor) -> Tensor:
        return torch.where((pixels == 1)[:, None, None], torch.inf, super().tokens(pixels))


CARD = ModelCard("eyes:4px", "image", "test", "r1", 70, 12, "MIT", tokens=2, resolution=4)


class Plain:
    """A source's name."""

    name, licence, fingerprint = "plain", "MIT", "f"

    def rows(self) -> object:
        raise AssertionError("the library reads the part's rows")


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Part:
    monkeypatch.setenv("HYMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_library, "load_tower", Tower)
    rows = []
    for number in range(5):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
        rows.append(Row(f"plain/{number}", path, ("a",), str(number)))
    return Part(Plain(), "print", rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
def test_stored_and_computed_tokens_are_the_same_in_every_form(form: TokenDtype, part: Part) -> None:
    config = TokenConfig(storage_dtype=form, workers=0, batch_size=2)
    wanted = torch.tensor([4, 0, 0, 3])
    computed = TokenLibrary(replace(config, disk_gb=0.0)).tokens([CARD], [part])[0][wanted]
    library = TokenLibrary(config)
    assert torch.equal(library.tokens([CARD], [part])[0][wanted], computed)
    exact = (1 + wanted.float())[:, None, None] * Tower(CARD).weight
    assert bool(((computed - exact).abs() <= block_peaks(exact) / 16 + 1e-6).all())
    assert library.plan([CARD], [part])[0].bytes == 5 * row_bytes(form, 2, 70)


def test_forms_have_stores_of_their_own(part: Part, tmp_path: Path) -> None:
    for form in FORMS:
        TokenLibrary(TokenConfig(storage_dtype=form, workers=0)).tokens([CARD], [part])
    assert len(list((tmp_path / "cache").rglob("manifest.json"))) == len(FORMS)


@pytest.mark.parametrize("form", CODED)
@pytest.mark.parametrize("disk", [0.0, 8.0])
def test_what_is_not_finite_is_named(
    form: TokenDtype, disk: float, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_library, "load_tower", Blind)
    with pytest.raises(HymaError, match=r"plain/1.* not finite"):
        TokenLibrary(TokenConfig(storage_dtype=form, workers=0, disk_gb=disk)).tokens([CARD], [part])[0][
            torch.tensor([1])
        ]

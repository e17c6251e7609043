"""Every kind of picture that a folder from the wild holds."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from hyma_mllm.data.pictures import BadPicture, checked_picture, open_picture
from hyma_mllm.errors import HymaError


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_plain_rgb_is_kept_exactly(tmp_path: Path) -> None:
    picture = noise()
    file = tmp_path / "a.png"
    picture.save(file)
    opened = open_picture(file)
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), np.asarray(picture))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(mode: str) -> None:
    picture = Image.new(mode, (4, 4), (0,) * len(mode))
    picture.putpixel((1, 1), (0,) * (len(mode) - 1) + (255,))
    picture.putpixel((2, 2), (0,) * (len(mode) - 1) + (128,))
    opened = open_picture(encoded(picture, "PNG"))
    assert opened.mode == "RGB"
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((1, 1)) == (0, 0, 0)
    assert opened.getpixel((2, 2)) == (127, 127, 127)


def test_palette_with_transparency_lies_on_white() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    opened = open_picture(encoded(picture, "PNG", transparency=0))
    assert [opened.getpixel((0, 0)), opened.getpixel((1, 0))] == [(255, 255, 255), (0, 0, 255)]
    half = open_picture(encoded(picture, "PNG", transparency=bytes([255, 0])))
    assert [half.getpixel((0, 0)), half.getpixel((1, 0))] == [(255, 0, 0), (255, 255, 255)]
    still_gif = open_picture(encoded(picture, "GIF", transparency=1))
    assert [still_gif.getpixel((0, 0)), still_gif.getpixel((1, 0))] == [(255, 0, 0), (255, 255, 255)]


def test_a_colour_key_is_transparent() -> None:
    picture = Image.new("RGB", (2, 1), (10, 20, 30))
    picture.putpixel((1, 0), (200, 0, 0))
    opened = open_picture(encoded(picture, "PNG", transparency=(10, 20, 30)))
    assert [opened.getpixel((0, 0)), opened.getpixel((1, 0))] == [(255, 255, 255), (200, 0, 0)]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None, :].repeat(16, 0)
    opened = np.asarray(open_picture(encoded(Image.fromarray(ramp), "PNG")))
    assert opened.shape == (16, 256, 3)
    assert np.array_equal(opened[0, :, 0], np.arange(256))


def test_sixteen_bit_colour_is_scaled() -> None:
    pixels = np.array([[[65535, 32768, 256]]], dtype=">u2")

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + pixels.tobytes())) + chunk(b"IEND", b"")
    assert open_picture(b"\x89PNG\r\n\x1a\n" + body).getpixel((0, 0)) == (255, 128, 1)


def test_floats_are_scaled_and_thirty_two_bits_refused() -> None:
    grey = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert np.asarray(open_picture(encoded(Image.fromarray(grey), "TIFF")))[0, :, 0].tolist() == [0, 128, 255]
    for values in (grey * 1e6, np.array([[1_000_000]], dtype=np.int32), grey * np.float32("nan")):
        with pytest.raises(BadPicture, match="grey values"):
            open_picture(encoded(Image.fromarray(values), "TIFF"))


def test_cmyk_without_a_profile() -> None:
    picture = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    red, green, blue = open_picture(encoded(picture, "JPEG", quality=95)).getpixel((5, 5))  # type: ignore[misc]
    assert red > 240
    assert green < 15
    assert blue < 15


def test_a_profile_that_is_for_other_channels_is_refused() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    with pytest.raises(BadPicture, match="colour profile"):
        open_picture(encoded(picture, "JPEG", icc_profile=profile))


def test_lab_becomes_srgb() -> None:
    picture = Image.new("LAB", (4, 4), (255, 128, 128))
    assert open_picture(encoded(picture, "TIFF")).getpixel((0, 0)) == pytest.approx((255, 255, 255), abs=2)


def test_exif_orientation_is_applied() -> None:
    picture = Image.new("RGB", (8, 16), "white")
    picture.paste("black", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright: the top goes to the right
    opened = open_picture(encoded(picture, "PNG", exif=exif))
    assert opened.size == (16, 8)
    assert opened.getpixel((15, 4)) == (0, 0, 0)
    assert opened.getpixel((0, 4)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_refused(kind: str) -> None:
    frames = [noise(), noise().rotate(90)]
    with pytest.raises(BadPicture, match="animated") as caught:
        open_picture(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert "2 frames" in caught.value.reason


def test_a_phone_photo_with_a_preview_is_no_animation() -> None:
    first = encoded(noise(), "MPO", save_all=True, append_images=[noise(32, 24)])
    assert Image.open(io.BytesIO(first)).format == "MPO"
    assert open_picture(first).size == (64, 48)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_file_is_refused(kind: str) -> None:
    data = encoded(noise(), kind)
    with pytest.raises(BadPicture):
        open_picture(data[: len(data) // 2])


@given(cut=st.integers(0, 2000), at=st.integers(0, 2000), byte=st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_damage_gives_a_picture_or_a_reason(cut: int, at: int, byte: int) -> None:
    for kind in ("PNG", "JPEG", "GIF"):
        data = bytearray(encoded(noise(20, 20), kind))
        data[at % len(data)] = byte
        try:
            opened = open_picture(bytes(data[: len(data) - cut % len(data)]))
        except BadPicture as refused:
            assert refused.reason
        else:
            assert opened.mode == "RGB"


def test_aspect_ratio_and_bombs_are_refused() -> None:
    with pytest.raises(BadPicture, match="aspect ratio of 400 x 10"):
        open_picture(encoded(noise(400, 10), "PNG"))
    assert open_picture(encoded(noise(200, 10), "PNG")).size == (200, 10)
    with pytest.raises(BadPicture, match="pixels"):
        open_picture(encoded(noise(200, 200), "PNG"), max_pixels=1000)
    netpbm = b"P6 60000 60000 255\n" + bytes(64)
    with pytest.raises(BadPicture, match="100,000,000 pixels"):
        open_picture(netpbm)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    for image, reason in (
        (b"", "no picture"),
        (b"hello", "known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "known format"),
        (tmp_path / "missing.png", "does not exist"),
        (tmp_path, "folder"),
    ):
        with pytest.raises(BadPicture, match=reason):
            open_picture(image)


def test_a_picture_that_went_missing_is_named(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    assert checked_picture("k1", tmp_path / "a.png").size == (64, 48)
    (tmp_path / "a.png").unlink()
    with pytest.raises(HymaError, match=r"row k1 was readable .* \(the file does not exist\); put it back"):
        checked_picture("k1", tmp_path / "a.png")

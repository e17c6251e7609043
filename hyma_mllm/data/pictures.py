"""Any picture file, opened as plain RGB, or refused with a reason.

- transparency (alpha channel, palette entry, colour key) is laid on white
- CMYK goes through its embedded colour profile where there is one; RGB keeps its numbers, as it did when the encoders
  were trained
- 16-bit is scaled to 8 bits, never clipped
- the EXIF orientation is applied
- animations, truncated files, extreme aspect ratios and decompression bombs are refused
"""

import io
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import UNREADABLE, reason

MAX_ASPECT = 20.0
MAX_PIXELS = 100_000_000

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "AVIF", "ICO", "TGA")
"""What Pillow may decode. Not EPS, for which it starts another program, nor forms that hardly anybody still uses."""


class BadPicture(Exception):  # noqa: N818 (it names the picture, not a fault of the program)
    """A picture that is refused; `reason` says why, in words for the list of bad rows."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class PackedPicture(Protocol):
    """A picture inside a larger file; equal ones are the same picture of the same file."""

    def read_bytes(self) -> bytes:
        """The encoded picture, read now; OSError if the file cannot be read."""
        ...


def open_picture(
    image: Path | bytes | PackedPicture, max_aspect: float = MAX_ASPECT, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The picture in mode RGB, fully decoded, upright, without transparency.

    Args:
        image: a file, the encoded bytes of one, or a place in a larger file.
        max_aspect: the longer side over the shorter one may be at most this.
        max_pixels: width times height may be at most this; checked before the pixels are decoded.

    Raises:
        BadPicture: it is no picture, is broken, is animated (which frame the caption means cannot be known), or
            breaks a limit.
    """
    if isinstance(image, bytes) and not image:
        raise BadPicture("there is no picture")
    try:
        if not isinstance(image, (bytes, Path)):
            image = image.read_bytes()
        elif isinstance(image, Path):
            refuse_special(image)
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as opened:
            _refuse_by_header(opened, max_aspect, max_pixels)
            opened.load()
            return _to_rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError as error:
        raise BadPicture("the file does not exist") from error
    except IsADirectoryError as error:
        raise BadPicture("it is a folder, not a file") from error
    except UnidentifiedImageError as error:
        raise BadPicture("not a picture in a known format") from error
    except Image.DecompressionBombError as error:
        raise BadPicture(f"more than {max_pixels:,} pixels") from error
    except UNREADABLE as error:
        raise BadPicture(f"cannot be decoded: {reason(error)}") from error


def refuse_special(file: Path) -> None:
    """Refuse what a table may name beside files: a device, say, that gives bytes without an end.

    Raises:
        OSError: it is neither a file nor a folder, which is refused when it is opened.
    """
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise OSError("it is a device or a pipe, not a file")


def _refuse_by_header(picture: Image.Image, max_aspect: float, max_pixels: int) -> None:
    width, height = picture.size
    if width < 1 or height < 1:
        raise BadPicture(f"it has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise BadPicture(f"more than {max_pixels:,} pixels ({width} x {height})")
    if max(width, height) > max_aspect * min(width, height):
        raise BadPicture(f"the aspect ratio of {width} x {height} is above {max_aspect:g}")
    # The further frames of a phone's MPO file are previews and depth maps of the first, not an animation.
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":
        raise BadPicture(f"it is animated or has pages ({frames} frames)")


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _to_8_bits(picture)
    if picture.has_transparency_data:
        coloured = picture.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    if picture.mode in ("CMYK", "LAB"):
        return _through_profile(picture)
    return picture.convert("RGB")


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of 16 or 32 bits as mode L; a PNG of 16 bits reaches us as `I;16` or, from old Pillows, `I`."""
    values = np.asarray(picture).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(values).all() or low < 0:
        raise BadPicture(f"grey values of mode {picture.mode} that are negative or not finite")
    float_top = 1.0 if high <= 1.0 else 255.0
    top = float_top if picture.mode == "F" else 65535.0
    if high > top:
        raise BadPicture(f"grey values up to {high:g} in mode {picture.mode}, whose full scale is not known")
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))


def _through_profile(picture: Image.Image) -> Image.Image:
    embedded = picture.info.get("icc_profile")
    try:
        if picture.mode == "LAB":
            source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        elif embedded:
            source = ImageCms.ImageCmsProfile(io.BytesIO(embedded))
        else:
            return picture.convert("RGB")
        converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError as error:
        raise BadPicture(f"the colour profile of this {picture.mode} picture cannot be used: {error}") from error
    assert converted is not None  # None only comes from inPlace=True
    return converted


def checked_picture(key: str, image: Path | bytes | PackedPicture) -> Image.Image:
    """`open_picture` of a row that was good when the run looked at it.

    Raises:
        HymaError: it no longer is.
    """
    try:
        return open_picture(image)
    except BadPicture as refused:
        raise HymaError(
            f"The picture of row {key} was readable when the run began and is not any more ({refused.reason}); put it "
            "back and run the same command again."
        ) from refused

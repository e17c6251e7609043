"""Pictures as the towers were trained on them: RGB, transparency on white, whether from a file or from memory."""

import io
from pathlib import Path

from PIL import Image

from hyma_mllm.data.pictures import BadPicture, open_picture
from hyma_mllm.errors import HymaError

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


def rgb(picture: Image.Image | Path) -> Image.Image:
    """The picture in RGB; one that is in memory takes the same way as a file.

    Raises:
        HymaError: if a file is no readable picture.
    """
    if isinstance(picture, Path):
        if not picture.is_file():
            raise HymaError(f"There is no picture {picture}; check the path.")
        try:
            return open_picture(picture)
        except BadPicture as error:
            raise HymaError(f"{picture} is refused ({error.reason}); leave it out or mend it.") from error
    if picture.mode == "RGB" and not picture.has_transparency_data:
        return picture
    encoded = io.BytesIO()
    (picture if picture.mode in _PNG_MODES else picture.convert("RGB")).save(encoded, "PNG")
    return open_picture(encoded.getvalue())

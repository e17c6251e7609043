"""Pictures of a run, inlined into its report."""

import base64
import io
from pathlib import Path

from hyma_mllm.data.pictures import BadPicture, open_picture

THUMBNAIL = 224


def inlined(run: Path, name: str) -> str | None:
    """A picture under `examples/` as a `data:` address of at most 224 pixels a side; None where it is not there.

    Args:
        run: the run directory.
        name: path of the picture relative to it.

    Raises:
        ValueError: the path leaves `examples/`, or what lies there is no picture.
    """
    folder = (run / "examples").resolve()
    path = (run / str(name)).resolve()
    if not path.is_relative_to(folder):
        raise ValueError(f"the picture {name} lies outside {folder}")
    if not path.is_file():
        return None
    buffer = io.BytesIO()
    try:
        image = open_picture(path)
    except BadPicture as refused:
        raise ValueError(f"the picture {name} is refused, {refused.reason}") from refused
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

"""How an image encoder is named: `base`, `base@8`, `base@8+11`, and a second id for a control, `base#2`.

A vision tower, which is read as tokens, adds `:112px` (side of its input), `:pool2` or `:shuffle2` (fewer tokens), and
counts blocks from the end too: `base@-2`.
"""

import re
from dataclasses import dataclass
from typing import Literal

_NAME = re.compile(r"(?P<base>.+?)(@(?P<blocks>[1-9]\d*(\+[1-9]\d*)*))?(#(?P<copy>\d+))?")
_TOWER = re.compile(
    r"(?P<base>.+?)(@(?P<blocks>(-?[1-9]\d*)(\+-?[1-9]\d*)*))?(:(?P<side>[1-9]\d*)px)?"
    r"(:(?P<reduction>pool|shuffle)(?P<factor>[2-9]))?(#(?P<copy>\d+))?"
)

Reduction = Literal["none", "pool", "shuffle"]


@dataclass(frozen=True)
class ImageName:
    """A parsed name.

    Attributes:
        base: what names the weights; equal bases share them.
        blocks: block numbers whose pooled features are concatenated; `(0,)` is the network's own output.
    """

    base: str
    blocks: tuple[int, ...]


def parse_image_name(name: str) -> ImageName:
    """Split a name into its weights and its blocks."""
    found = _NAME.fullmatch(name)
    if found is None:
        return ImageName(name, (0,))
    blocks = found["blocks"]
    return ImageName(found["base"], tuple(map(int, blocks.split("+"))) if blocks else (0,))


@dataclass(frozen=True)
class TowerName:
    """A parsed name of a vision tower.

    Attributes:
        base: what names the weights.
        blocks: block numbers whose tokens are concatenated along the width; negative ones count from the end; empty
            takes the tower's default.
        side: input side in pixels, None for the encoder's own.
        reduction: how tokens are made fewer: a mean over squares (`pool`), or squares laid side by side (`shuffle`).
        factor: side of such a square, in tokens.
    """

    base: str
    blocks: tuple[int, ...] = ()
    side: int | None = None
    reduction: Reduction = "none"
    factor: int = 1


def parse_tower_name(name: str) -> TowerName:
    """Split the name of a vision tower."""
    found = _TOWER.fullmatch(name)
    if found is None:
        return TowerName(name)
    return TowerName(
        base=found["base"],
        blocks=tuple(map(int, found["blocks"].split("+"))) if found["blocks"] else (),
        side=int(found["side"]) if found["side"] else None,
        reduction=found["reduction"] or "none",  # type: ignore[arg-type]
        factor=int(found["factor"] or 1),
    )

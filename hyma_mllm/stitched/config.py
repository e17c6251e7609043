"""What a stitched model writes about itself: its parts, their revisions, its scores and whom it owes credit."""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import build, parse_json
from hyma_mllm.zoo.cards import ModelCard, base_id

FILE_NAME = "config.json"
FORMAT = "hyma_mllm.StitchedVLM/1"

MAX_WIDTH = 1 << 20
"""Of a feature in a file; more is a lie, which would be believed by whoever makes room for it."""


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("hyma_mllm", "torch", "transformers", "sentence-transformers", "timm")}


@dataclass(frozen=True)
class DataCredit:
    """A source of pictures and words that the connector was trained on.

    Attributes:
        name: of the source.
        licence: of its pictures and words.
        fingerprint: of its rows, as the feature store knows it; empty where it is not known.
        attribution: whom to name wherever its pictures are shown.
    """

    name: str
    licence: str
    fingerprint: str = ""
    attribution: str = ""


@dataclass(frozen=True)
class StitchedConfig:
    """Everything about a stitched model but its weights; `config.json` in its directory.

    Attributes:
        vision: card of the image encoder; a control id such as `x#2` is written as `x`.
        text: card of the text encoder; likewise.
        connector: depth, hidden width and activation of the connector.
        scores: name of an evaluation -> score of this pair, in percent.
        data: what the connector was trained on.
        versions: package -> version that wrote the model.
    """

    vision: ModelCard
    text: ModelCard
    connector: ConnectorSpec
    scores: dict[str, float] = field(default_factory=dict)
    data: tuple[DataCredit, ...] = ()
    versions: dict[str, str] = field(default_factory=_versions)

    def __post_init__(self) -> None:
        for side in ("vision", "text"):
            card = getattr(self, side)
            object.__setattr__(self, side, replace(card, id=base_id(card.id)))

    @property
    def vision_id(self) -> str:
        """Id under which the zoo loads the image encoder."""
        return self.vision.id

    @property
    def text_id(self) -> str:
        """Id under which the zoo loads the text encoder."""
        return self.text.id

    @property
    def shape(self) -> tuple[int, int]:
        """(d_text, d_image): what the connector reads and writes."""
        return self.text.width, self.vision.width

    def to_json(self) -> str:
        """The text of `config.json`."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, directory: Path) -> "StitchedConfig":
        """Read the `config.json` of a stitched model.

        Raises:
            HymaError: if the directory holds none, or one that this version does not know.
        """
        path = directory / FILE_NAME
        if not path.is_file():
            raise HymaError(
                f"{directory} has no {FILE_NAME}; name a stitched model, e.g. the best/ directory of a run."
            )
        return read_written(path, FORMAT, cls, "text")


class _Written(Protocol):
    """A dataclass that `read_written` reads."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


C = TypeVar("C", bound=_Written)


def read_written(path: Path, form: str, kind: type[C], second: str) -> C:
    """What `to_json` of a stitched model wrote.

    Args:
        path: the file, which is there.
        form: its format must be this.
        kind: dataclass of its content: cards `vision` and `second`, a `connector`, credits `data`, and plain values.
        second: field of the second model's card.

    Raises:
        HymaError: if it is no JSON, or of another format or content.
    """
    try:
        raw = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise HymaError(f"{path} is no JSON ({error}); export the model again.") from error
    found = raw.pop("format", None) if isinstance(raw, dict) else None
    if found != form:
        raise HymaError(f"{path} has format {found!r}, but this version reads {form!r}; export the model again.")
    try:
        parts: dict[str, Any] = {
            "vision": build(ModelCard, raw["vision"]),
            second: build(ModelCard, raw[second]),
            "connector": build(ConnectorSpec, raw["connector"]),
            "data": tuple(build(DataCredit, credit) for credit in raw["data"]),
        }
        made = build(kind, raw | parts)
        sizes = [
            parts["vision"].width,
            parts[second].width,
            parts["connector"].hidden + 1,
            parts["connector"].depth + 1,
        ]
        if not all(0 < size <= MAX_WIDTH for size in sizes):
            raise TypeError(f"a width or a depth is below its least or above {MAX_WIDTH}")
        return made
    except (KeyError, TypeError) as error:
        known = ", ".join(f.name for f in fields(kind))
        raise HymaError(f"{path} does not hold exactly {known} ({error}); export the model again.") from error

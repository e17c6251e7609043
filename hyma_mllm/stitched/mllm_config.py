"""What a stitched MLLM knows about itself beyond what transformers reads: `hyma.json` in its directory."""

import json
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.errors import HymaError
from hyma_mllm.stitched.config import DataCredit, read_written
from hyma_mllm.zoo.cards import ModelCard, base_id

FILE_NAME = "hyma.json"
FORMAT = "hyma_mllm.StitchedMLLM/1"

Form = Literal["llava", "fastvlm", "own"]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("hyma_mllm", "torch", "transformers", "timm")}


@dataclass(frozen=True)
class MLLMConfig:
    """Parts, scores and credits of a stitched MLLM; `hyma.json` in its directory.

    Attributes:
        vision: card of the vision tower; a control id such as `x#2` is written as `x`.
        llm: card of the LLM; likewise.
        connector: depth, hidden width and activation of the connector.
        form: the class that loads it: plain LLaVA, FastVLM (CNN towers), or hyma_mllm's own; set by the export.
        scores: name of an evaluation -> score of this pair, in percent.
        blind: name of an evaluation -> score of the same LLM without the picture, in percent.
        data: what connector and LLM were trained on.
        tuned: what changed the LLM after the search, empty while it is the frozen one.
        versions: package -> version that wrote the model.
    """

    vision: ModelCard
    llm: ModelCard
    connector: ConnectorSpec
    form: Form = "llava"
    scores: dict[str, float] = field(default_factory=dict)
    blind: dict[str, float] = field(default_factory=dict)
    data: tuple[DataCredit, ...] = ()
    tuned: str = ""
    versions: dict[str, str] = field(default_factory=_versions)

    def __post_init__(self) -> None:
        for side in ("vision", "llm"):
            card = getattr(self, side)
            object.__setattr__(self, side, replace(card, id=base_id(card.id)))

    @property
    def model_id(self) -> str:
        """`tower + LLM`: how answers and tables name the model."""
        return f"{self.vision.id} + {self.llm.id}"

    def to_json(self) -> str:
        """The text of `hyma.json`."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, directory: Path) -> "MLLMConfig":
        """Read the `hyma.json` of a stitched MLLM.

        Raises:
            HymaError: if the directory is not there, holds none, or one that this version does not know.
        """
        path = directory / FILE_NAME
        if not directory.is_dir():
            raise HymaError(f"There is no directory {directory}; name an exported MLLM, e.g. the best/ of a run.")
        if not path.is_file():
            raise HymaError(f"{directory} has no {FILE_NAME}; name an exported MLLM, e.g. the best/ of a run.")
        return read_written(path, FORMAT, cls, "llm")

"""The hypernetwork's configuration, and the named presets that fill what it leaves open."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.hypernetwork.base import BaseKind
from hyma_mllm.hypernetwork.conditions import ConditionKind
from hyma_mllm.hypernetwork.heads import HeadKind

Preset = Literal["default", "closed-form", "hyma", "hyper-align"]
Initialisation = Literal["hyper", "torch"]


@dataclass
class HypernetworkConfig:
    """What the hypernetwork is made of.

    Attributes:
        preset: `hyma` is the paper's (a row per pair, dense head), `hyper-align` predicts from mean features (linear
            connectors only), `default` starts every connector at random, `closed-form`, the best found, at a
            connector that is computed for the pair (`search.closed_form`).
        condition: what tells pairs apart: `pair`, `factored` or `features`; the preset's if null.
        head: `dense`, `chunked` or `low_rank`; the preset's if null.
        base: what a head adds to: one learned base per layer `shape`, `factored` by the models that a layer touches, or
            `closed_form`, a connector computed for each pair plus factored terms from zero; the preset's if null.
        initialisation: `hyper` predicts connectors like a new nn.Linear at step 0; `torch` leaves torch's defaults and
            normalises nothing, as the paper did (dense head only).
        condition_width: width of a condition.
        trunk: widths of the trunk's layers; the last is the width of the code that heads read.
        rank: of a low-rank head.
        alpha: scale of a low-rank head's delta, which is alpha / rank * U V^T.
        chunk_rows: rows that a chunked head predicts at once, at most.

    Raises:
        HymaError: for a value that describes no hypernetwork.
    """

    preset: Preset = "default"
    condition: ConditionKind | None = None
    head: HeadKind | None = None
    base: BaseKind | None = None
    initialisation: Initialisation = "hyper"
    condition_width: int = 32
    trunk: list[int] = field(default_factory=lambda: [128, 512])
    rank: int = 8
    alpha: float = 2.0
    chunk_rows: int = 16

    def __post_init__(self) -> None:
        for key, known, value in (
            ("preset", get_args(Preset), self.preset),
            ("condition", (None, *get_args(ConditionKind)), self.condition),
            ("head", (None, *get_args(HeadKind)), self.head),
            ("base", (None, *get_args(BaseKind)), self.base),
            ("initialisation", get_args(Initialisation), self.initialisation),
        ):
            if value not in known:
                raise HymaError(f"The hypernetwork's {key} {value!r} is unknown; {_names(str(value), known)}.")
        for key, size in (
            ("condition_width", self.condition_width),
            ("rank", self.rank),
            ("chunk_rows", self.chunk_rows),
            *(("trunk", width) for width in self.trunk),
        ):
            if not isinstance(size, int) or size < 1:
                raise HymaError(f"The hypernetwork's {key} is {size}; write a positive whole number.")
        if not self.trunk:
            raise HymaError("The hypernetwork's trunk has no layer; write [128, 512], for example.")
        if not 0 < self.alpha < float("inf"):
            raise HymaError(f"The hypernetwork's alpha is {self.alpha}; write a positive number.")


def _names(value: str, known: Sequence[str | None]) -> str:
    return near_names(value, [name for name in known if name is not None])


@dataclass(frozen=True)
class Parts:
    """The parts that a configuration comes to, nothing left open."""

    condition: ConditionKind
    head: HeadKind
    base: BaseKind


PRESETS: dict[Preset, Parts] = {
    "default": Parts(condition="factored", head="low_rank", base="factored"),
    "closed-form": Parts(condition="factored", head="low_rank", base="closed_form"),
    "hyma": Parts(condition="pair", head="dense", base="shape"),
    "hyper-align": Parts(condition="features", head="dense", base="shape"),
}


def parts(config: HypernetworkConfig, depth: int) -> Parts:
    """The configuration's parts, the preset's where it names none, for connectors of this depth.

    Raises:
        HymaError: if the parts do not go together.
    """
    preset = PRESETS[config.preset]
    chosen = Parts(config.condition or preset.condition, config.head or preset.head, config.base or preset.base)
    if config.preset == "hyper-align" and depth:
        raise HymaError(
            "The preset hyper-align predicts linear connectors; choose the connector linear, "
            "or another preset with the condition features."
        )
    if config.initialisation == "torch" and chosen.head != "dense":
        raise HymaError(
            f"The initialisation torch needs the dense head and not {chosen.head}; "
            "choose the preset hyma, or the initialisation hyper."
        )
    if config.initialisation == "torch" and chosen.base == "closed_form":
        raise HymaError(
            "The initialisation torch would bury the base closed_form under random deltas; "
            "choose the initialisation hyper, or the base shape."
        )
    return chosen

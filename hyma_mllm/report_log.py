"""The learning curves in a run's `log.jsonl`, one JSON object a line."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyma_mllm.foreign import parse_json

Steps = dict[int, float]


@dataclass
class Curves:
    """One training.

    Attributes:
        method: as in `Ranking`.
        connector: as in `Ranking`.
        seed: as in `Ranking`.
        losses: pair index -> optimiser step -> training loss. A pair has a value only where it was visited.
        scores: task -> optimiser step -> validation score of each pair, percent.
    """

    method: str
    connector: str
    seed: int
    losses: dict[int, Steps] = field(default_factory=dict)
    scores: dict[str, dict[int, list[float]]] = field(default_factory=dict)


@dataclass
class Log:
    """What could be read of a log.

    Attributes:
        curves: one per training, in order of first appearance.
        damaged: numbers of the lines that are not what they should be (a kill may leave half a line), from 1.
    """

    curves: list[Curves] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)


def read_log(path: Path) -> Log:
    """The steps and evaluations of a log; other events are none of the report's business.

    A step that stands twice (a resumed run repeats what came after its checkpoint) counts with its last line.

    Args:
        path: the file; a missing one reads as empty.
    """
    log, found = Log(), dict[tuple[str, str, int], Curves]()
    if not path.exists():
        return log
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                _take(parse_json(line), found)
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
                log.damaged.append(number)
    log.curves = list(found.values())
    return log


def _take(entry: dict[str, Any], found: dict[tuple[str, str, int], Curves]) -> None:
    event = entry.get("event", "step" if "losses" in entry else None)
    if event not in ("step", "evaluation"):
        return
    key = (str(entry["method"]), str(entry["connector"]), int(entry["seed"]))
    step = int(entry["step"])
    float(step)  # one that no axis can show is an OverflowError
    if event == "step":
        losses = {int(pair): float(loss) for pair, loss in entry["losses"].items() if loss is not None}
        curves = found.setdefault(key, Curves(*key))
        for pair, loss in losses.items():
            curves.losses.setdefault(pair, {})[step] = loss
    else:
        scores = {str(task): [float(value) for value in values] for task, values in entry["scores"].items()}
        curves = found.setdefault(key, Curves(*key))
        for task, values in scores.items():
            curves.scores.setdefault(task, {})[step] = values


def smooth(steps: Steps, points: int) -> tuple[list[float], list[float]]:
    """Means over at most this many bins of equal width, non-finite values left out: (middle step, mean) of each bin."""
    finite = sorted((step, value) for step, value in steps.items() if math.isfinite(value))
    if not finite:
        return [], []
    first, last = finite[0][0], finite[-1][0]
    width = max(1.0, (last - first + 1) / points)
    bins: dict[int, list[tuple[int, float]]] = {}
    for step, value in finite:
        bins.setdefault(int((step - first) / width), []).append((step, value))
    middles = [sum(step for step, _ in each) / len(each) for each in bins.values()]
    means = [sum(value for _, value in each) / len(each) for each in bins.values()]
    return middles, means

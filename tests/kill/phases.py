"""Which part of a run is at work, read from what the run directory holds: for whoever kills it, inside and outside."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PHASES = ("embedding", "training", "polish", "evaluation", "export")
TAIL = 1 << 16
"""Bytes at the end of a log that surely hold a whole line."""


@dataclass(frozen=True)
class Steps:
    """Where scores are due in the log.

    Attributes:
        last: method as logged -> number of its last optimiser step.
        evaluate_every: optimiser steps between validation scores; of polishing, none.
    """

    last: Mapping[str, int]
    evaluate_every: int

    def due(self, method: str, step: int) -> bool:
        """Whether pairs are scored after this step."""
        return step == self.last[method] or ("+" not in method and step % self.evaluate_every == 0)


def phase_of(run: Path, steps: Steps) -> str:
    """The part of a run that is at work, or was when it died: one of `PHASES`.

    Evaluation is all that follows a step after which scores are due, until the log says that they are there.
    """
    if (run / "ranking.json").exists():
        return "export"
    log = run / "log.jsonl"
    if not log.exists():
        return "embedding"
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - TAIL))
        lines = [line for line in stream.read().split(b"\n")[:-1] if line]
    if not lines:
        return "embedding"
    entry = json.loads(lines[-1])
    method = str(entry.get("method", ""))
    if entry["event"] == "polished" or (entry["event"] == "step" and steps.due(method, entry["step"])):
        return "evaluation"
    return "polish" if method.endswith("+polish") else "training"

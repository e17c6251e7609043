"""What each ranking cost (`ledger.json`): samples, steps, FLOPs, seconds and bytes, by method and phase.

The schema of the file is documented in docs/schema.md.
"""

import json
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

import psutil
import torch

from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import build
from hyma_mllm.paths import write_text
from hyma_mllm.search.schema_files import describe, read_json

SCHEMA = 1
SAMPLE_SECONDS = 0.02

Phase = Literal["embedding", "training", "evaluation"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass
class Cost:
    """The bill of one phase.

    Attributes:
        samples_per_pair: samples that each pair saw (mean over pairs), repeats counted.
        steps: optimiser steps.
        flops: floating point operations, forward and backward, a multiply-add counted as two.
        seconds: wall-clock time.
        peak_bytes: highest memory in use: resident set of the process on a CPU, allocated by torch on a GPU.
    """

    samples_per_pair: float = 0.0
    steps: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass
class Ledger:
    """The bill of one ranking.

    Attributes:
        method: as in `Ranking`.
        connector: as in `Ranking`.
        seed: as in `Ranking`.
        phases: the cost of "embedding", "training" and "evaluation"; a phase that did not happen is left out.
        batch: samples in a mini-batch; 0 for a method that trains nothing.
        shared_embedding: True when all methods read the same stored features: the embedding is then no part of
            `total`, and a table counts it once for all.
    """

    method: str
    connector: str
    seed: int
    phases: dict[Phase, Cost] = field(default_factory=dict)
    batch: int = 0
    shared_embedding: bool = True

    def total(self) -> Cost:
        """FLOPs and seconds summed over phases, the highest peak, and the samples and steps of the training."""
        paid = [cost for phase, cost in self.phases.items() if phase != "embedding" or not self.shared_embedding]
        training = self.phases.get("training", Cost())
        return Cost(
            samples_per_pair=training.samples_per_pair,
            steps=training.steps,
            flops=sum(cost.flops for cost in paid),
            seconds=sum(cost.seconds for cost in paid),
            peak_bytes=max((cost.peak_bytes for cost in paid), default=0),
        )


def shared_embedding(ledgers: Sequence[Ledger]) -> Cost | None:
    """The embedding that all methods share, counted once; None when no ledger holds it."""
    costs = [
        ledger.phases["embedding"] for ledger in ledgers if ledger.shared_embedding and "embedding" in ledger.phases
    ]
    return max(costs, key=lambda cost: cost.seconds) if costs else None


class Meter:
    """Adds the seconds of a block to a `Cost` and raises its `peak_bytes` to the block's peak.

    On a CPU the peak is the process's resident set, sampled every 20 ms by a thread; on a GPU it is torch's own
    high-water mark, which entering resets, so meters of one GPU must not be nested.

    Args:
        cost: what to add to.
        device: where the block computes.
    """

    def __init__(self, cost: Cost, device: torch.device | str = "cpu") -> None:
        self.cost = cost
        self.device = torch.device(device)

    def __enter__(self) -> Cost:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._process = psutil.Process()
            self._peak = self._process.memory_info().rss
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._sample, name="memory meter", daemon=True)
            self._thread.start()
        self._start = time.perf_counter()
        return self.cost

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._stop.set()
            self._thread.join()
            peak = max(self._peak, self._process.memory_info().rss)
        self.cost.seconds += time.perf_counter() - self._start
        self.cost.peak_bytes = max(self.cost.peak_bytes, peak)

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, self._process.memory_info().rss)


def save_ledgers(path: Path, ledgers: Sequence[Ledger]) -> None:
    """Write `ledger.json` in one atomic step, keys sorted.

    Raises:
        HymaError: when a cost is negative or not finite.
    """
    for ledger in ledgers:
        _check(ledger, path)
    content = {"schema": SCHEMA, "ledgers": [asdict(ledger) for ledger in ledgers]}
    write_text(path, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")


def load_ledgers(path: Path) -> list[Ledger]:
    """Read and check `ledger.json`.

    Raises:
        HymaError: when it is missing, broken, or of another schema.
    """
    content = read_json(path, SCHEMA)
    try:
        ledgers = [
            Ledger(
                method=str(entry["method"]),
                connector=str(entry["connector"]),
                seed=int(entry["seed"]),
                phases={phase: build(Cost, cost) for phase, cost in entry["phases"].items()},
                batch=int(entry["batch"]),
                shared_embedding=bool(entry["shared_embedding"]),
            )
            for entry in content["ledgers"]
        ]
        for ledger in ledgers:
            _check(ledger, path)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise HymaError(f"{path} is not a ledger: {describe(error)}; write it again with a search.") from error
    return ledgers


def _check(ledger: Ledger, path: Path) -> None:
    name = f"{path}, ledger {ledger.method}/{ledger.connector}/seed {ledger.seed}"
    for phase, cost in ledger.phases.items():
        if phase not in PHASES:
            raise HymaError(f"{name} has the unknown phase {phase}; known are {', '.join(PHASES)}.")
        for column, value in asdict(cost).items():
            if not (math.isfinite(value) and value >= 0):
                raise HymaError(f"{name}, {phase}.{column} is {value}, no cost; run the search again.")

"""What one training does, and the legs that it is run in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hyma_mllm.search.guard import GuardConfig
from hyma_mllm.search.ledger import Cost
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.search.placement import ALONE, Placement
from hyma_mllm.search.samplers import BatchSampler, PairSampler
from hyma_mllm.search.stability import StabilityConfig

UNLIMITED = 2**31
"""Steps of a leg that only its seconds end."""

RESOLUTION = 100_000
"""Parts of a schedule that is cut into legs."""


@dataclass(frozen=True)
class Leg:
    """A stretch of a training: the pairs that are trained in it, and the part of the learning-rate schedule.

    Attributes:
        pairs: sampler of the pairs.
        start: optimiser steps taken before it.
        until: optimiser steps taken after it, `UNLIMITED` where seconds end it.
        begin, end: the part of the schedule that it covers, in [0, 1].
        from_second, to_second: of the training's wall-clock time; `to_second` None where steps end it.
        held: whether the connectors of all other pairs of a bank are held still. (A zero gradient does not: weight
            decay and the moments move a stacked weight whose pair is not visited.)
    """

    pairs: PairSampler
    start: int
    until: int
    begin: float = 0.0
    end: float = 1.0
    from_second: float = 0.0
    to_second: float | None = None
    held: bool = False

    @property
    def steps(self) -> int:
        """Optimiser steps of the leg."""
        return self.until - self.start

    def fraction(self, step: int, elapsed: float) -> float:
        """The share of the leg that is done after `step` optimiser steps and `elapsed` seconds of the training."""
        if self.to_second is None:
            return (step - self.start) / self.steps
        # At least one step, however small the budget.
        return (elapsed - self.from_second) / (self.to_second - self.from_second) if step > self.start else 0.0

    def position(self, step: int, elapsed: float) -> tuple[int, int]:
        """Where step number `step` stands in the schedule: (step, of how many)."""
        if (self.start, self.begin, self.end, self.to_second) == (0, 0.0, 1.0, None):
            return step, self.until
        # A step of a known number is taken at its middle: the first one of a warm-up would else go nowhere.
        done = self.fraction(step, elapsed) if self.to_second is not None else (step + 0.5 - self.start) / self.steps
        share = self.begin + (self.end - self.begin) * min(done, 1.0)
        return round(share * RESOLUTION), RESOLUTION


@dataclass
class Plan:
    """What one training does.

    Attributes:
        method, connector, seed: its name in logs and results.
        steps: optimiser steps; of no account where `seconds` ends the training, or where it is run leg by leg.
        pairs: sampler of pairs.
        batches: sampler of rows.
        optimiser: AdamW and its schedule.
        guard: limits of the non-finite guard.
        stability: early stop on a settled order; `times=0` for none.
        evaluate_every: optimiser steps between validation scores; 0 for none.
        checkpoint_every: optimiser steps between checkpoints; 0 for none.
        placement: which process works on which pairs.
        visit_flops: FLOPs of the source of connectors in one visit of some pairs (a hypernetwork's own work).
        seconds: wall-clock time of the training; None for no limit.
        paid: what was spent on the connectors before their first step.
        stage: of a method that trains more than once; empty for the first.
        facts: what else must not change between a checkpoint and its resumption.
    """

    method: str
    connector: str
    seed: int
    steps: int
    pairs: PairSampler
    batches: BatchSampler
    optimiser: OptimiserConfig
    guard: GuardConfig
    stability: StabilityConfig
    evaluate_every: int
    checkpoint_every: int
    placement: Placement = ALONE
    visit_flops: Callable[[Sequence[int]], float] = lambda pairs: 0.0
    seconds: float | None = None
    paid: Cost = field(default_factory=Cost)
    stage: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`method-connector-seed`, and behind it the stage."""
        return f"{self.method}-{self.connector}-{self.seed}" + (f"/{self.stage}" if self.stage else "")

    @property
    def logged(self) -> str:
        """The name of the method in the log."""
        return f"{self.method}+{self.stage}" if self.stage else self.method

    def leg(self) -> Leg:
        """The whole training."""
        if self.seconds is None:
            return Leg(self.pairs, 0, self.steps)
        return Leg(self.pairs, 0, UNLIMITED, to_second=self.seconds)

    def identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its resumption."""
        return {
            "name": self.name,
            "steps": self.steps,
            "batch": self.batches.size,
            "sampler": self.pairs.kind,
            "pairs": list(self.pairs.members),
            "per_visit": self.pairs.per_visit,
            "optimiser": vars(self.optimiser),
            **({"seconds": self.seconds} if self.seconds is not None else {}),
            **self.facts,
        }


@dataclass
class Outcome:
    """What a training came to.

    Attributes:
        step: optimiser steps taken (fewer than planned when the order settled).
        training, validation: their costs.
        skipped: steps the guard skipped.
        visits: forward passes of each pair, [pairs of the grid].
    """

    step: int
    training: Cost
    validation: Cost
    skipped: int = 0
    visits: list[int] = field(default_factory=list)

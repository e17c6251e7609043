"""The non-finite guard: skip a bad step, count it, name its pairs, roll back after several in a row."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hyma_mllm.errors import HymaError
from hyma_mllm.pairs import PairGrid


@dataclass
class GuardConfig:
    """When a non-finite loss or gradient stops being an accident.

    Attributes:
        patience: skipped steps in a row after which the last good state is restored: that of the last checkpoint, or
            of the start (of this process, after a resume) where search.checkpoint_every is 0.
        rollbacks: restorations after which the run stops with an error.
    """

    patience: int = 5
    rollbacks: int = 3


@dataclass
class Guard:
    """Counts of what went wrong, and the last state that was good.

    Attributes:
        config: the limits.
        grid: for the names of the pairs.
        skipped: steps skipped so far.
        in_a_row: of them, the latest unbroken run.
        restored: roll-backs so far.
        per_pair: pair index -> number of non-finite losses.
    """

    config: GuardConfig
    grid: PairGrid
    skipped: int = 0
    in_a_row: int = 0
    restored: int = 0
    per_pair: dict[int, int] = field(default_factory=dict)
    _restore: Callable[[], None] | None = None

    def remember(self, restore: Callable[[], None]) -> None:
        """The present state trained well; `restore` brings it back."""
        self._restore = restore

    def passed(self) -> None:
        """A step went well."""
        self.in_a_row = 0

    def failed(self, pairs: list[int], losses: Tensor) -> str:
        """A step did not: count it, roll back if it is one too many in a row, and say what happened.

        Args:
            pairs: pair indices of the step.
            losses: [pairs], in the same order.

        Returns:
            One sentence for the log.

        Raises:
            HymaError: after `rollbacks` restorations.
        """
        bad = [
            pair for pair, loss in zip(pairs, losses.tolist(), strict=True) if not torch.isfinite(torch.tensor(loss))
        ]
        for pair in bad:
            self.per_pair[pair] = self.per_pair.get(pair, 0) + 1
        names = "; ".join(self.grid.name(pair) for pair in bad) or "no single pair (the gradient overflowed)"
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row < self.config.patience or self._restore is None:
            return f"Skipped a step with a non-finite loss or gradient: {names}."
        if self.restored >= self.config.rollbacks:
            raise HymaError(
                f"The training stays non-finite after {self.restored} roll-backs, last with {names}; "
                "lower search.optimiser.lr or objective.scale, or leave that model out."
            )
        self.restored += 1
        self.in_a_row = 0
        self._restore()
        return f"Rolled back to the last good state after {self.config.patience} non-finite steps: {names}."

    def overflowed(self, before: float, after: float) -> str:
        """Count a step that only the fp16 loss scale spoilt, which is how that scale is found; a sentence for the log.

        Args:
            before: loss scale of the step.
            after: loss scale from now on.
        """
        self.skipped += 1
        return f"Skipped a step whose gradients overflowed at the fp16 loss scale {before:g}; it is now {after:g}."

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "restored": self.restored,
            "per_pair": dict(self.per_pair),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the counts of a checkpoint."""
        self.skipped, self.in_a_row, self.restored = state["skipped"], state["in_a_row"], state["restored"]
        self.per_pair = dict(state["per_pair"])

"""How much a method may spend, and how many optimiser steps that buys.

A budget is of the training. FLOPs and samples are counted before the first step, by the same analytic costs that the
ledger bills, so that the learning rate ends where the budget ends; seconds are measured while the training runs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from hyma_mllm.errors import HymaError
from hyma_mllm.search.samplers import PairSampler


@dataclass
class Budget:
    """The most that the training of one method may spend; at most one of the three is set.

    Attributes:
        flops: floating point operations, closed-form starts included; null for no such limit.
        samples: samples per pair, the mean over the pairs of the grid, repeats counted; null for no such limit.
        seconds: wall-clock time of the training steps; null for no such limit. A run under it cannot be repeated bit
            for bit: how many steps fit depends on the machine.

    Raises:
        HymaError: several are set, or one is not a positive number.
    """

    flops: float | None = None
    samples: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) > 1:
            raise HymaError(f"search.budget sets {' and '.join(given)}; set one of them.")
        for name, value in given.items():
            if not (0 < value < math.inf):
                raise HymaError(f"search.budget.{name} is {value}; write a positive number, or null for no limit.")

    @property
    def given(self) -> bool:
        """Whether there is a limit at all."""
        return not (self.flops is None and self.samples is None and self.seconds is None)

    def __str__(self) -> str:
        """`1e+11 flops`, as a bill says it; `no limit`."""
        given = [f"{value:g} {name}" for name, value in vars(self).items() if value is not None]
        return given[0] if given else "no limit"


def steps_within(limit: float, cost: Callable[[int], float], period: int) -> int:
    """Optimiser steps, from step 0 on, that cost at most `limit` together; 0 where the first costs more.

    Args:
        limit: what may be spent.
        cost: of optimiser step n, above 0.
        period: steps after which the sum of costs repeats; 0 where it never does.
    """
    steps, left = 0, limit
    if period:
        whole = sum(cost(step) for step in range(period))
        rounds = int(left // whole)
        steps, left = rounds * period, left - rounds * whole
    while (left := left - cost(steps)) >= 0:
        steps += 1
    return steps


def period(pairs: PairSampler) -> int:
    """Optimiser steps after which a sampler has visited every pair equally often; 0 for `random`, which never has to.

    A visit costs a constant and something for each pair, so that is when the cost of steps repeats.
    """
    if pairs.kind == "cyclic":
        return len(pairs.members) if pairs.groups is None else pairs.visits_per_round
    return {"fair": 1, "round": pairs.visits_per_round, "random": 0}[pairs.kind]

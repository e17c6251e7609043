"""Which process works on which pairs.

Data-parallel: every process visits all pairs, with its share of the batch. Pair-parallel (the MLLM case, where LLMs are
too large to be everywhere): every process visits only the pairs of its own LLMs, with the whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hyma_mllm.errors import HymaError

Parallel = Literal["data", "pairs"]

IDLE = -1
"""Number of a visit that only keeps step with the other processes."""


@dataclass(frozen=True)
class Placement:
    """The division of labour.

    Attributes:
        processes: how many there are.
        process: this one.
        owners: the process of each group of pairs (each LLM); None for data-parallel work.
    """

    processes: int = 1
    process: int = 0
    owners: tuple[int, ...] | None = None

    def here(self, group: int) -> bool:
        """Whether this process works on a group."""
        return self.owners is None or self.owners[group] == self.process

    def turns(self, visits: Sequence[Sequence[int]], groups: Sequence[int] | None) -> list[tuple[int, float]]:
        """(number of the visit, weight of its loss) of each forward pass of this process in one optimiser step.

        All processes take as many, for they meet after each: one with fewer visits adds idle ones, of number `IDLE` and
        weight 0. The weight makes up for the mean that data-parallel wrappers take of the gradients.
        """
        if self.owners is None:
            return [(number, 1.0) for number in range(len(visits))]
        assert groups is not None
        owner = [self.owners[groups[visit[0]]] for visit in visits]
        mine = [(number, float(self.processes)) for number, process in enumerate(owner) if process == self.process]
        longest = max(owner.count(process) for process in range(self.processes))
        return mine + [(IDLE, 0.0)] * (longest - len(mine))


ALONE = Placement()
"""One process, or data-parallel work."""


def place(parallel: Parallel, costs: Sequence[float], processes: int, process: int) -> Placement:
    """Spread the LLMs over the processes, the dearest first, each to the process with the least work.

    Args:
        parallel: `data` or `pairs`.
        costs: of each LLM, e.g. its parameters.
        processes: how many there are.
        process: this one.

    Raises:
        HymaError: pair-parallel work for more processes than LLMs.
    """
    if parallel == "data" or processes == 1:
        return Placement(processes, process)
    if processes > len(costs):
        raise HymaError(
            f"search.parallel is pairs and there are {processes} processes for {len(costs)} LLMs; start at most "
            f"{len(costs)}, or set search.parallel to data."
        )
    work = [0.0] * processes
    owners = [0] * len(costs)
    for position, llm in enumerate(sorted(range(len(costs)), key=lambda number: -costs[number])):
        # The first ones go round, so that no process stays without any.
        owners[llm] = position if position < processes else work.index(min(work))
        work[owners[llm]] += costs[llm]
    return Placement(processes, process, tuple(owners))

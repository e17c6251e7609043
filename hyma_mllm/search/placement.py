"""Which process works on which pairs, and with which part of a batch.

Data-parallel: every process visits all pairs, with its share of the batch. Pair-parallel (the MLLM case, where LLMs are
too large to be everywhere): every process holds some LLMs and visits only their pairs. Both together: groups of
processes hold the same LLMs, and the processes of a group share every batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hyma_mllm.errors import HymaError

Parallel = Literal["data", "pairs"]

IDLE = -1
"""Number of a visit that only keeps step with the other processes."""


@dataclass(frozen=True)
class Load:
    """What an LLM asks of the processes that hold it.

    Attributes:
        name: of the LLM.
        bytes: memory of its weights.
        flops: of all its pairs in one step with the whole batch.
    """

    name: str
    bytes: float
    flops: float


@dataclass(frozen=True)
class Placement:
    """The division of labour.

    Attributes:
        processes: how many there are.
        process: this one.
        owners: the group of processes that holds each LLM; None for data-parallel work.
        groups: how many groups there are; neighbours are in one group.
    """

    processes: int = 1
    process: int = 0
    owners: tuple[int, ...] | None = None
    groups: int = 1

    @property
    def shares(self) -> int:
        """Processes of a group, which share every batch."""
        return self.processes // self.groups

    @property
    def share(self) -> int:
        """Which share of a batch this process takes."""
        return self.process % self.shares

    @property
    def group(self) -> int:
        """Which group this process is in."""
        return self.process // self.shares

    def here(self, llm: int) -> bool:
        """Whether this process works with an LLM."""
        return self.owners is None or self.owners[llm] == self.group

    def turns(self, visits: Sequence[Sequence[int]], groups: Sequence[int] | None) -> list[tuple[int, float]]:
        """(number of the visit, weight of its loss) of each forward pass of this process in one optimiser step.

        All processes take as many, for they meet after each: one with fewer visits adds idle ones, of number `IDLE` and
        weight 0. The weight makes up for the mean that is taken of all processes' gradients.
        """
        if self.owners is None:
            return [(number, 1.0) for number in range(len(visits))]
        assert groups is not None
        owner = [self.owners[groups[visit[0]]] for visit in visits]
        mine = [(number, float(self.groups)) for number, group in enumerate(owner) if group == self.group]
        longest = max(owner.count(group) for group in range(self.groups))
        return mine + [(IDLE, 0.0)] * (longest - len(mine))


ALONE = Placement()
"""One process, or data-parallel work."""


def place(parallel: Parallel, loads: Sequence[Load], processes: int, process: int, groups: int = 0) -> Placement:
    """Spread the LLMs over groups of processes.

    The LLM that is dearest in memory or FLOPs comes first; each goes where the larger of the group's shares of all
    memory and of all FLOPs stays smallest.

    Args:
        parallel: `data` or `pairs`.
        loads: of each LLM.
        processes: how many there are.
        process: this one.
        groups: of processes; 0 for as many as the LLMs can fill and the processes divide into evenly.

    Raises:
        HymaError: pair-parallel work that the LLMs and processes do not divide into.
    """
    if parallel == "data" or processes == 1:
        return Placement(processes, process)
    most = min(processes, len(loads))
    found = groups or max(number for number in range(1, most + 1) if processes % number == 0)
    if groups > most or processes % found:
        raise HymaError(
            f"search.groups is {groups}, and {processes} processes with {len(loads)} LLMs have no {groups} equal "
            "groups with an LLM each; set search.groups to 0, or start another number of processes."
        )
    if found == 1:
        raise HymaError(
            f"search.parallel is pairs, and {processes} processes with {len(loads)} LLMs have no equal groups with an "
            f"LLM each; start a number of processes that 2 to {max(len(loads), 2)} divides, or set search.parallel to "
            "data."
        )
    parts = _parts(loads)
    owners = [0] * len(loads)
    filled = [(0.0, 0.0)] * found
    for position, llm in enumerate(sorted(range(len(loads)), key=lambda number: -max(parts[number]))):
        # The first ones go round, so that no group stays without any.
        best = position if position < found else min(range(found), key=lambda g: _joined(filled[g], parts[llm])[::-1])
        owners[llm] = best
        filled[best] = (filled[best][0] + parts[llm][0], filled[best][1] + parts[llm][1])
    return Placement(processes, process, tuple(owners), found)


def _parts(loads: Sequence[Load]) -> list[tuple[float, float]]:
    """Each LLM's share of all memory and of all FLOPs."""
    memory, flops = sum(load.bytes for load in loads), sum(load.flops for load in loads)
    return [(load.bytes / memory, load.flops / flops) for load in loads]


def _joined(filled: tuple[float, float], more: tuple[float, float]) -> tuple[float, float]:
    """(smaller, larger) share of a group with one more LLM."""
    memory, flops = filled[0] + more[0], filled[1] + more[1]
    return min(memory, flops), max(memory, flops)


def plan_lines(placement: Placement, loads: Sequence[Load]) -> list[str]:
    """The plan in words, one line a group of processes."""
    if placement.owners is None:
        total = sum(load.bytes for load in loads)
        return [f"data-parallel: each of {placement.processes} processes holds all LLMs, {total / 1e9:.1f} GB, and "
                f"takes 1/{placement.processes} of every batch"]  # fmt: skip
    whole = sum(load.flops for load in loads)
    lines = []
    for group in range(placement.groups):
        first = group * placement.shares
        who = f"process {first}" if placement.shares == 1 else f"processes {first} to {first + placement.shares - 1}"
        own = [load for load, owner in zip(loads, placement.owners, strict=True) if owner == group]
        shared = "" if placement.shares == 1 else f", each with 1/{placement.shares} of every batch"
        memory, work = sum(load.bytes for load in own) / 1e9, 100 * sum(load.flops for load in own) / whole
        lines.append(
            f"pair-parallel: {who}: {', '.join(load.name for load in own)}; {memory:.1f} GB a process, {work:.0f} % of "
            f"the LLMs' FLOPs{shared}"
        )
    return lines


def held_bytes(placement: Placement, loads: Sequence[Load], local: int) -> float:
    """Memory of the LLMs on one machine, at most.

    Args:
        placement: the plan.
        loads: of each LLM.
        local: processes of a machine.
    """
    if placement.owners is None:
        return local * sum(load.bytes for load in loads)
    owners = placement.owners
    of_group = [sum(load.bytes for load, owner in zip(loads, owners, strict=True) if owner == group)
                for group in range(placement.groups)]  # fmt: skip
    of_process = [of_group[process // placement.shares] for process in range(placement.processes)]
    return max(sum(of_process[first : first + local]) for first in range(0, placement.processes, local))

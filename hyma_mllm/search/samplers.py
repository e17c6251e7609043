"""Which pictures and which pairs a step sees: pure functions of (seed, step), so that resuming needs no state.

Dual mini-batching (HYMA, arXiv 2507.10015, section 3): a visit takes B_d pictures and B_m of the N x M pairs. Strict
fairness (FairNAS, arXiv 1907.01845, section 3): an optimiser step averages the same number of visits to every pair.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hyma_mllm.errors import HymaError

PairSampling = Literal["fair", "round", "random", "cyclic"]

ROUND = 4
"""Optimiser steps of a round, where the pairs of a visit are not given."""


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator whose stream is fixed by these numbers and unlike that of any other numbers."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = ((state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state & 0x7FFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class PairSampler:
    """The visits of each optimiser step.

    Attributes:
        members: indices of the pairs that are trained.
        per_visit: pairs that share one forward pass (B_m); 0 means a quarter of them for `round`, else all that may.
        kind: `fair` visits every pair once per optimiser step, in a fresh order; `round` takes an optimiser step after
            each visit, and every pair is visited once in a round of them, in a fresh order; `random` draws one visit
            for each step; `cyclic` walks through a fixed order, one visit a step (the authors' way).
        seed: of the order.
        groups: a number for each pair of the grid; pairs of different numbers never share a visit (the MLLM case: one
            forward pass of one LLM). None: all may.
    """

    members: tuple[int, ...]
    per_visit: int
    kind: PairSampling
    seed: int
    groups: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.per_visit <= len(self.members):
            raise HymaError(
                f"search.pairs_per_visit is {self.per_visit} but the grid has {len(self.members)} pairs; "
                f"set it between 1 and {len(self.members)}, or to 0 for all."
            )

    @property
    def size(self) -> int:
        """Pairs in a full visit."""
        largest = max(Counter(map(self._group, self.members)).values())
        if self.per_visit:
            return min(self.per_visit, largest)
        return -(-largest // ROUND) if self.kind == "round" and self.groups is None else largest

    @property
    def visits_per_round(self) -> int:
        """Forward passes that visit every pair once."""
        return sum(-(-count // self.size) for count in Counter(map(self._group, self.members)).values())

    @property
    def visits_per_step(self) -> int:
        """Forward passes that make one optimiser step."""
        return self.visits_per_round if self.kind == "fair" else 1

    def visits(self, step: int) -> list[list[int]]:
        """Pair indices of each visit of optimiser step `step`."""
        total = len(self.members)
        if self.kind == "cyclic":
            if self.groups is None:
                return [[self.members[(step * self.size + offset) % total] for offset in range(self.size)]]
            chunks = self._chunks(self.members)
            return [chunks[step % len(chunks)]]
        drawn = step // self.visits_per_round if self.kind == "round" else step
        order = torch.randperm(total, generator=generator(self.seed, 1, drawn)).tolist()
        chunks = self._chunks([self.members[position] for position in order])
        if self.kind == "fair":
            return chunks
        return [chunks[step % len(chunks)] if self.kind == "round" else chunks[0]]

    def _group(self, pair: int) -> int:
        return 0 if self.groups is None else self.groups[pair]

    def _chunks(self, order: Sequence[int]) -> list[list[int]]:
        """The pairs of a round in this order, cut into visits; groups in order of first appearance."""
        grouped: dict[int, list[int]] = {}
        for pair in order:
            grouped.setdefault(self._group(pair), []).append(pair)
        return [pairs[at : at + self.size] for pairs in grouped.values() for at in range(0, len(pairs), self.size)]


@dataclass(frozen=True)
class BatchSampler:
    """Shuffled epochs of `rows`, in batches of `size`.

    Each epoch is a fresh permutation; its remainder of fewer than `size` rows is left for the next shuffle, so every
    batch is whole and every row is equally likely.

    Attributes:
        rows: row numbers to draw from, [rows] int64.
        size: rows per batch (B_d), over all processes.
        seed: of the order.
    """

    rows: Tensor
    size: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= len(self.rows):
            raise HymaError(
                f"search.batch is {self.size} but the training split has {len(self.rows)} rows; "
                f"set it to at most {len(self.rows)}."
            )

    def batch(self, number: int) -> Tensor:
        """Rows of batch `number`, [size] int64."""
        per_epoch = len(self.rows) // self.size
        epoch, position = divmod(number, per_epoch)
        order = torch.randperm(len(self.rows), generator=generator(self.seed, 2, epoch))
        return self.rows[order[position * self.size : (position + 1) * self.size]]

"""Encoded conversations as padded tensors: on the right to train, on the left to generate."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""The label of a token that is not learned, as in torch's cross-entropy."""


@dataclass(frozen=True)
class Encoded:
    """A conversation behind the picture.

    Attributes:
        after: ids from the picture on, the picture not included.
        labels: as long as `after`: the answers' and end tokens' ids where they stand, else IGNORE.
        cut: how many tokens truncation took.
    """

    after: tuple[int, ...]
    labels: tuple[int, ...]
    cut: int

    @property
    def passed(self) -> int:
        """Tokens in front of the last label; what follows predicts nothing, and training leaves it out."""
        return max(position for position, label in enumerate(self.labels) if label != IGNORE)


@dataclass
class TextBatch:
    """Conversations behind their pictures, padded on the right.

    Attributes:
        after: [batch, length] int64.
        mask: [batch, length] bool, False on padding.
        labels: [batch, length] int64, IGNORE wherever nothing is learned.
    """

    after: Tensor
    mask: Tensor
    labels: Tensor


def collate(rows: Sequence[Encoded], pad: int) -> TextBatch:
    """A training batch.

    Args:
        rows: at least one.
        pad: id of the padding token; only the mask tells it from others.
    """
    length = max(len(row.after) for row in rows)
    after = torch.full((len(rows), length), pad, dtype=torch.int64)
    labels = torch.full_like(after, IGNORE)
    mask = torch.zeros_like(after, dtype=torch.bool)
    for number, row in enumerate(rows):
        size = len(row.after)
        after[number, :size] = torch.tensor(row.after)
        labels[number, :size] = torch.tensor(row.labels)
        mask[number, :size] = True
    return TextBatch(after, mask, labels)


def collate_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts for generation, padded on the left.

    Args:
        rows: at least one, each of at least one id.
        pad: id of the padding token.

    Returns:
        ids [batch, length] int64, and mask [batch, length] bool, False on padding.
    """
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = torch.tensor(row)
        mask[number, length - len(row) :] = True
    return ids, mask


PASS_TOKENS = 64
"""What a pass through an LLM costs before its first token: reading the weights once takes as long as so many tokens."""


def by_length(lengths: Sequence[int], pass_tokens: int = PASS_TOKENS) -> list[list[int]]:
    """Positions of rows, cut into batches of like length so that padding and passes together cost least.

    Exact, by dynamic programming over the rows in order of length: a batch costs its rows times its longest, and
    `pass_tokens`.

    Args:
        lengths: tokens of each row, at least one row.
        pass_tokens: cost of a batch, in tokens.

    Returns:
        Every position once; shorter rows first, equal ones in their own order.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    least, starts = [0], [0]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        costs = [least[start] + longest * (end - start) + pass_tokens for start in range(end)]
        start = min(range(end), key=costs.__getitem__)
        least.append(costs[start])
        starts.append(start)
    parts, end = [], len(order)
    while end:
        parts.append(order[starts[end] : end])
        end = starts[end]
    return parts[::-1]

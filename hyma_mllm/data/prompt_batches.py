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

"""Connectors of a bank that a leg of a training must leave as they are."""

from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor, nn

from hyma_mllm.search.bank import ConnectorBank


class HeldConnectors:
    """A copy of the connectors of all pairs but some, to be put back after every optimiser step.

    Args:
        bank: whose connectors.
        moving: indices of the pairs that are trained.
    """

    def __init__(self, bank: ConnectorBank, moving: Collection[int]) -> None:
        self.kept: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for shape, stacked in zip(bank.shapes, bank.banks, strict=True):
            members = [pair for pair in range(len(bank.grid)) if bank.grid.shape(pair) == shape and pair not in moving]
            if members:
                rows = torch.tensor([bank.row_of[pair] for pair in members])
                for value in cast(nn.ParameterDict, stacked).values():
                    self.kept.append((value, rows.to(value.device), value.detach()[rows.to(value.device)].clone()))

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo whatever an optimiser step did to them."""
        for value, rows, kept in self.kept:
            value[rows] = kept

"""Independent connectors of many pairs, trained side by side: what a grid search trains."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorGroup, ConnectorSpec
from hyma_mllm.pairs import PairGrid


class ConnectorBank(nn.Module):
    """One free connector per pair, stacked by shape so that a step has no Python loop over pairs.

    It answers like a hypernetwork (`forward(pairs) -> list[ConnectorGroup]`), which is why one loop trains both.
    Under AdamW, which works entry by entry, a stacked step on the *sum* of the pairs' losses is each pair's own step.

    Args:
        grid: the pairs.
        spec: the family of connectors.
        seed: of fresh connectors.
        initial: per pair in grid order, the plain state dict that its connector starts from; None for a fresh one,
            which does not depend on what the other pairs start from.

    Raises:
        ValueError: if `initial` has not one entry per pair, or one of another family or shape.
    """

    def __init__(
        self,
        grid: PairGrid,
        spec: ConnectorSpec,
        seed: int,
        initial: Sequence[Mapping[str, Tensor] | None] | None = None,
    ) -> None:
        super().__init__()
        initial = [None] * len(grid) if initial is None else initial
        if len(initial) != len(grid):
            raise ValueError(f"a bank of {len(grid)} connectors starts from as many, not from {len(initial)}")
        self.grid = grid
        self.row_of = [0] * len(grid)
        self.shapes = list(grid.by_shape(range(len(grid))))
        banks: list[nn.ParameterDict] = []
        generator = torch.Generator().manual_seed(seed)
        for shape, members in grid.by_shape(range(len(grid))).items():
            params = connectors.initial(spec, shape, len(members), generator)
            for row, index in enumerate(members):
                state = initial[index]
                if state is not None:
                    connectors.check_state(spec, shape, state)
                    for name, value in state.items():
                        params[name][row] = value.detach()
            # A dot would read as a submodule in a parameter's name.
            bank = {name.replace(".", "_"): nn.Parameter(value) for name, value in params.items()}
            banks.append(nn.ParameterDict(bank))
            for row, index in enumerate(members):
                self.row_of[index] = row
        self.banks = nn.ModuleList(banks)

    def forward(self, pairs: Tensor | Sequence[int]) -> list[ConnectorGroup]:
        """The connectors of these pairs, grouped by shape."""
        wanted = [int(index) for index in pairs]
        groups = []
        for shape, positions in self.grid.by_shape(wanted).items():
            bank = cast(nn.ParameterDict, self.banks[self.shapes.index(shape)])
            rows = [self.row_of[wanted[position]] for position in positions]
            params = {}
            for name, value in bank.items():
                whole = rows == list(range(value.shape[0]))
                params[name.replace("_", ".")] = value if whole else value[torch.tensor(rows, device=value.device)]
            groups.append(
                ConnectorGroup(torch.tensor(positions), torch.tensor([wanted[p] for p in positions]), shape, params)
            )
        return groups

    def clip_each(self, limit: float) -> Tensor:
        """Clip the gradient norm of every pair on its own, as if it trained alone; returns the largest norm."""
        largest = torch.zeros(())
        for bank in self.banks:
            gradients = [value.grad for value in bank.parameters() if value.grad is not None]
            if not gradients:
                continue
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
            factor = (limit / (norms + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))
            largest = torch.maximum(largest.to(norms.device), norms.max())
        return largest

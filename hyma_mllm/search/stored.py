"""Connectors that a finished training left in the run directory, as a source like the one that made them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorGroup
from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import reason
from hyma_mllm.pairs import PairGrid


class StoredConnectors:
    """Every pair's connector of one training.

    Args:
        run: the run directory.
        unit: `method-connector-seed`.
        grid: the pairs of the run.

    Raises:
        HymaError: the run keeps no connectors of this training.
    """

    def __init__(self, run: Path, unit: str, grid: PairGrid) -> None:
        path = run / "connectors" / f"{unit}.safetensors"
        if not path.exists():
            raise HymaError(f"{path} is missing; run the search again to make the connectors of {unit}.")
        self.grid = grid
        self._states: dict[int, dict[str, torch.Tensor]] = {}
        try:
            for name, value in load_file(path).items():
                index, layer = name.split(".", 1)
                self._states.setdefault(int(index), {})[layer] = value
        except (OSError, ValueError, SafetensorError) as error:
            raise HymaError(f"{path} is damaged ({reason(error)}); run the search again to make it.") from error

    def state(self, index: int) -> dict[str, torch.Tensor]:
        """The plain state dict of one pair."""
        return self._states[index]

    def __call__(self, pairs: Sequence[int]) -> list[ConnectorGroup]:
        """The connectors of these pairs, grouped by shape."""
        return [
            ConnectorGroup(
                torch.tensor(positions),
                torch.tensor([pairs[position] for position in positions]),
                shape,
                connectors.stack([self._states[pairs[position]] for position in positions]),
            )
            for shape, positions in self.grid.by_shape(pairs).items()
        ]

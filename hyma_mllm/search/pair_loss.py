"""What a search asks of its task, whatever the case: batches, a loss per pair, scores per pair, and their FLOPs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hyma_mllm.connectors import ConnectorGroup, ConnectorSpec
from hyma_mllm.pairs import PairGrid


class ConnectorSource(Protocol):
    """What makes connectors: a hypernetwork or a bank of independent ones."""

    def __call__(self, pairs: Sequence[int]) -> list[ConnectorGroup]:
        """The connectors of these pairs, grouped by shape."""


@dataclass
class Scored:
    """Scores of every pair, and what they took.

    Attributes:
        scores: task -> score of each pair in grid order, percent; the first task is the one that ranks.
        details: further measures of each pair in grid order.
        flops: analytic floating point operations.
    """

    scores: dict[str, list[float]]
    details: dict[str, list[float]]
    flops: float


class SearchTask(Protocol):
    """Frozen models over some data: everything that a search reads, and nothing that it trains.

    Attributes:
        grid: the pairs.
        train: [rows] int64, the rows that a training may draw.
    """

    @property
    def grid(self) -> PairGrid:
        """The pairs."""

    @property
    def train(self) -> Tensor:
        """[rows] int64, the rows that a training may draw."""

    def visit_groups(self) -> Sequence[int] | None:
        """A number for each pair of the grid: pairs of different numbers never share a visit; None if all may."""

    def batch(self, rows: Tensor, seed: int, number: int) -> Any:
        """These rows [batch] as a batch; whatever is drawn is drawn by (seed, number)."""

    def share(self, batch: Any, part: slice) -> Any:
        """The samples of a batch that one process works on."""

    def losses(self, groups: list[ConnectorGroup], spec: ConnectorSpec, objective: nn.Module, batch: Any) -> Tensor:
        """Loss of each pair, [pairs] in the order the pairs were asked for, float32."""

    def validate(self, source: ConnectorSource, spec: ConnectorSpec) -> Scored:
        """Scores on the validation split; cheap enough to be taken while a training runs."""

    def evaluate(self, source: ConnectorSource, spec: ConnectorSpec) -> Scored:
        """Scores on everything held out; `details` holds `validation <first task>`, by which a pair is handed over."""

    def visit_flops(self, spec: ConnectorSpec, pairs: Sequence[int], batch: int) -> float:
        """Analytic forward and backward FLOPs of the task loss of one visit, without the hypernetwork."""


class PairLoss(nn.Module):
    """A source of connectors with the objective: the one module that Accelerate prepares.

    Its output is a plain tensor [pairs], which is all that data-parallel wrappers understand.
    """

    def __init__(self, network: nn.Module, objective: nn.Module, task: SearchTask, spec: ConnectorSpec) -> None:
        super().__init__()
        self.network = network
        self.objective = objective
        self.task = task
        self.spec = spec

    def forward(self, pairs: list[int], batch: Any) -> Tensor:
        """Loss per pair [pairs], float32."""
        device_type = next(self.parameters()).device.type
        with torch.autocast(device_type, enabled=False):
            groups = self.network(pairs)
        return self.task.losses(groups, self.spec, self.objective, batch)

"""Who holds the weights, gradients and optimiser state of one training, and how processes join their gradients.

Three engines behind one door: `Replicated` (one process, or one whole copy in each, by Accelerate), `Sharded`
(DeepSpeed ZeRO or FSDP2, for a hypernetwork; in `sharded`), and `Averaged` (whole copies in processes that a sharding
launcher started: independent connectors, which are clipped pair by pair, are not sharded).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.pair_loss import PairLoss

SHARDING = (DistributedType.DEEPSPEED, DistributedType.FSDP)
"""What Accelerate calls the launchers that shard."""

REPLICA = "replica.pt"
"""File of a checkpoint of `Averaged`."""


class Engine(ABC):
    """What the training loop asks of whoever holds the weights.

    Attributes:
        kind: names the layout of its checkpoints; empty for one whole copy, written by Accelerate.
        keeps_step: whether all processes must make as many visits in a step, idle ones included.
        source: the plain network, for scoring; as trained so far after `refresh`.
        optimiser: has the `param_groups` whose rates are set before a step.
        accelerator: device, processes, precision.
    """

    kind: str = ""
    keeps_step: bool = False
    source: nn.Module
    optimiser: torch.optim.Optimizer
    accelerator: Accelerator

    def enter(self, turns: int) -> None:  # noqa: B027
        """From now on a step has so many visits."""

    def begin(self, visits: Sequence[Sequence[int]]) -> None:  # noqa: B027
        """Begin an optimiser step in which all processes together visit these pairs."""

    @abstractmethod
    def visit(self, pairs: list[int], batch: Any, weight: float) -> Tensor:
        """Forward and backward of one visit; the loss per pair [pairs], with the gradient of their sum times `weight`.

        Gradients are averaged over the processes.
        """

    @abstractmethod
    def clip(self, limit: float) -> Tensor:
        """Complete the step's gradient, and clip it; its norm before, [] on CPU, not finite if it is of no use."""

    @abstractmethod
    def step(self) -> None:
        """Take the optimiser step."""

    @abstractmethod
    def discard(self) -> None:
        """Leave the step out."""

    def refresh(self) -> None:  # noqa: B027
        """Bring `source` up to date."""

    @abstractmethod
    def snapshot(self) -> Callable[[], None] | None:
        """What brings back the present state; None where only a checkpoint does."""

    def save(self, directory: Path) -> None:
        """Write the state, every process its part."""
        self.accelerator.save_state(str(directory))

    def load(self, directory: Path) -> None:
        """Read it back."""
        self.accelerator.load_state(str(directory))


class Replicated(Engine):
    """One process, or a whole copy in each of several: what Accelerate prepares.

    Args:
        model: connectors with their objective.
        optimiser: builds one over parameters.
        accelerator: device, processes, precision.
    """

    keeps_step = True

    def __init__(
        self,
        model: PairLoss,
        optimiser: Callable[[Any], torch.optim.Optimizer],
        accelerator: Accelerator,
    ) -> None:
        self.accelerator = accelerator
        self.model, self.optimiser = accelerator.prepare(model, optimiser(model.parameters()))
        self.source: nn.Module = accelerator.unwrap_model(self.model).network

    def enter(self, turns: int) -> None:
        """Accelerate joins gradients at the last visit only."""
        # The counter of micro-steps is global to the accelerator; each training starts its own.
        self.turns = turns
        self.accelerator.gradient_accumulation_steps = turns
        self.accelerator.step = 0

    def visit(self, pairs: list[int], batch: Any, weight: float) -> Tensor:
        """By Accelerate, under its precision."""
        with self.accelerator.accumulate(self.model):
            losses: Tensor = self.model(pairs, batch)
            # `backward` divides by the number of turns, which `weight` already holds. It runs for a non-finite loss
            # too: a data-parallel wrapper that waits for a backward refuses the next forward.
            self.accelerator.backward(losses.sum() * (weight * self.turns))
        return losses

    def clip(self, limit: float) -> Tensor:
        """A bank's pairs are clipped each on its own."""
        if isinstance(self.source, ConnectorBank):
            self.accelerator.unscale_gradients()
            return self.source.clip_each(limit).cpu()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        return torch.as_tensor(norm).detach().cpu()

    def step(self) -> None:
        """Step, and clear the gradient."""
        self.optimiser.step()
        self.optimiser.zero_grad()

    def discard(self) -> None:
        """Clear the gradient, and begin to count visits anew."""
        # Not `optimiser.zero_grad`, which Accelerate ignores in the midst of an accumulation.
        self.model.zero_grad()
        self.accelerator.step = 0

    def snapshot(self) -> Callable[[], None]:
        """A copy."""
        return copy_of(self.accelerator.unwrap_model(self.model), self.optimiser)


class Averaged(Engine):
    """Independent connectors in processes that a sharding launcher started: whole copies, gradients averaged here.

    Args:
        model: a bank of connectors with its objective.
        bank: the bank.
        optimiser: builds one over parameters.
        accelerator: device and processes.
    """

    kind = "whole copies beside a sharding launcher"

    def __init__(
        self,
        model: PairLoss,
        bank: ConnectorBank,
        optimiser: Callable[[Any], torch.optim.Optimizer],
        accelerator: Accelerator,
    ) -> None:
        self.accelerator = accelerator
        self.model = model.to(accelerator.device)
        self.source = self.bank = bank
        self.optimiser = optimiser(model.parameters())

    def visit(self, pairs: list[int], batch: Any, weight: float) -> Tensor:
        """Without the other processes."""
        losses: Tensor = self.model(pairs, batch)
        torch.autograd.backward(losses.sum() * weight)
        return losses

    def clip(self, limit: float) -> Tensor:
        """Average the gradients of all processes, and clip each pair's."""
        parameters = list(self.model.parameters())
        used = torch.tensor([float(value.grad is not None) for value in parameters], device=self.accelerator.device)
        everywhere = self.accelerator.reduce(used, reduction="sum").tolist()
        for value, users in zip(parameters, everywhere, strict=True):
            if users:  # a weight that no process used keeps no gradient, as in one process
                own = torch.zeros_like(value) if value.grad is None else value.grad
                value.grad = self.accelerator.reduce(own, reduction="mean")
        return self.bank.clip_each(limit).cpu()

    def step(self) -> None:
        """Step, and clear the gradient."""
        self.optimiser.step()
        self.discard()

    def discard(self) -> None:
        """Clear the gradient."""
        self.model.zero_grad()

    def snapshot(self) -> Callable[[], None]:
        """A copy."""
        return copy_of(self.model, self.optimiser)

    def save(self, directory: Path) -> None:
        """One file: all processes hold the same."""
        if self.accelerator.is_main_process:
            state = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
            torch.save(state, directory / REPLICA)

    def load(self, directory: Path) -> None:
        """From that file."""
        state = torch.load(directory / REPLICA, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])


def copy_of(model: nn.Module, optimiser: torch.optim.Optimizer) -> Callable[[], None]:
    """Keep a copy of a model and its optimiser; what brings it back, as often as it is called."""
    kept_model, kept_optimiser = deepcopy(model.state_dict()), deepcopy(optimiser.state_dict())

    def restore() -> None:
        model.load_state_dict(kept_model)
        # load_state_dict keeps the tensors it is given; a second restoration must not find them trained further.
        optimiser.load_state_dict(deepcopy(kept_optimiser))

    return restore

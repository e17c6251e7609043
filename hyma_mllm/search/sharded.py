"""A hypernetwork whose weights, gradients or optimiser state lie in parts on many processes: DeepSpeed ZeRO, FSDP2.

These engines want one forward, one backward and one update a step, the same on every process; a step of ours has many
visits, which differ between processes. So the engine is called once: it predicts the connectors of all pairs of the
step, the visits gather the loss's gradient with respect to those, and one backward takes it on into the hypernetwork.
The result is the same. The price is memory: the step's connectors and their gradients lie there together, also where a
process visits some of its pairs only. (ZeRO-2 adds gradients up in the order in which they come, so that processes with
other graphs would add up those of different weights, without a word.)

`source` is a whole copy, which scoring reads: its owners would otherwise have to meet at every pair.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hyma_mllm.connectors import ConnectorGroup
from hyma_mllm.errors import HymaError
from hyma_mllm.hypernetwork.network import Hypernetwork
from hyma_mllm.search.engine import Engine
from hyma_mllm.search.pair_loss import PairLoss


class Predicted(nn.Module):
    """A hypernetwork that answers in a flat tuple of tensors, which is all that sharding wrappers understand."""

    def __init__(self, network: Hypernetwork) -> None:
        super().__init__()
        self.network = network
        self.names: list[list[str]] = []

    def forward(self, pairs: list[int], anchor: Tensor) -> tuple[Tensor, ...]:
        """The connectors' weights, group by group in the order of `names`, and a zero [].

        The zero hangs on every weight of the hypernetwork, so that all have a gradient on every process.

        Args:
            pairs: indices in the grid.
            anchor: any [] of which a gradient is asked. What is done to it first is undone last, and ZeRO-3 takes the
                gradient of its input for the sign that it can let go of the weights.
        """
        held = anchor * 0.0
        groups: list[ConnectorGroup] = self.network(pairs)
        self.names = [list(group.params) for group in groups]
        zero = torch.stack([value.sum() for value in self.parameters()]).sum() * 0.0 + held
        return *(value for group in groups for value in group.params.values()), zero


class Sharded(Engine):
    """Trains a hypernetwork that DeepSpeed or FSDP2 holds in parts.

    Args:
        model: the hypernetwork with its objective.
        network: the hypernetwork, which becomes the whole copy.
        optimiser: builds one over parameters.
        clip: largest gradient norm.
        accelerator: of a sharding launcher.

    Raises:
        HymaError: the objective learns something too.
    """

    values: tuple[Tensor, ...]
    gradients: list[Tensor]
    place: dict[int, tuple[int, int, list[str]]]

    def __init__(
        self,
        model: PairLoss,
        network: Hypernetwork,
        optimiser: Callable[[Any], torch.optim.Optimizer],
        clip: float,
        accelerator: Accelerator,
    ) -> None:
        if any(True for _ in model.objective.parameters()):
            raise HymaError(
                "objective.learn_scale trains a scale beside the hypernetwork, which DeepSpeed and FSDP do not hold "
                "here; set it to false, or launch with accelerate_configs/multi_gpu.yaml."
            )
        self.loss, self.accelerator = model, accelerator
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.source: nn.Module = network.to(accelerator.device)
        owned = Predicted(deepcopy(network))
        self.inner = owned
        accelerator.gradient_accumulation_steps = 1
        if self.deepspeed:
            stage = _configure(accelerator, owned, clip)
            self.kind = f"DeepSpeed ZeRO-{stage} on {accelerator.num_processes} processes"
        else:
            self.kind = f"FSDP2 on {accelerator.num_processes} processes"
        self.module, self.optimiser = accelerator.prepare(owned, optimiser(owned.parameters()))
        if not self.deepspeed:
            _start_counting(self.optimiser)
        self._forget()

    def begin(self, visits: Sequence[Sequence[int]]) -> None:
        """Call the engine once, for all of them."""
        pairs = sorted({pair for visit in visits for pair in visit})
        self.values = self.module(pairs, torch.zeros((), device=self.accelerator.device, requires_grad=True))
        self.gradients = [torch.zeros_like(value) for value in self.values[:-1]]
        grid, first = cast(Hypernetwork, self.source).grid, 0
        groups = grid.by_shape(pairs)
        for members, names in zip(groups.values(), self.inner.names, strict=True):
            for row, position in enumerate(members):
                self.place[pairs[position]] = (first, row, names)
            first += len(names)

    def visit(self, pairs: list[int], batch: Any, weight: float) -> Tensor:
        """The engine's weights wait meanwhile: the gradient goes as far as the connectors."""
        groups, leaves = self._connectors(pairs)
        losses = self.loss.task.losses(groups, self.loss.spec, self.loss.objective, batch)
        torch.autograd.backward(losses.sum() * weight)
        for number, rows, leaf in leaves:
            if leaf.grad is not None:
                self.gradients[number].index_add_(0, rows, leaf.grad)
        return losses

    def _connectors(self, pairs: list[int]) -> tuple[list[ConnectorGroup], list[tuple[int, Tensor, Tensor]]]:
        """Connectors as the hypernetwork hands them over, and (number of the output, its rows, leaf) of each weight."""
        grid = cast(Hypernetwork, self.source).grid
        groups, leaves = [], []
        for shape, positions in grid.by_shape(pairs).items():
            members = [pairs[position] for position in positions]
            first, _, names = self.place[members[0]]
            rows = torch.tensor([self.place[pair][1] for pair in members], device=self.values[0].device)
            params = {}
            for number, name in enumerate(names, start=first):
                params[name] = self.values[number].detach()[rows].requires_grad_()
                leaves.append((number, rows, params[name]))
            groups.append(ConnectorGroup(torch.tensor(positions), torch.tensor(members), shape, params))
        return groups, leaves

    def clip(self, limit: float) -> Tensor:
        """DeepSpeed clips by its own configuration, and takes its step here too."""
        finite = torch.stack([torch.isfinite(gradient).all() for gradient in self.gradients]).all().float()
        if float(self.accelerator.reduce(finite, reduction="mean")) < 1.0:
            return torch.tensor(torch.inf)
        carried = [(value * gradient).sum() for value, gradient in zip(self.values, self.gradients, strict=False)]
        carrier = torch.stack(carried).sum() + self.values[-1]
        self._forget()
        if self.deepspeed:
            self.module.backward(carrier)
            self.module.step()
            return torch.as_tensor(self.module.get_global_grad_norm()).detach().float().cpu()
        with self.accelerator.accumulate(self.module):
            torch.autograd.backward(carrier)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), limit)
        return _whole(norm, self.accelerator.device).detach().float().cpu()

    def step(self) -> None:
        """DeepSpeed took it."""
        if not self.deepspeed:
            self.optimiser.step()
            self.optimiser.zero_grad()

    def discard(self) -> None:
        """Nothing has reached the engine's gradient yet."""
        self._forget()
        if not self.deepspeed:  # which clears the gradient of a step that it leaves out
            self.module.zero_grad()

    def _forget(self) -> None:
        self.values, self.gradients, self.place = (), [], {}

    @torch.no_grad()
    def refresh(self) -> None:
        """Gather every weight; all processes do it together."""
        whole = dict(self.source.named_parameters())
        for name, part in self.inner.network.named_parameters():
            with _gathered(part):
                whole[name].copy_(_whole(part, self.accelerator.device))

    def snapshot(self) -> None:
        """A copy of the parts would not be worth its memory: the newest checkpoint has them."""
        return None


def _configure(accelerator: Accelerator, owned: Predicted, clip: float) -> int:
    """Tell DeepSpeed what it cannot know; its ZeRO stage."""
    plugin = accelerator.state.deepspeed_plugin
    # It counts micro-batches of a data loader, and there is none.
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
    }
    if plugin.zero_stage == 3:
        from deepspeed.utils import set_z3_leaf_modules

        # All weights are fetched together: a step need not use all, and which it uses differs between steps.
        set_z3_leaf_modules(owned, [Predicted])
    return int(plugin.zero_stage)


def _start_counting(optimiser: torch.optim.Optimizer) -> None:
    """Give AdamW its state, at zero steps.

    To have something to write into a checkpoint before the first step, torch would take an empty step, and AdamW would
    count it: its first steps would then be a quarter too small.
    """
    for group in optimiser.param_groups:
        for weight in group["params"]:
            moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            optimiser.state[weight] = {"step": torch.zeros((), device=weight.device)} | moments


def _gathered(part: nn.Parameter) -> AbstractContextManager[Any]:
    """Where a weight that ZeRO-3 holds in parts is whole."""
    if not hasattr(part, "ds_id"):
        return nullcontext()
    from deepspeed import zero

    return cast(AbstractContextManager[Any], zero.GatheredParameters([part]))


def _whole(value: Tensor, device: torch.device) -> Tensor:
    """A tensor that FSDP2 holds in parts, on the device; any other one as it is."""
    if not isinstance(value, DTensor):
        return value
    return cast(DTensor, value.to(device)).full_tensor()

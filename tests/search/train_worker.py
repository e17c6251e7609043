"""Trains the synthetic task of image and text encoders; started by launch_worker.py."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from conftest import make_task
from safetensors.torch import save_file
from torch import Tensor, nn

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.hypernetwork.network import Hypernetwork
from hyma_mllm.hypernetwork.presets import HypernetworkConfig
from hyma_mllm.objectives.contrastive import ContrastiveConfig, ContrastiveObjective
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.guard import GuardConfig
from hyma_mllm.search.interrupt import SearchInterruptedError, StopRequest
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.search.pair_loss import PairLoss
from hyma_mllm.search.plan import Outcome, Plan
from hyma_mllm.search.samplers import BatchSampler, PairSampler
from hyma_mllm.search.stability import StabilityConfig
from hyma_mllm.search.trainer import Trainer

SPEC = ConnectorSpec.named("mlp1", hidden=16)


class NaNOnce(ContrastiveObjective):
    """An objective whose loss is NaN in one visit."""

    calls = 0

    def forward(self, images: Tensor, texts: Tensor, groups: Tensor | None = None) -> Tensor:
        loss = super().forward(images, texts, groups)
        if torch.is_grad_enabled():
            self.calls += 1
        return loss * torch.nan if self.calls == 6 else loss


class StopAfter(StopRequest):
    """A signal comes after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left < 0


def train(kind: str, accelerator: Accelerator, folder: Path) -> None:
    """Train; where several processes do, they are stopped on the way and go on from their checkpoint."""
    run = RunDirectory(folder / kind, {}, accelerator.is_main_process)
    if accelerator.num_processes > 1 and kind != "nan":
        try:
            fit(kind, accelerator, run, StopAfter(4))
        except SearchInterruptedError:
            accelerator.free_memory()
        else:
            raise AssertionError("the signal was not seen")
    outcome, model = fit(kind, accelerator, run, StopRequest())
    if accelerator.is_main_process:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / f"{kind}.st")
        done = {"world": accelerator.num_processes, "skipped": outcome.skipped, "steps": outcome.step}
        done |= {"engine": accelerator.distributed_type.value, "flops": outcome.training.flops}
        (folder / f"{kind}.json").write_text(json.dumps(done))
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def fit(kind: str, accelerator: Accelerator, run: RunDirectory, stop: StopRequest) -> tuple[Outcome, nn.Module]:
    """Run the plan of a kind, from its newest checkpoint if there is one."""
    task = make_task()
    members = tuple(range(len(task.grid)))
    network: nn.Module
    if kind == "bank":  # a rival that trains some shapes only: parameters without a gradient
        network, members, per_visit = ConnectorBank(task.grid, SPEC, 0), members[:2], 1
    else:
        network, per_visit = Hypernetwork(task.grid, SPEC, HypernetworkConfig(), seed=0), 4
    objective = (NaNOnce if kind == "nan" else ContrastiveObjective)(ContrastiveConfig(scale=20.0, tile=8))
    plan = Plan(
        method=kind,
        connector="mlp1",
        seed=0,
        steps=8,
        pairs=PairSampler(members, per_visit, "fair", 0),
        batches=BatchSampler(task.train, 16, 0),
        optimiser=OptimiserConfig(lr=1e-3),
        guard=GuardConfig(),
        stability=StabilityConfig(),
        evaluate_every=4,
        checkpoint_every=3,
    )
    trainer = Trainer(plan, PairLoss(network, objective, task, SPEC), task, accelerator, run, stop)
    return trainer.fit(), network

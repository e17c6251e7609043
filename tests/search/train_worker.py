"""Trains the synthetic task in however many processes the launcher started; run by test_distributed.py."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from conftest import make_task
from safetensors.torch import save_file

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.hypernetwork.network import Hypernetwork
from hyma_mllm.hypernetwork.presets import HypernetworkConfig
from hyma_mllm.objectives.contrastive import ContrastiveConfig, ContrastiveObjective
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.guard import GuardConfig
from hyma_mllm.search.interrupt import StopRequest
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.search.pair_loss import PairLoss
from hyma_mllm.search.plan import Plan
from hyma_mllm.search.samplers import BatchSampler, PairSampler
from hyma_mllm.search.stability import StabilityConfig
from hyma_mllm.search.trainer import Trainer

SPEC = ConnectorSpec.named("mlp1", hidden=16)


class NaNOnce(Hypernetwork):
    """A hypernetwork whose loss is NaN in one visit."""

    calls = 0

    def forward(self, pairs: list[int]) -> list:  # type: ignore[type-arg]
        groups = super().forward(pairs)
        if self.training and torch.is_grad_enabled():
            if self.calls == 5:  # the last visit of the third step, in which processes synchronise
                groups[0].params["0.bias"] = groups[0].params["0.bias"] * torch.nan
            self.calls += 1
        return groups


def train(kind: str, accelerator: Accelerator, folder: Path) -> None:
    task = make_task()
    everything = tuple(range(len(task.grid)))
    members, per_visit = everything, 0
    network: torch.nn.Module
    if kind == "bank":  # a rival that trains some shapes only: parameters without a gradient
        network, members, per_visit = ConnectorBank(task.grid, SPEC, 0), everything[:2], 1
    else:
        maker = NaNOnce if kind == "nan" else Hypernetwork
        network, per_visit = maker(task.grid, SPEC, HypernetworkConfig(), seed=0), 4
    model = PairLoss(network, ContrastiveObjective(ContrastiveConfig(scale=20.0, tile=8)), task, SPEC)
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
    run = RunDirectory(folder / kind, {}, accelerator.is_main_process)
    outcome = Trainer(plan, model, task, accelerator, run, StopRequest()).fit()
    accelerator.free_memory()
    if accelerator.is_main_process:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / f"{kind}.st")
        done = {"world": accelerator.num_processes, "skipped": outcome.skipped, "steps": outcome.step}
        (folder / f"{kind}.json").write_text(json.dumps(done))
    accelerator.wait_for_everyone()


def main() -> None:
    torch.set_num_threads(1)
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=os.environ.get("WORLD_SIZE", "1") == "1", kwargs_handlers=[unused])
    for kind in ("hyma", "bank", "nan"):
        train(kind, accelerator, Path(sys.argv[1]))
    # Shutting gloo down aborts now and then; everything is on disk.
    os._exit(0)


if __name__ == "__main__":
    main()

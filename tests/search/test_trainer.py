import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from hyma_mllm.connectors import ConnectorGroup, ConnectorSpec
from hyma_mllm.errors import HymaError
from hyma_mllm.hypernetwork.network import Hypernetwork
from hyma_mllm.hypernetwork.presets import HypernetworkConfig
from hyma_mllm.objectives.contrastive import ContrastiveConfig, ContrastiveObjective
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.guard import GuardConfig
from hyma_mllm.search.interrupt import SearchInterruptedError, StopRequest
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.search.pair_loss import PairLoss
from hyma_mllm.search.plan import Plan
from hyma_mllm.search.samplers import BatchSampler, PairSampler
from hyma_mllm.search.stability import StabilityConfig
from hyma_mllm.search.task import Batch, VLMTask
from hyma_mllm.search.trainer import Trainer, check_processes

SPEC = ConnectorSpec.named("mlp1", hidden=16)


def plan_for(task: VLMTask, **changes: object) -> Plan:
    values: dict[str, object] = {
        "method": "hyma",
        "connector": "mlp1",
        "seed": 0,
        "steps": 12,
        "pairs": PairSampler(tuple(range(len(task.grid))), 4, "fair", 0),
        "batches": BatchSampler(task.train, 16, 0),
        "optimiser": OptimiserConfig(lr=1e-2),
        "guard": GuardConfig(),
        "stability": StabilityConfig(),
        "evaluate_every": 5,
        "checkpoint_every": 5,
    }
    return Plan(**(values | changes))  # type: ignore[arg-type]


def model_for(task: VLMTask, network: torch.nn.Module | None = None) -> PairLoss:
    network = network or Hypernetwork(task.grid, SPEC, HypernetworkConfig(), seed=0)
    return PairLoss(network, ContrastiveObjective(ContrastiveConfig(scale=20.0)), task, SPEC)


def weights(model: PairLoss) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class StopAt(StopRequest):
    """A signal that comes after some steps."""

    def __init__(self, checks: int) -> None:
        super().__init__()
        self.left = checks

    def __bool__(self) -> bool:
        self.left -= 1
        self.signal = "SIGTERM"
        return self.left < 0


@pytest.mark.parametrize("network", ["hypernetwork", "bank"])
def test_resume_is_the_uninterrupted_run_bit_for_bit(
    task: VLMTask, tmp_path: Path, network: str, accelerator: Accelerator
) -> None:
    def fresh() -> PairLoss:
        return model_for(task, ConnectorBank(task.grid, SPEC, 0) if network == "bank" else None)

    whole = fresh()
    straight = Trainer(plan_for(task), whole, task, accelerator, RunDirectory(tmp_path / "a", {}), StopRequest()).fit()
    accelerator.free_memory()

    run = RunDirectory(tmp_path / "b", {})
    for stop in (StopAt(3), StopAt(4)):
        with pytest.raises(SearchInterruptedError, match="run the same command again"):
            Trainer(plan_for(task), fresh(), task, accelerator, run, stop).fit()
        accelerator.free_memory()
    resumed = fresh()
    outcome = Trainer(plan_for(task), resumed, task, accelerator, run, StopRequest()).fit()
    accelerator.free_memory()
    assert (outcome.step, outcome.visits) == (straight.step, straight.visits)
    assert outcome.training.flops == straight.training.flops
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_a_fair_step_equals_one_visit_of_all_pairs(task: VLMTask, accelerator: Accelerator) -> None:
    """Accumulated gradients over visits on one batch are the gradient of the mean over all pairs."""
    trainer_plan = plan_for(task, steps=1)
    model = model_for(task)
    rows = task.train[:16]
    batch = task.batch(rows, 0, 0)
    everything = list(range(len(task.grid)))
    model(everything, batch).mean().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for pairs in trainer_plan.pairs.visits(0):
        (model(pairs, batch).sum() / len(everything)).backward()
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-6, rtol=1e-4)


def test_losses_are_those_of_each_pair_alone(task: VLMTask) -> None:
    model = model_for(task)
    batch = task.batch(task.train[:16], 0, 0)
    together = model([4, 0, 3, 2], batch)
    alone = torch.stack([model([pair], batch)[0] for pair in (4, 0, 3, 2)])
    torch.testing.assert_close(together, alone)


def test_training_learns_and_logs_per_pair(task: VLMTask, run: RunDirectory, accelerator: Accelerator) -> None:
    model = model_for(task)
    before = task.scores(model.network, SPEC, task.validation)["retrieval"]
    outcome = Trainer(plan_for(task, steps=60), model, task, accelerator, run, StopRequest()).fit()
    after = task.scores(model.network, SPEC, task.validation)["retrieval"]
    assert all(b > a for a, b in zip(before, after, strict=True))
    steps = [line for line in map(json.loads, (run.path / "log.jsonl").open()) if line["event"] == "step"]
    assert len(steps) == outcome.step == 60
    assert set(steps[0]["losses"]) == {str(pair) for pair in range(len(task.grid))}
    assert outcome.visits == [60] * len(task.grid)
    assert outcome.training.samples_per_pair == 60 * 16


class Poisoned(torch.nn.Module):
    """A bank whose pair 2 answers NaN in some steps."""

    def __init__(self, bank: ConnectorBank, bad: set[int]) -> None:
        super().__init__()
        self.bank, self.bad, self.calls = bank, bad, 0

    def forward(self, pairs: list[int]) -> list[ConnectorGroup]:
        groups = self.bank(pairs)
        if self.training and self.calls in self.bad:
            for group in groups:
                hit = group.pairs == 2
                if bool(hit.any()):
                    group.params["0.bias"] = torch.where(hit[:, None], torch.nan, group.params["0.bias"])
        self.calls += 1
        return groups


def test_the_guard_skips_the_step_and_names_the_pair(
    task: VLMTask, run: RunDirectory, accelerator: Accelerator
) -> None:
    network = Poisoned(ConnectorBank(task.grid, SPEC, 0), {1, 3})
    everything = PairSampler(tuple(range(len(task.grid))), 0, "fair", 0)
    plan = plan_for(task, steps=6, pairs=everything, evaluate_every=0, checkpoint_every=0)
    model = model_for(task, network)
    outcome = Trainer(plan, model, task, accelerator, run, StopRequest()).fit()
    assert outcome.skipped == 2
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    reasons = [
        line["reason"] for line in map(json.loads, (run.path / "log.jsonl").open()) if line["event"] == "skipped"
    ]
    assert len(reasons) == 2 and all(task.grid.name(2) in reason for reason in reasons)


def test_endless_nan_stops_with_the_pairs_name(task: VLMTask, run: RunDirectory, accelerator: Accelerator) -> None:
    network = Poisoned(ConnectorBank(task.grid, SPEC, 0), set(range(1000)))
    everything = PairSampler(tuple(range(len(task.grid))), 0, "fair", 0)
    plan = plan_for(task, steps=100, pairs=everything, guard=GuardConfig(2, 2), evaluate_every=0)
    with pytest.raises(HymaError, match=rf"non-finite after 2 roll-backs, last with {task.grid.name(2)}"):
        Trainer(plan, model_for(task, network), task, accelerator, run, StopRequest()).fit()


def test_early_stop_on_a_settled_order(task: VLMTask, run: RunDirectory, accelerator: Accelerator) -> None:
    plan = plan_for(task, steps=50, stability=StabilityConfig(threshold=-1.0, times=2))
    outcome = Trainer(plan, model_for(task), task, accelerator, run, StopRequest()).fit()
    assert outcome.step == 15  # the first evaluation has nothing to compare with


def test_a_checkpoint_of_another_plan_is_refused(task: VLMTask, run: RunDirectory, accelerator: Accelerator) -> None:
    with pytest.raises(SearchInterruptedError):
        Trainer(plan_for(task), model_for(task), task, accelerator, run, StopAt(2)).fit()
    accelerator.free_memory()
    other = plan_for(task, steps=13)
    with pytest.raises(HymaError, match="another configuration \\(steps differ\\)"):
        Trainer(other, model_for(task), task, accelerator, run, StopRequest()).fit()


def test_a_caption_belongs_to_its_picture(task: VLMTask) -> None:
    batch: Batch = task.batch(task.train, 1, 7)
    assert bool((batch.captions >= task.first_caption[batch.pictures]).all())
    assert bool((batch.captions < task.first_caption[batch.pictures + 1]).all())


def test_the_world_size_must_be_the_one_asked_for(accelerator: Accelerator) -> None:
    check_processes(accelerator, 0, 7)
    with pytest.raises(HymaError, match="processes is 2 but the launcher started 1"):
        check_processes(accelerator, 2, 8)

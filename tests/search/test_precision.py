from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from hyma_mllm.connectors import ConnectorGroup, ConnectorSpec
from hyma_mllm.errors import HymaError
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
from hyma_mllm.search.task import VLMTask
from hyma_mllm.search.trainer import Trainer

SPEC = ConnectorSpec.named("mlp1", hidden=16)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps the precision in a state that all accelerators share."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trainer(
    task: VLMTask, folder: Path, accelerator: Accelerator, network: torch.nn.Module, steps: int = 20, **changes: object
) -> tuple[Trainer, PairLoss]:
    model = PairLoss(network, ContrastiveObjective(ContrastiveConfig(scale=20.0)), task, SPEC)
    values: dict[str, object] = {
        "method": "m",
        "connector": "mlp1",
        "seed": 0,
        "steps": steps,
        "pairs": PairSampler(tuple(range(len(task.grid))), 2, "fair", 0),
        "batches": BatchSampler(task.train, 16, 0),
        "optimiser": OptimiserConfig(lr=1e-3),
        "guard": GuardConfig(patience=2, rollbacks=1),
        "stability": StabilityConfig(),
        "evaluate_every": 0,
        "checkpoint_every": 0,
    }
    plan = Plan(**(values | changes))  # type: ignore[arg-type]
    return Trainer(plan, model, task, accelerator, RunDirectory(folder, {}), StopRequest()), model


def network_of(kind: str, task: VLMTask) -> torch.nn.Module:
    return ConnectorBank(task.grid, SPEC, 0) if kind == "bank" else Hypernetwork(task.grid, SPEC, HypernetworkConfig())


def losses_of(trainer: Trainer, steps: int) -> torch.Tensor:
    """[steps, pairs] losses of training that many steps."""
    rows = []
    for step in range(steps):
        found = trainer._step(step)
        assert found is not None
        rows.append([found[pair] for pair in sorted(found)])
    return torch.tensor(rows)


@pytest.mark.parametrize("kind", ["bank", "hypernetwork"])
def test_bf16_trains_to_nearly_the_losses_of_fp32(task: VLMTask, tmp_path: Path, kind: str) -> None:
    exact, _ = trainer(task, tmp_path / "fp32", Accelerator(cpu=True), network_of(kind, task))
    wanted = losses_of(exact, 12)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    mixed, model = trainer(task, tmp_path / "bf16", accelerator, network_of(kind, task))
    found = losses_of(mixed, 12)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.02)
    assert not torch.equal(found, wanted)  # the products really ran in bf16
    assert found[-5:].mean() < found[:5].mean()


def fp16(scale: float) -> Accelerator:
    """fp16 with its gradient scaler, which Accelerate itself gives to GPUs only."""
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    return accelerator


@pytest.mark.parametrize("kind", ["bank", "hypernetwork"])
def test_an_overflow_of_the_fp16_scale_lowers_it_and_goes_on(task: VLMTask, tmp_path: Path, kind: str) -> None:
    """More overflows than the guard's patience: finding the scale is no divergence."""
    accelerator = fp16(2.0**24)
    training, model = trainer(task, tmp_path, accelerator, network_of(kind, task))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    skipped = 0
    while training._step(0) is None:
        skipped += 1
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert accelerator.scaler.get_scale() == 2.0 ** (24 - skipped)
    assert training.guard.skipped == skipped > 2
    assert training.guard.in_a_row == training.guard.restored == 0
    losses = [sum(found.values()) for step in range(12) if (found := training._step(step)) is not None]
    assert len(losses) > 8 and sum(losses[-4:]) < sum(losses[:4])


def test_a_banks_pairs_are_clipped_by_their_unscaled_gradients(task: VLMTask, tmp_path: Path) -> None:
    """A limit that no gradient reaches must not bite on gradients that are 1,024 times as large."""
    optimiser = OptimiserConfig(lr=1e-3, clip=100.0)
    training, _ = trainer(task, tmp_path, fp16(1024.0), network_of("bank", task), optimiser=optimiser)
    visits = training.plan.pairs.visits(0)
    for number, pairs in enumerate(visits):
        training._visit(pairs, number, sum(map(len, visits)))
    norm = training.engine.clip(optimiser.clip)
    assert 0 < float(norm) < 100
    training.optimiser.step()
    assert not training.optimiser.step_was_skipped


class NaNInVisit(torch.nn.Module):
    """A bank that answers NaN in one visit."""

    def __init__(self, bank: ConnectorBank, bad: int) -> None:
        super().__init__()
        self.bank, self.bad, self.calls = bank, bad, 0

    def forward(self, pairs: list[int]) -> list[ConnectorGroup]:
        groups = self.bank(pairs)
        if self.calls == self.bad:
            groups[0].params["0.bias"] = groups[0].params["0.bias"] * torch.nan
        self.calls += 1
        return groups


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_nothing_of_a_skipped_step_is_left(task: VLMTask, tmp_path: Path, bad: int) -> None:
    """Neither gradients of the visits before the bad one, nor a count of micro-steps."""
    accelerator = Accelerator(cpu=True)
    training, model = trainer(task, tmp_path, accelerator, NaNInVisit(ConnectorBank(task.grid, SPEC, 0), bad))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert training.plan.pairs.visits_per_step == 3
    assert training._step(0) is None
    assert accelerator.step == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert training._step(1) is not None


def test_a_checkpoint_holds_its_own_training_only(task: VLMTask, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    for number in range(2):
        changes = {"checkpoint_every": 1, "seed": number}
        training, _ = trainer(task, tmp_path / "run", accelerator, network_of("bank", task), 2, **changes)
        training.run.close()
        training.fit()
        accelerator.free_memory()
        folder = tmp_path / "run" / "checkpoints" / f"m-mlp1-{number}" / "step-00000001"
        names = {path.name for path in folder.iterdir()}
        assert names == {"model.safetensors", "optimizer.bin", "random_states_0.pkl", "progress.json"}


def test_a_damaged_checkpoint_is_named(task: VLMTask, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    training, _ = trainer(task, tmp_path, accelerator, network_of("bank", task), 2, checkpoint_every=1)
    training.fit()
    training.run.close()
    folder = tmp_path / "checkpoints" / "m-mlp1-0" / "step-00000001"
    for name in ("model.safetensors", "optimizer.bin", "progress.json"):
        whole = (folder / name).read_bytes()
        half = len(whole) // 2
        flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
        for damaged in (whole[:half], flipped) if name != "progress.json" else (whole[:half],):
            (folder / name).write_bytes(damaged)
            accelerator.free_memory()
            again, _ = trainer(task, tmp_path, accelerator, network_of("bank", task), 2, checkpoint_every=1)
            again.run.close()
            with pytest.raises(HymaError, match=r"step-00000001 is damaged; remove that directory"):
                again.fit()
        (folder / name).write_bytes(whole)

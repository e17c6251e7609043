import pytest
import torch
from torch import nn

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.task import VLMTask


@pytest.mark.parametrize("name", ["linear", "mlp1", "mlp2"])
def test_a_stacked_step_is_each_pairs_own_step(task: VLMTask, name: str) -> None:
    """Training all pairs in one bank equals training each with nn.Sequential and its own AdamW."""
    spec = ConnectorSpec.named(name, hidden=8)
    bank = ConnectorBank(task.grid, spec, 0).double()
    everything = range(len(task.grid))
    alone = {}
    for group in bank(everything):
        for row, index in enumerate(group.pairs.tolist()):
            module = connectors.module(spec, group.shape).double()
            module.load_state_dict(connectors.select({k: v.detach() for k, v in group.params.items()}, row))
            alone[index] = (module, torch.optim.AdamW(module.parameters(), lr=1e-2))
    together = torch.optim.AdamW(bank.parameters(), lr=1e-2)
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        x = {w: torch.randn(5, w, generator=g, dtype=torch.float64) for w in (12, 20)}
        total = torch.zeros((), dtype=torch.float64)
        for group in bank(everything):
            mapped = connectors.apply(spec, group.params, x[group.shape[0]].expand(len(group.pairs), -1, -1))
            total = total + mapped.square().mean((1, 2)).sum()
        together.zero_grad()
        total.backward()
        largest = bank.clip_each(0.01)
        together.step()
        norms = []
        for index, (module, optimiser) in alone.items():
            optimiser.zero_grad()
            module(x[task.grid.shape(index)[0]]).square().mean().backward()
            norms.append(nn.utils.clip_grad_norm_(module.parameters(), 0.01))
            optimiser.step()
        torch.testing.assert_close(largest, torch.stack(norms).max())
    for group in bank(everything):
        for row, index in enumerate(group.pairs.tolist()):
            for key, value in alone[index][0].state_dict().items():
                torch.testing.assert_close(group.params[key][row], value)


def test_any_subset_in_any_order_is_the_same_connectors(task: VLMTask) -> None:
    bank = ConnectorBank(task.grid, ConnectorSpec.named("mlp1", hidden=8), 0)
    single = {k: bank([k])[0].params for k in range(len(task.grid))}
    for group in bank([4, 0, 3, 1]):
        for row, index in enumerate(group.pairs.tolist()):
            assert [4, 0, 3, 1][int(group.positions[row])] == index
            for key, value in group.params.items():
                assert torch.equal(value[row], single[index][key][0])


@pytest.mark.parametrize("name", ["linear", "mlp1"])
def test_pairs_start_from_what_they_are_given_and_the_others_fresh(task: VLMTask, name: str) -> None:
    spec = ConnectorSpec.named(name, hidden=8)
    fresh = ConnectorBank(task.grid, spec, 0)
    others = ConnectorBank(task.grid, spec, 1)
    given = {k: connectors.select(others([k])[0].params, 0) for k in (4, 1)}
    bank = ConnectorBank(task.grid, spec, 0, [given.get(k) for k in range(len(task.grid))])
    for k in range(len(task.grid)):
        wanted = given.get(k, connectors.select(fresh([k])[0].params, 0))
        torch.testing.assert_close(connectors.select(bank([k])[0].params, 0), wanted, atol=0, rtol=0)
    assert all(parameter.requires_grad for parameter in bank.parameters())


def test_starts_that_do_not_fit(task: VLMTask) -> None:
    spec = ConnectorSpec.named("linear")
    with pytest.raises(ValueError, match="a bank of 6 connectors starts from as many, not from 1"):
        ConnectorBank(task.grid, spec, 0, [None])
    other = connectors.module(spec, (20, 17)).state_dict()
    with pytest.raises(ValueError, match="a linear connector from 20 to 16"):
        ConnectorBank(task.grid, spec, 0, [other, *[None] * 5])

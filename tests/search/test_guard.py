import pytest
import torch
from torch import nn

from hyma_mllm.errors import HymaError
from hyma_mllm.pairs import PairGrid
from hyma_mllm.search.engine import copy_of
from hyma_mllm.search.guard import Guard, GuardConfig

GRID = PairGrid(("v0", "v1"), (4, 4), ("t0",), (4,))


def test_skips_counts_names_and_rolls_back() -> None:
    model = nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    guard = Guard(GuardConfig(patience=2, rollbacks=1), GRID)
    guard.remember(copy_of(model, optimiser))
    good = {name: value.clone() for name, value in model.state_dict().items()}
    nan = torch.tensor([1.0, float("nan")])

    for _ in range(2):  # a second roll-back must find the state as it was remembered
        with torch.no_grad():
            model.weight.fill_(float("nan"))
        sentence = guard.failed([0, 1], nan)
        assert "v1,t0" in sentence and "v0,t0" not in sentence and sentence.startswith("Skipped")
        if guard.restored:
            with pytest.raises(HymaError, match="non-finite after 1 roll-backs, last with v1,t0"):
                guard.failed([0, 1], nan)
            break
        assert guard.failed([0, 1], nan).startswith("Rolled back")
        for name, value in model.state_dict().items():
            assert torch.equal(value, good[name])
    assert guard.per_pair[1] == guard.skipped and 0 not in guard.per_pair


def test_a_good_step_breaks_the_row() -> None:
    model = nn.Linear(2, 2)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(GuardConfig(patience=2), GRID)
    guard.remember(copy_of(model, optimiser))
    bad = torch.tensor([float("inf")])
    for _ in range(5):
        assert guard.failed([0], bad).startswith("Skipped")
        guard.passed()
    assert (guard.skipped, guard.restored) == (5, 0)

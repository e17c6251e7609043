"""Bridges against sklearn, and the whitened form that they amount to."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge, RidgeCV
from torch import Tensor

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.errors import HymaError
from hyma_mllm.search.task import VLMTask
from hyma_mllm.search.unseen import Bridge, before, behind, fit_bridge, subtask


def rows_of(seed: int, rows: int, new: int, donor: int, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, new, generator=g, dtype=torch.float64) + 2
    y = x @ torch.randn(new, donor, generator=g, dtype=torch.float64)
    return x, y + noise * torch.randn(rows, donor, generator=g, dtype=torch.float64) - 1


@pytest.mark.parametrize(("rows", "new", "donor"), [(50, 6, 9), (12, 20, 4), (21, 20, 4)])
@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_a_bridge_is_sklearns_ridge(rows: int, new: int, donor: int, strength: float) -> None:
    x, y = rows_of(0, rows, new, donor)
    found = fit_bridge(x, y, [strength])
    centred = (x - x.mean(0)).numpy()
    lam = strength * (centred**2).sum() / rows / new
    wanted = Ridge(alpha=lam * rows).fit(x.numpy(), y.numpy())
    ours = (x - found.new_mean) @ found.weight.T + found.donor_mean
    np.testing.assert_allclose(found.weight.numpy(), wanted.coef_, atol=1e-8)
    np.testing.assert_allclose(ours.numpy(), wanted.predict(x.numpy()), atol=1e-8)


@pytest.mark.parametrize(("rows", "new"), [(60, 6), (14, 20)])
def test_the_strength_is_that_of_the_least_generalised_error(rows: int, new: int) -> None:
    x, y = rows_of(1, rows, new, 5, noise=3.0)
    strengths = [0.01, 0.1, 1.0, 10.0]
    errors = []
    for strength in strengths:
        z = np.hstack([np.ones((rows, 1)), (x - x.mean(0)).numpy()])
        lift = strength * (z[:, 1:] ** 2).sum() / new * np.eye(new + 1)
        lift[0, 0] = 0
        hat = z @ np.linalg.solve(z.T @ z + lift, z.T)
        residual = y.numpy() - hat @ y.numpy()
        errors.append((residual**2).sum() / (1 - np.trace(hat) / rows) ** 2)
    assert fit_bridge(x, y, strengths).strength == strengths[int(np.argmin(errors))]
    assert len({round(error, 6) for error in errors}) == 4


def test_many_rows_choose_as_leave_one_out_does() -> None:
    x, y = rows_of(2, 200, 8, 3, noise=2.0)
    strengths = [0.001, 0.1, 10.0]
    unit = float((x - x.mean(0)).square().sum() / 8)
    chosen = RidgeCV(alphas=[s * unit for s in strengths]).fit(x.numpy(), y.numpy()).alpha_ / unit
    assert fit_bridge(x, y, strengths).strength == pytest.approx(chosen)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_before_maps_as_the_donors_connector_maps_the_bridged_features(depth: int) -> None:
    spec, (x, y) = ConnectorSpec(depth, 7), rows_of(3, 40, 6, 5)
    bridge = fit_bridge(x, y)
    state = connectors.select(connectors.initial(spec, (5, 8), 1, torch.Generator().manual_seed(0)), 0)
    own, lent = connectors.module(spec, (6, 8)), connectors.module(spec, (5, 8))
    own.load_state_dict(before(state, bridge))
    lent.load_state_dict(state)
    crossed = ((x - bridge.new_mean) @ bridge.weight.T + bridge.donor_mean).float()
    torch.testing.assert_close(own(x.float()), lent(crossed), atol=1e-4, rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(depth=st.integers(0, 2), new=st.integers(2, 9), seed=st.integers(0, 99))
def test_behind_scores_pictures_as_the_donor_scores_the_bridged(depth: int, new: int, seed: int) -> None:
    """Up to one positive factor, and a constant per text."""
    spec, (x, y) = ConnectorSpec(depth, 7), rows_of(seed, 40, new, 5)
    bridge = fit_bridge(x, y)
    g = torch.Generator().manual_seed(seed)
    state = connectors.select(connectors.initial(spec, (4, 5), 1, g), 0)
    own, lent = connectors.module(spec, (4, new)), connectors.module(spec, (4, 5))
    own.load_state_dict(behind(state, bridge))
    lent.load_state_dict(state)
    texts = torch.randn(6, 4, generator=g)
    crossed = (x - bridge.new_mean) @ bridge.weight.T + bridge.donor_mean
    ours, theirs = (own(texts).double() @ x.T).detach(), (lent(texts).double() @ crossed.T).detach()
    ours, theirs = ours - ours.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True)
    torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm(), atol=1e-4, rtol=1e-3)
    assert float((ours * theirs).sum()) > 0


def test_a_twin_is_bridged_to_itself() -> None:
    """With hardly any regularisation the bridge between two rotations of the same features is the rotation."""
    x, _ = rows_of(4, 60, 6, 5)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    bridge = fit_bridge(x, x @ turn.T, [1e-9, 1.0])
    assert bridge.strength == 1e-9
    torch.testing.assert_close(bridge.weight, turn, atol=1e-6, rtol=1e-6)


def test_bad_rows() -> None:
    x, y = rows_of(5, 10, 4, 3)
    with pytest.raises(HymaError, match="needs at least 3 rows that both models have seen, not 2"):
        fit_bridge(x[:2], y[:2])
    with pytest.raises(HymaError, match="not all finite"):
        fit_bridge(x.clone().fill_(float("nan")), y)
    with pytest.raises(HymaError, match="gives every row the same feature"):
        fit_bridge(torch.ones(10, 4), y)
    with pytest.raises(ValueError, match="as many rows of the donor as 10, not 9"):
        fit_bridge(x, y[:9])
    with pytest.raises(ValueError, match="a bridge takes a strength"):
        fit_bridge(x, y, [])


def test_a_part_of_a_task_scores_its_pairs_as_the_whole_does(task: VLMTask) -> None:
    from hyma_mllm.search.bank import ConnectorBank

    spec, vision, text = ConnectorSpec(0), [1], [2, 0]
    whole = ConnectorBank(task.grid, spec, 0)
    part = subtask(task, vision, text)
    indices = [v * len(task.grid.text_ids) + t for v in vision for t in text]
    states = [connectors.select(whole([index])[0].params, 0) for index in indices]
    own = ConnectorBank(part.grid, spec, 0, states)
    everything = task.evaluate(whole, spec).scores
    for name, scores in part.evaluate(own, spec).scores.items():
        assert scores == pytest.approx([everything[name][index] for index in indices])


def test_the_bridge_says_what_it_cost() -> None:
    x, y = rows_of(6, 30, 5, 4)
    found = fit_bridge(x, y)
    assert isinstance(found, Bridge)
    # Gram matrix and its eigenvectors, projection and cross-covariance, weight
    assert found.flops == 2 * 25 * 30 + 9 * 125 + 2 * 30 * 5 * (5 + 4) + 2 * 5 * 5 * 4

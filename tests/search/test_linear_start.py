"""A linear map inside an MLP: exact where it fits, the best of its rank where it does not, and able to learn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.errors import HymaError
from hyma_mllm.search.flops import as_connector_flops
from hyma_mllm.search.linear_start import as_connector, balanced_factors, training_start


def linear(d_in: int, d_out: int, rank: int, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, rank, generator=g) @ torch.randn(rank, d_in, generator=g)
    return {"0.weight": weight, "0.bias": torch.randn(d_out, generator=g)}


def run(spec: ConnectorSpec, state: dict[str, Tensor], x: Tensor) -> Tensor:
    shape = (x.shape[1], state[f"{2 * spec.depth}.bias"].shape[0])
    module = connectors.module(spec, shape)
    module.load_state_dict(state, strict=True)
    with torch.no_grad():
        y: Tensor = module.double()(x)
    return y


@settings(max_examples=60, deadline=None)
@given(
    depth=st.integers(1, 3),
    activation=st.sampled_from(["relu", "gelu"]),
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 9),
    extra=st.integers(0, 5),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_a_map_that_fits_is_carried_exactly(
    depth: int, activation: str, d_in: int, d_out: int, extra: int, seed: int, data: st.DataObject
) -> None:
    """Any depth, either activation, odd and unused units included; inputs small and large."""
    rank = data.draw(st.integers(1, min(d_in, d_out)))
    spec = ConnectorSpec(depth, 2 * rank + extra, activation)  # type: ignore[arg-type]
    state = linear(d_in, d_out, rank, seed)
    x = torch.randn(20, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * torch.logspace(-3, 2, 20, dtype=torch.float64)[:, None]
    wanted = x @ state["0.weight"].double().T + state["0.bias"].double()
    found = run(spec, as_connector(state, spec, seed), x)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("d_in", "d_out", "hidden"), [(12, 9, 8), (9, 12, 7), (10, 10, 2)])
def test_a_map_that_does_not_fit_is_the_best_of_its_rank(
    d_in: int, d_out: int, hidden: int, depth: int, activation: str
) -> None:
    spec = ConnectorSpec(depth, hidden, activation)  # type: ignore[arg-type]
    state = linear(d_in, d_out, min(d_in, d_out))
    u, s, v = torch.linalg.svd(state["0.weight"].double(), full_matrices=False)
    best = (u * torch.where(torch.arange(len(s)) < hidden // 2, s, 0)) @ v
    x = torch.eye(d_in, dtype=torch.float64)
    found = run(spec, as_connector(state, spec), x) - state["0.bias"].double()
    torch.testing.assert_close(found, best.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("d_out", "d_in"), [(5, 9), (9, 5), (6, 6)])
def test_factors_are_balanced(d_out: int, d_in: int) -> None:
    weight = linear(d_in, d_out, 5)["0.weight"]
    reads, writes = balanced_factors(weight, 4)
    roots = torch.linalg.svdvals(weight.double())[:4].sqrt()
    torch.testing.assert_close(reads.norm(dim=1), roots)
    torch.testing.assert_close(writes.norm(dim=0), roots)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_units_read_with_the_weights_of_a_new_linear(size: float) -> None:
    state = {name: size * value for name, value in linear(24, 16, 16).items()}
    weight = as_connector(state, ConnectorSpec(1, 32))["0.weight"]
    assert float(weight.square().mean().sqrt()) == pytest.approx((3 * 24) ** -0.5, rel=1e-5)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_training_start_maps_to_the_size_of_a_new_linear(depth: int) -> None:
    spec, state, fresh = ConnectorSpec(depth, 32), linear(24, 16, 16), torch.Generator().manual_seed(0)
    x = torch.randn(500, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = run(spec, as_connector(state, spec), x)
    torch.testing.assert_close(run(spec, training_start(state, spec), x), y * (16 / 3) ** 0.5, atol=1e-4, rtol=1e-5)
    unit = {name: value / float(y.square().sum(1).mean().sqrt()) for name, value in state.items()}
    new = run(ConnectorSpec(0), connectors.select(connectors.initial(ConnectorSpec(0), (24, 16), 1, fresh), 0), x)
    assert float(run(spec, training_start(unit, spec), x).square().sum(1).mean()) == pytest.approx(16 / 3, rel=1e-4)
    assert float(new.square().sum(1).mean()) == pytest.approx(16 / 3, rel=0.35)  # the draw of one small layer


def test_depth_zero_is_unchanged() -> None:
    state = linear(4, 3, 3)
    found = as_connector(state, ConnectorSpec(0))
    torch.testing.assert_close(found, state, atol=0, rtol=0)
    found["0.weight"].zero_()
    assert state["0.weight"].any()


def test_hidden_zero_is_the_outputs_width() -> None:
    assert as_connector(linear(4, 6, 3), ConnectorSpec(1, 0))["0.weight"].shape == (6, 4)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_units_that_are_not_needed_can_learn(depth: int, rank: int, activation: str) -> None:
    """Every living unit of the last hidden layer sends a gradient into the weights that read it."""
    spec = ConnectorSpec(depth, 11, activation)  # type: ignore[arg-type]
    state = linear(6, 5, rank) if rank else {"0.weight": torch.zeros(5, 6), "0.bias": torch.ones(5)}
    module = connectors.module(spec, (6, 5))
    start = as_connector(state, spec)
    module.load_state_dict(start)
    for layer in range(depth):
        assert start[f"{2 * layer}.weight"][2 * rank :].abs().sum(1).min() > 0
        assert not start[f"{2 * layer + 2}.weight"][: 2 * rank if layer + 1 < depth else None, 2 * rank :].any()
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    (module(x) - torch.randn(200, 5, generator=torch.Generator().manual_seed(1))).square().mean().backward()
    gradient = module.get_parameter(f"{2 * depth}.weight").grad
    assert gradient is not None
    alive = (module[:-1](x) != 0).any(0)  # a fresh ReLU unit may be dead on these inputs
    assert int(alive[2 * rank :].sum()) >= (11 - 2 * rank) / 2
    assert torch.equal(gradient.abs().sum(0) > 0, alive)


def test_seed_alone_draws_the_units_that_are_not_needed() -> None:
    state, spec = linear(6, 5, 2), ConnectorSpec(1, 9)
    torch.manual_seed(1)
    first = as_connector(state, spec, 4)
    torch.manual_seed(2)
    torch.testing.assert_close(as_connector(state, spec, 4), first, atol=0, rtol=0)
    other = as_connector(state, spec, 5)["0.weight"]
    assert torch.equal(other[:4], first["0.weight"][:4])
    assert not torch.equal(other[4:], first["0.weight"][4:])


def test_one_hidden_unit_is_too_few() -> None:
    with pytest.raises(HymaError, match="hidden width 1 cannot carry a linear map"):
        as_connector(linear(4, 3, 3), ConnectorSpec(1, 1))
    with pytest.raises(HymaError, match="hidden width 1 cannot"):
        as_connector(linear(4, 1, 1), ConnectorSpec(1, 0))


def test_the_bill() -> None:
    assert as_connector_flops(ConnectorSpec(0), (40, 60)) == 0
    gram, vectors = 2 * 40 * 40 * 60, 9 * 40**3
    assert as_connector_flops(ConnectorSpec(1, 20), (40, 60)) == gram + vectors + 2 * 10 * 40 * 60
    assert as_connector_flops(ConnectorSpec(2, 500), (60, 40)) == gram + vectors + 2 * 40 * 40 * 60
    assert as_connector_flops(ConnectorSpec(1, 0), (60, 40)) == gram + vectors + 2 * 20 * 40 * 60

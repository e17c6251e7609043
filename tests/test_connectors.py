import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorSpec, LayerShape
from hyma_mllm.errors import HymaError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def doubled(spec: ConnectorSpec, shape: tuple[int, int], pairs: int) -> dict[str, Tensor]:
    params = connectors.initial(spec, shape, pairs, generator())
    return {name: value.double().requires_grad_() for name, value in params.items()}


@settings(max_examples=25, deadline=None)
@given(
    depth=st.integers(0, 3),
    activation=st.sampled_from(["relu", "gelu"]),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    hidden=st.integers(1, 6),
    leading=st.sampled_from([(1,), (4,), (3, 5)]),
    pairs=st.integers(1, 4),
)
def test_stacked_equals_one_by_one_in_values_and_gradients(
    depth: int, activation: str, shape: tuple[int, int], hidden: int, leading: tuple[int, ...], pairs: int
) -> None:
    spec = ConnectorSpec(depth, hidden, activation)  # type: ignore[arg-type]
    params = doubled(spec, shape, pairs)
    x = torch.randn(pairs, *leading, shape[0], generator=generator(1), dtype=torch.float64).requires_grad_()
    y = connectors.apply(spec, params, x)
    weights = torch.randn(y.shape, generator=generator(2), dtype=torch.float64)
    (y * weights).sum().backward()

    for k in range(pairs):
        plain = connectors.module(spec, shape).double()
        plain.load_state_dict(connectors.select(params, k), strict=True)
        own = x[k].detach().requires_grad_()
        expected = plain(own)
        torch.testing.assert_close(y[k], expected)
        (expected * weights[k]).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad[k], own.grad)
        for name, parameter in plain.named_parameters():
            grad = params[name].grad
            assert grad is not None
            torch.testing.assert_close(grad[k], parameter.grad)


@pytest.mark.parametrize("name", ["linear", "mlp1", "mlp2", "mlp11"])
def test_name_and_named_are_inverse(name: str) -> None:
    spec = ConnectorSpec.named(name, hidden=7, activation="gelu")
    assert (spec.name, spec.hidden, spec.activation) == (name, 7, "gelu")


def test_layers_and_parameters() -> None:
    assert ConnectorSpec(0).layers(3, 5) == (LayerShape(0, 3, 5),)
    spec = ConnectorSpec(2, 4)
    assert spec.layers(3, 5) == (LayerShape(0, 3, 4), LayerShape(2, 4, 4), LayerShape(4, 4, 5))
    plain = connectors.module(spec, (3, 5))
    assert spec.parameters(3, 5) == sum(parameter.numel() for parameter in plain.parameters())
    assert list(plain.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]


def test_size_of_the_papers_connector() -> None:
    assert ConnectorSpec.named("mlp1").parameters(384, 384) == 787_840  # "787 k" in the paper's count


@pytest.mark.parametrize("name", ["mlp", "mlp0", "mlp-1", "Linear", ""])
def test_unknown_family(name: str) -> None:
    with pytest.raises(HymaError, match="write linear, mlp1 or mlp2"):
        ConnectorSpec.named(name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": -1}, "depth -1"),
        ({"depth": 1.5}, "depth 1.5"),
        ({"hidden": -1}, "hidden width -1"),
        ({"activation": "tanh"}, "'tanh' is unknown; write relu or gelu"),
    ],
)
def test_bad_spec(values: dict[str, object], message: str) -> None:
    with pytest.raises(HymaError, match=message):
        ConnectorSpec(**values)  # type: ignore[arg-type]


def test_initial_has_the_statistics_of_new_linears() -> None:
    spec, shape = ConnectorSpec(1, 96), (64, 80)
    params = connectors.initial(spec, shape, 6, generator())
    torch.manual_seed(0)
    plain = connectors.stack([connectors.module(spec, shape).state_dict() for _ in range(6)])
    assert {name: value.shape for name, value in params.items()} == {name: value.shape for name, value in plain.items()}
    for name, value in params.items():
        assert value.dtype == torch.float32
        bound = plain["0.weight" if name.startswith("0") else "2.weight"].shape[-1] ** -0.5
        assert value.abs().max() <= bound
        assert value.abs().max() > 0.97 * bound
        # a sum of n uniform draws: the standard error of mean and of std, five times
        error = 5 * bound / value.numel() ** 0.5
        assert abs(value.mean() - plain[name].mean()) < error * 2**0.5
        assert abs(value.std() - plain[name].std()) < error


def test_initial_depends_on_its_generator_only() -> None:
    spec = ConnectorSpec(0)
    torch.manual_seed(1)
    first = connectors.initial(spec, (3, 2), 2, generator(5))
    torch.manual_seed(2)
    again = connectors.initial(spec, (3, 2), 2, generator(5))
    other = connectors.initial(spec, (3, 2), 2, generator(6))
    assert torch.equal(first["0.weight"], again["0.weight"])
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert not torch.equal(first["0.weight"][0], first["0.weight"][1])


def test_select_owns_its_memory_and_stack_undoes_it() -> None:
    params = doubled(ConnectorSpec(1, 4), (3, 2), 3)
    states = [connectors.select(params, k) for k in range(3)]
    assert all(not value.requires_grad for state in states for value in state.values())
    again = connectors.stack(states)
    assert all(torch.equal(again[name], params[name]) for name in params)
    states[0]["0.weight"].zero_()
    assert params["0.weight"][0].abs().sum() > 0


def test_stack_refuses_nothing_and_strangers() -> None:
    linear, mlp = (connectors.module(spec, (2, 2)).state_dict() for spec in (ConnectorSpec(0), ConnectorSpec(1, 2)))
    for states in ([], [linear, mlp]):
        with pytest.raises(ValueError, match="same names"):
            connectors.stack(states)


def test_check_state_knows_its_family_and_shape() -> None:
    spec = ConnectorSpec(1, 4)
    state = dict(connectors.module(spec, (3, 2)).state_dict())
    connectors.check_state(spec, (3, 2), state)
    wrong = [(ConnectorSpec(0), (3, 2)), (ConnectorSpec(2, 4), (3, 2)), (ConnectorSpec(1, 5), (3, 2)), (spec, (2, 3))]
    for other, shape in wrong:
        with pytest.raises(ValueError, match=f"a {other.name} connector from {shape[0]} to {shape[1]} has"):
            connectors.check_state(other, shape, state)
    with pytest.raises(ValueError, match="a mlp1 connector"):
        connectors.check_state(spec, (3, 2), {name: value for name, value in state.items() if name != "0.bias"})


def test_apply_refuses_what_does_not_fit() -> None:
    spec = ConnectorSpec(1, 4)
    params = connectors.initial(spec, (3, 2), 2, generator())
    for shape in ((1, 5, 3), (2, 5, 4), (2, 3)):
        with pytest.raises(ValueError, match=r"connectors of 2 pairs read \[2, batch, 3\]"):
            connectors.apply(spec, params, torch.zeros(shape))
    with pytest.raises(ValueError, match="a linear connector has"):
        connectors.apply(ConnectorSpec(0), params, torch.zeros(2, 5, 3))


def test_apply_runs_under_autocast() -> None:
    spec = ConnectorSpec(1, 4)
    params = connectors.initial(spec, (3, 2), 2, generator())
    x = torch.randn(2, 5, 3, generator=generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = connectors.apply(spec, params, x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), connectors.apply(spec, params, x), atol=0.02, rtol=0.02)


def test_gradients_under_autocast_are_near_those_without() -> None:
    spec = ConnectorSpec(1, 4)
    params = {name: value.requires_grad_() for name, value in connectors.initial(spec, (3, 2), 2, generator()).items()}
    x = torch.randn(2, 5, 3, generator=generator())
    expected = torch.autograd.grad(connectors.apply(spec, params, x).square().sum(), params.values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = connectors.apply(spec, params, x).float().square().sum()
    for got, want in zip(torch.autograd.grad(loss, params.values()), expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("frozen", ["input", "weights", "biases", "nothing"])
def test_gradients_are_those_of_finite_differences(frozen: str) -> None:
    spec = ConnectorSpec(1, 3, "gelu")
    params = doubled(spec, (3, 2), 2)
    x = torch.randn(2, 4, 3, generator=generator(1), dtype=torch.float64).requires_grad_(frozen != "input")
    for name, value in params.items():
        value.requires_grad_(not frozen.startswith(name[2:]))

    def mapped(x: Tensor, *values: Tensor) -> Tensor:
        return connectors.apply(spec, dict(zip(params, values, strict=True)), x)

    assert torch.autograd.gradcheck(mapped, (x, *params.values()))
    assert torch.autograd.gradgradcheck(mapped, (x, *params.values()))


def test_weight_gradients_come_in_the_layout_of_the_weights() -> None:
    """A transposed gradient would be copied, which made the stacked step slower than one connector at a time."""
    spec = ConnectorSpec(1, 5)
    params = doubled(spec, (3, 2), 4)
    y = connectors.apply(spec, params, torch.randn(4, 6, 3, generator=generator(), dtype=torch.float64))
    for gradient, value in zip(torch.autograd.grad(y.sum(), params.values()), params.values(), strict=True):
        assert gradient.stride() == value.stride()

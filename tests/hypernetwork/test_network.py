from itertools import product
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorGroup, ConnectorSpec
from hyma_mllm.errors import HymaError
from hyma_mllm.hypernetwork.base import BaseKind
from hyma_mllm.hypernetwork.conditions import ConditionKind
from hyma_mllm.hypernetwork.heads import HeadKind
from hyma_mllm.hypernetwork.network import Hypernetwork, describe
from hyma_mllm.hypernetwork.presets import HypernetworkConfig
from hyma_mllm.pairs import PairGrid

PARTS = list(product(get_args(ConditionKind), get_args(HeadKind), get_args(BaseKind)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid_of(vision: list[int], text: list[int], direction: str = "text_to_vision") -> PairGrid:
    ids = tuple(f"v{n}" for n in range(len(vision))), tuple(f"t{n}" for n in range(len(text)))
    return PairGrid(ids[0], tuple(vision), ids[1], tuple(text), direction)  # type: ignore[arg-type]


def build(grid: PairGrid, spec: ConnectorSpec, seed: int = 0, **values: Any) -> Hypernetwork:
    config = HypernetworkConfig(**{"trunk": [12, 16], "condition_width": 8, "rank": 2, "chunk_rows": 4, **values})
    means = [[torch.randn(d, generator=generator(d)) for d in ds] for ds in (grid.vision_widths, grid.text_widths)]
    starts = starts_of(grid, spec) if config.base == "closed_form" else None
    return Hypernetwork(grid, spec, config, *means, seed=seed, starts=starts)


def starts_of(grid: PairGrid, spec: ConnectorSpec, seed: int = 0) -> list[dict[str, Tensor]]:
    """A fresh connector for each pair, all different."""
    return [
        connectors.select(connectors.initial(spec, grid.shape(index), 1, generator(seed + index)), 0)
        for index in range(len(grid))
    ]


def per_pair(groups: list[ConnectorGroup]) -> dict[int, dict[str, Tensor]]:
    """Plain state dicts by position."""
    return {
        position: connectors.select(group.params, k)
        for group in groups
        for k, position in enumerate(group.positions.tolist())
    }


def loss_of(network: Hypernetwork, pairs: list[int]) -> Tensor:
    """Mean square distance of the predicted features from one fixed target per pair."""
    losses = []
    for group in network(pairs):
        x = torch.randn(len(group.pairs), 6, group.shape[0], generator=generator(1))
        y = connectors.apply(network.spec, group.params, x)
        target = torch.stack([torch.randn(y.shape[1:], generator=generator(int(k))) for k in group.pairs])
        losses.append((y - target).square().mean())
    return torch.stack(losses).sum()


def train(network: Hypernetwork, steps: int) -> None:
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        loss_of(network, list(range(len(network.grid)))).backward()  # type: ignore[no-untyped-call]
        optimiser.step()


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize(("condition", "head", "base"), PARTS)
def test_first_step_is_like_new_linears(condition: str, head: str, base: str, depth: int) -> None:
    grid, spec = grid_of([48, 64], [40, 56]), ConnectorSpec(depth, 72)
    network = build(grid, spec, condition=condition, head=head, base=base)
    for index, state in per_pair(network(range(len(grid)))).items():
        for layer in spec.layers(*grid.shape(index)):
            bound = layer.fan_in**-0.5
            for kind in ("weight", "bias"):
                value = state[f"{layer.index}.{kind}"]
                error = 5 * bound / value.numel() ** 0.5
                assert value.abs().max() <= bound
                assert abs(value.mean()) < error
                assert abs(value.std() - bound / 3**0.5) < error


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("head", get_args(HeadKind))
def test_first_step_keeps_captions_apart(head: str, depth: int) -> None:
    grid, spec = grid_of([48], [40]), ConnectorSpec(depth, 72)
    network = build(grid, spec, head=head)
    x = functional.normalize(torch.randn(1, 64, 40, generator=generator()), dim=-1)

    def cosines(params: dict[str, Tensor]) -> Tensor:
        y = functional.normalize(connectors.apply(spec, params, x)[0], dim=-1)
        return (y @ y.T)[~torch.eye(len(y), dtype=torch.bool)]

    ours = cosines(network([0])[0].params).detach()
    fresh = torch.stack([cosines(connectors.initial(spec, (40, 48), 1, generator(s))).mean() for s in range(30)])
    assert abs(ours.mean() - fresh.mean()) < 4 * fresh.std()
    assert ours.max() < 0.99


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize(("condition", "head", "base"), PARTS)
def test_every_parameter_learns(condition: str, head: str, base: str, depth: int) -> None:
    grid = grid_of([6, 6, 5], [4, 7])
    network = build(grid, ConnectorSpec(depth, 8), condition=condition, head=head, base=base)
    before = loss_of(network, list(range(6))).item()
    train(network, 1)  # deltas are zero at step 0, so what lies behind them gets its first gradient at step 1
    network.zero_grad()
    loss_of(network, list(range(6))).backward()  # type: ignore[no-untyped-call]
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    train(network, 20)
    assert loss_of(network, list(range(6))).item() < before


@pytest.mark.parametrize(("condition", "head", "base"), PARTS)
def test_no_row_is_generated_and_thrown_away(condition: str, head: str, base: str) -> None:
    """Every row of every tensor of bases and heads gets its own gradient, whatever the widths."""
    network = build(grid_of([6, 5], [4, 7]), ConnectorSpec(1, 9), condition=condition, head=head, base=base)
    train(network, 1)
    network.zero_grad()
    loss_of(network, list(range(4))).backward()  # type: ignore[no-untyped-call]
    for name, parameter in [*network.bases.named_parameters(), *network.heads.named_parameters()]:
        assert parameter.grad is not None, name
        rows = parameter.grad.flatten(0, -2) if parameter.grad.ndim > 1 else parameter.grad
        # a hidden unit that is dead under ReLU for one pair set has no gradient: at most a few of 9
        assert (rows.abs().sum(-1) > 0).float().mean() > 0.6, name


@settings(max_examples=25, deadline=None)
@given(
    vision=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    text=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    depth=st.integers(0, 2),
    parts=st.sampled_from(PARTS),
    direction=st.sampled_from(["text_to_vision", "vision_to_text"]),
    data=st.data(),
)
def test_any_widths_any_order(
    vision: list[int], text: list[int], depth: int, parts: tuple[str, str, str], direction: str, data: st.DataObject
) -> None:
    grid, spec = grid_of(vision, text, direction), ConnectorSpec(depth, 6)
    network = build(grid, spec, condition=parts[0], head=parts[1], base=parts[2])
    train(network, 2)
    whole = per_pair(network(range(len(grid))))
    assert sorted(whole) == list(range(len(grid)))
    for index, state in whole.items():
        connectors.module(spec, grid.shape(index)).load_state_dict(state, strict=True)
        assert all(value.dtype == torch.float32 for value in state.values())

    asked = data.draw(st.lists(st.integers(0, len(grid) - 1), max_size=6))
    groups = network(torch.tensor(asked, dtype=torch.int64))
    for group in groups:
        assert [asked[position] for position in group.positions.tolist()] == group.pairs.tolist()
        assert {grid.shape(index) for index in group.pairs.tolist()} == {group.shape}
    part = per_pair(groups)
    assert sorted(part) == list(range(len(asked)))
    for position, index in enumerate(asked):
        torch.testing.assert_close(part[position], whole[index], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("condition", "head", "base"), PARTS)
def test_state_dict_round_trip(condition: str, head: str, base: str) -> None:
    grid, spec = grid_of([6, 5], [4, 7]), ConnectorSpec(1, 8)
    parts = {"condition": condition, "head": head, "base": base}
    network = build(grid, spec, seed=1, **parts)
    train(network, 2)
    again = build(grid, spec, seed=2, **parts)
    again.load_state_dict(network.state_dict(), strict=True)
    torch.testing.assert_close(per_pair(again(range(4))), per_pair(network(range(4))), atol=0, rtol=0)


def test_seed_alone_decides_the_start() -> None:
    grid, spec = grid_of([6, 5], [4]), ConnectorSpec(1, 8)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = build(grid, spec, seed=3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = build(grid, spec, seed=3).state_dict(), build(grid, spec, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["trunk.layers.0.weight"], other["trunk.layers.0.weight"])


@pytest.mark.parametrize("condition", get_args(ConditionKind))
def test_pairs_differ_once_trained(condition: str) -> None:
    network = build(grid_of([5, 5], [4, 4]), ConnectorSpec(0), condition=condition, base="shape")
    if condition == "features":  # `build` draws means by width; two models of one width must differ here
        means = [[torch.randn(d, generator=generator(seed)) for seed in range(2)] for d in (5, 4)]
        network = Hypernetwork(network.grid, network.spec, network.config, *means)
    train(network, 3)
    weight = network(range(4))[0].params["0.weight"]
    assert all(not torch.allclose(weight[a], weight[b], atol=1e-5) for a in range(4) for b in range(a))


def test_twin_encoders_are_one_under_features() -> None:
    network = build(grid_of([5, 5], [4]), ConnectorSpec(0), condition="features", base="shape")
    train(network, 3)
    weight = network([0, 1])[0].params["0.weight"]
    torch.testing.assert_close(weight[0], weight[1])


@pytest.mark.parametrize("direction", ["text_to_vision", "vision_to_text"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_factored_base_gives_each_layer_to_the_models_that_it_touches(depth: int, direction: str) -> None:
    """Mark every term with the number of its owner and find the marks in the predicted layers."""
    grid, spec = grid_of([5, 5, 5], [4, 4], direction), ConnectorSpec(depth, 4)
    network = build(grid, spec, base="factored")
    names = [name for name, _ in network.bases.named_parameters() if name.endswith("bias")]
    before = per_pair(network(range(6)))
    with torch.no_grad():
        for name in names:
            term = network.bases.get_parameter(name)
            term.add_(torch.arange(len(term)).view(-1, 1) * (10 if ".1." in name else 1))
    after = per_pair(network(range(6)))

    def marks(layer: int) -> list[int]:
        key = f"{layer}.bias"
        return [round((after[index][key] - before[index][key]).mean().item()) for index in range(6)]

    vision, text = [0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1]
    reads, writes = (text, vision) if direction == "text_to_vision" else (vision, text)
    if depth == 0:
        assert marks(0) == [r + 10 * w for r, w in zip(reads, writes, strict=True)]
    else:
        assert (marks(0), marks(2 * depth)) == (reads, writes)
    if depth == 2:
        assert marks(2) == [0] * 6


@pytest.mark.parametrize("direction", ["text_to_vision", "vision_to_text"])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("head", get_args(HeadKind))
def test_closed_form_begins_as_its_starts(head: str, depth: int, direction: str) -> None:
    """To the bit, whatever the mix of widths, the order and the repeats of pairs; the gradient reaches all parts."""
    grid, spec = grid_of([6, 5, 6], [4, 7], direction), ConnectorSpec(depth, 8, "gelu")
    network = build(grid, spec, head=head, base="closed_form")
    starts = starts_of(grid, spec)
    for pairs in ([0, 1, 2, 3, 4, 5], [4, 0, 4, 3], [2]):
        found = per_pair(network(pairs))
        torch.testing.assert_close([found[n] for n in range(len(pairs))], [starts[k] for k in pairs], atol=0, rtol=0)
    loss_of(network, list(range(6))).backward()  # type: ignore[no-untyped-call]
    learning = [name for name, p in network.named_parameters() if p.grad is not None and bool(p.grad.any())]
    first = {"dense": "weight", "chunked": "weight", "low_rank": "up"}[head]
    for layer in network.bases:
        assert f"heads.{layer}.{first}" in learning
        assert all(f"bases.{layer}.terms.0.{kind}" in learning for kind in ("weight", "bias"))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("head", get_args(HeadKind))
def test_closed_form_learns_and_keeps_its_starts(head: str, depth: int) -> None:
    grid, spec = grid_of([6, 5], [4, 7]), ConnectorSpec(depth, 8)
    network = build(grid, spec, head=head, base="closed_form")
    frozen = {name: value.clone() for name, value in network.named_buffers() if ".start." in name}
    before = loss_of(network, list(range(4))).item()
    train(network, 20)
    assert loss_of(network, list(range(4))).item() < 0.97 * before
    assert frozen
    assert all(torch.equal(network.get_buffer(name), value) for name, value in frozen.items())


def test_what_pairs_of_a_model_share_is_learnt_by_its_term() -> None:
    """Training one pair of a linear grid moves the pairs that share a model with it, and no other."""
    grid, spec = grid_of([5, 5], [4, 4]), ConnectorSpec(0)
    network = build(grid, spec, base="closed_form", condition="pair")
    with torch.no_grad():
        for head in network.heads.parameters():
            head.zero_()  # no delta: only the terms are left
    before = per_pair(network(range(4)))
    optimiser = torch.optim.SGD(network.bases.parameters(), lr=0.1)
    loss_of(network, [0]).backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    after = per_pair(network(range(4)))
    moved = [not torch.equal(before[k]["0.weight"], after[k]["0.weight"]) for k in range(4)]
    assert moved == [True, True, True, False]


def test_a_checkpoint_brings_its_own_starts() -> None:
    grid, spec = grid_of([6, 5], [4, 7]), ConnectorSpec(1, 8)
    config = HypernetworkConfig(base="closed_form", trunk=[12, 16], condition_width=8)
    first = Hypernetwork(grid, spec, config, seed=1, starts=starts_of(grid, spec))
    train(first, 2)
    again = Hypernetwork(grid, spec, config, seed=2, starts=starts_of(grid, spec, 50))
    again.load_state_dict(first.state_dict(), strict=True)
    torch.testing.assert_close(per_pair(again(range(4))), per_pair(first(range(4))), atol=0, rtol=0)


def test_starts_are_no_parameters() -> None:
    grid, spec = grid_of([6, 5], [4, 7]), ConnectorSpec(1, 8)
    sizes = [describe(build(grid, spec, base=base))["hypernetwork_parameters"] for base in ("factored", "closed_form")]
    assert sizes[0] == sizes[1]


def test_starts_of_twenty_pairs_are_predicted_by_one_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass runs each head and each base once for all pairs of its shape."""
    grid, spec = grid_of([5] * 4, [4] * 5), ConnectorSpec(1, 6)
    network = build(grid, spec, base="closed_form")
    calls: list[int] = []
    for layer in network.bases:
        start = network.get_submodule(f"bases.{layer}.start")
        start.register_forward_hook(lambda _, arguments, __: calls.append(len(arguments[0])))
    network(range(20))
    assert calls == [20, 20]


def test_starts_that_do_not_fit() -> None:
    grid, spec = grid_of([5], [4, 3]), ConnectorSpec(0)
    closed, plain = HypernetworkConfig(base="closed_form"), HypernetworkConfig()
    starts = starts_of(grid, spec)
    with pytest.raises(HymaError, match=r"needs a start for every pair and got none.*set hypernetwork\.preset"):
        Hypernetwork(grid, spec, closed)
    with pytest.raises(ValueError, match="a grid of 2 pairs has as many starts, not 1"):
        Hypernetwork(grid, spec, closed, starts=starts[:1])
    with pytest.raises(ValueError, match="a linear connector from 4 to 5"):
        Hypernetwork(grid, spec, closed, starts=starts[::-1])
    with pytest.raises(ValueError, match="only a hypernetwork of the base closed_form"):
        Hypernetwork(grid, spec, plain, starts=starts)


def test_output_size_does_not_follow_the_condition() -> None:
    network = build(grid_of([5], [4]), ConnectorSpec(0), condition="pair", head="dense")
    train(network, 3)
    expected = per_pair(network([0]))
    with torch.no_grad():
        network.get_parameter("condition.pair.rows").mul_(100)
    torch.testing.assert_close(per_pair(network([0])), expected, atol=1e-5, rtol=1e-4)


def test_float32_under_autocast() -> None:
    network = build(grid_of([5, 6], [4]), ConnectorSpec(1, 8))
    train(network, 3)
    expected = per_pair(network([0, 1]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(per_pair(network([0, 1])), expected, atol=0, rtol=0)


def test_no_pair_and_no_such_pair() -> None:
    network = build(grid_of([5], [4]), ConnectorSpec(0))
    assert network([]) == []
    with pytest.raises(IndexError, match="pair 1 of 1"):
        network([1])


def test_describe_counts_all_pairs() -> None:
    grid, spec = grid_of([5, 6], [4]), ConnectorSpec(1, 8)
    network = build(grid, spec)
    sizes = describe(network)
    total = sum(p.numel() for index in range(2) for p in connectors.module(spec, grid.shape(index)).parameters())
    assert sizes["connector_parameters"] == total
    assert sizes["hypernetwork_parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert sizes["ratio"] == pytest.approx(sizes["hypernetwork_parameters"] / total)


def test_default_is_a_few_percent_of_the_papers() -> None:
    grid, spec = grid_of([96, 192], [96, 192]), ConnectorSpec(1, 256)
    sizes = [
        describe(Hypernetwork(grid, spec, HypernetworkConfig(preset=preset)))["hypernetwork_parameters"]
        for preset in ("default", "hyma")
    ]
    assert 0.01 < sizes[0] / sizes[1] < 0.15  # a share that falls with the widths, 0.03 at the paper's


def test_hyma_has_the_papers_size() -> None:
    """About 513 parameters for each of the connector's: 404 M for the 787 k of a 384 to 384 MLP, here at a tenth."""
    grid, spec = grid_of([96], [96]), ConnectorSpec(1, 256)
    network = Hypernetwork(grid, spec, HypernetworkConfig(preset="hyma"))
    trunk = sum(p.numel() for name, p in network.named_parameters() if not name.startswith(("heads", "bases")))
    assert describe(network)["hypernetwork_parameters"] - trunk == 513 * spec.parameters(96, 96)
    assert trunk == 3 * 32 + 32 * 128 + 128 + 128 * 512 + 512


def test_torch_initialisation_leaves_the_papers_first_step() -> None:
    """Torch's defaults predict weights whose size has nothing to do with the layer's fan-in; ours follow it."""
    grid, spec = grid_of([96], [64]), ConnectorSpec(1, 128)
    for initialisation, expected in (("hyper", True), ("torch", False)):
        config = HypernetworkConfig(preset="hyma", initialisation=initialisation)  # type: ignore[arg-type]
        weight = Hypernetwork(grid, spec, config)([0])[0].params["0.weight"]
        ratio = float(weight.detach().std()) / (64**-0.5 / 3**0.5)
        assert (0.95 < ratio < 1.05) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "hyam"}, "preset 'hyam' is unknown; did you mean hyma"),
        ({"condition": "pairs"}, "condition 'pairs' is unknown; did you mean pair"),
        ({"head": "lowrank"}, "did you mean low_rank"),
        ({"base": "x"}, "known are closed_form, factored, shape"),
        ({"initialisation": "torhc"}, "did you mean torch"),
        ({"condition_width": 0}, "condition_width is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"chunk_rows": 0}, "chunk_rows is 0"),
        ({"trunk": []}, "no layer"),
        ({"trunk": [8, 0]}, "trunk is 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
    ],
)
def test_bad_configuration(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HymaError, match=message):
        HypernetworkConfig(**values)


@pytest.mark.parametrize(
    ("depth", "values", "message"),
    [
        (1, {"preset": "hyper-align"}, "choose the connector linear"),
        (0, {"preset": "default", "initialisation": "torch"}, "needs the dense head and not"),
        (0, {"preset": "hyma", "base": "closed_form", "initialisation": "torch"}, "would bury the base closed_form"),
    ],
)
def test_parts_that_do_not_go_together(depth: int, values: dict[str, Any], message: str) -> None:
    with pytest.raises(HymaError, match=message):
        build(grid_of([5], [4]), ConnectorSpec(depth, 6), **values)


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        (None, [torch.ones(4)], "mean feature of each of v0 and got 0"),
        ([torch.ones(5)] * 2, [torch.ones(4)], "got 2"),
        ([torch.ones(5)], [torch.ones(3)], "mean feature of t0 has 3 entries where its width is 4"),
        ([torch.zeros(5)], [torch.ones(4)], "mean feature of v0 is zero"),
        ([torch.ones(5)], [torch.full((4,), float("nan"))], "mean feature of t0 is zero or not finite"),
    ],
)
def test_unusable_means(vision: list[Tensor] | None, text: list[Tensor] | None, message: str) -> None:
    with pytest.raises(HymaError, match=message):
        Hypernetwork(grid_of([5], [4]), ConnectorSpec(0), HypernetworkConfig(preset="hyper-align"), vision, text)

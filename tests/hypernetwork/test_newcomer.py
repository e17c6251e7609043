"""A newcomer's connectors: exact where the newcomer is a trained model under another name, refused where unknown."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.errors import HymaError
from hyma_mllm.hypernetwork.network import Hypernetwork
from hyma_mllm.hypernetwork.newcomer import Adapted, Newcomer, Side, adopt
from hyma_mllm.hypernetwork.presets import HypernetworkConfig
from hyma_mllm.pairs import PairGrid
from hyma_mllm.search.bank import ConnectorBank

WIDTHS = {"vision": (6, 6, 9), "text": (5, 7)}
SIDES: tuple[Side, ...] = ("vision", "text")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def means() -> dict[str, list[Tensor]]:
    return {side: [torch.randn(d, generator=generator(10 * d + n)) for n, d in enumerate(widths)]
            for side, widths in WIDTHS.items()}  # fmt: skip


def trained(spec: ConnectorSpec, direction: str = "text_to_vision", **values: Any) -> Hypernetwork:
    """A hypernetwork whose every parameter has been moved, as a training would."""
    grid = PairGrid(("a", "b", "c"), WIDTHS["vision"], ("x", "y"), WIDTHS["text"], direction)  # type: ignore[arg-type]
    config = HypernetworkConfig(**{"trunk": [12, 16], "condition_width": 8, "rank": 2, "chunk_rows": 4, **values})
    starts = None
    if config.base == "closed_form":
        starts = [start(spec, grid.shape(index), index) for index in range(len(grid))]
    found = means()
    network = Hypernetwork(grid, spec, config, found["vision"], found["text"], seed=3, starts=starts)
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(number)))
    return network


def start(spec: ConnectorSpec, shape: tuple[int, int], seed: int) -> dict[str, Tensor]:
    return connectors.select(connectors.initial(spec, shape, 1, generator(seed)), 0)


def states(network: torch.nn.Module, pairs: list[int]) -> list[dict[str, Tensor]]:
    return [connectors.select(network([pair])[0].params, 0) for pair in pairs]


CASES = product(
    SIDES, ("factored", "features"), ("dense", "chunked", "low_rank"), ("shape", "factored", "closed_form"), (0, 1)
)


@pytest.mark.parametrize(("side", "condition", "head", "base", "depth"), CASES)
def test_a_trained_model_under_another_name_has_its_own_connectors(
    side: Side, condition: str, head: str, base: str, depth: int
) -> None:
    spec = ConnectorSpec(depth, 8)
    for number, width in enumerate(WIDTHS[side]):
        network = trained(spec, condition=condition, head=head, base=base)
        grid = network.grid
        twin = (grid.vision_ids if side == "vision" else grid.text_ids)[number]
        pairs = [pair.index for pair in grid.pairs() if (pair.vision if side == "vision" else pair.text) == number]
        given = [start(spec, grid.shape(index), index) for index in pairs] if base == "closed_form" else None
        adopted = adopt(network, Newcomer(side, "new", width, twin, means()[side][number]), given)
        wanted, found = states(network, pairs), states(adopted, list(range(len(pairs))))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("direction", ["text_to_vision", "vision_to_text"])
def test_only_the_code_learns_and_the_trained_network_stays(direction: str) -> None:
    network = trained(ConnectorSpec(1, 8), direction)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    adopted = adopt(network, Newcomer("vision", "new", 6))
    assert [n for n, p in adopted.named_parameters() if p.requires_grad] == ["condition.vision.rows"]
    optimiser = torch.optim.SGD([p for p in adopted.parameters() if p.requires_grad], lr=1.0)
    old = states(adopted, [0])[0]
    sum(value.square().sum() for group in adopted([0, 1]) for value in group.params.values()).backward()
    optimiser.step()
    assert not torch.equal(states(adopted, [0])[0]["0.weight"], old["0.weight"])
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())


def test_a_newcomer_like_none_takes_the_mean_of_codes_and_of_its_widths_terms() -> None:
    network = trained(ConnectorSpec(0), condition="factored", base="factored", head="low_rank")
    adopted = adopt(network, Newcomer("vision", "new", 6))
    rows = dict(network.named_parameters())["condition.vision.rows"]
    torch.testing.assert_close(dict(adopted.named_parameters())["condition.vision.rows"][0], rows.mean(0))
    name = "0_5x6"
    # the second term is that of the models written into: a and b have the width 6
    own, theirs = adopted.get_parameter(f"bases.{name}.terms.1.weight"), network.get_parameter(
        f"bases.{name}.terms.1.weight"
    )  # fmt: skip
    assert theirs.shape[0] == 2
    torch.testing.assert_close(own[0], theirs.mean(0))


def test_an_unknown_width_is_carried_by_its_start() -> None:
    spec = ConnectorSpec(0)
    network = trained(spec, base="closed_form", condition="factored", head="low_rank")
    given = [start(spec, (width, 11), width) for width in WIDTHS["text"]]
    adopted = adopt(network, Newcomer("vision", "new", 11, "c"), given)
    for found, wanted in zip(states(adopted, [0, 1]), given, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("values", "newcomer", "message"),
    [
        ({"condition": "pair"}, Newcomer("vision", "new", 6), "knows pairs and no models"),
        ({}, Newcomer("vision", "a", 6), "a was trained"),
        ({}, Newcomer("text", "new", 5, "xx"), "cannot be like xx; known are x, y|did you mean x"),
        ({}, Newcomer("vision", "new", 0), "has the width 0"),
        ({}, Newcomer("vision", "new", 11), "has the width 11, which no trained vision model has"),
        ({"base": "closed_form"}, Newcomer("vision", "new", 6), "needs a start for every pair of new"),
        ({"condition": "features"}, Newcomer("vision", "new", 6), "mean feature of each of new and got 0"),
        ({"condition": "features"}, Newcomer("vision", "new", 6, mean=torch.ones(5)), "has 5 entries where its width"),
        ({"condition": "features"}, Newcomer("vision", "new", 6, mean=torch.zeros(6)), "new is zero or not finite"),
    ],
)
def test_what_cannot_be_adopted(values: dict[str, Any], newcomer: Newcomer, message: str) -> None:
    network = trained(ConnectorSpec(0), **{"condition": "factored", "base": "factored", "head": "low_rank", **values})
    with pytest.raises(HymaError, match=message):
        adopt(network, newcomer)


@pytest.mark.parametrize("depth", [0, 1])
def test_deltas_start_at_zero_and_are_low_rank(depth: int) -> None:
    spec = ConnectorSpec(depth, 8)
    grid = PairGrid(("a", "b"), (6, 9), ("x", "y"), (5, 5))
    bank = ConnectorBank(grid, spec, 0).requires_grad_(False)
    network = Adapted(bank, grid, spec, rank=2, seed=1)
    assert not any(name.startswith("source") for name, p in network.named_parameters() if p.requires_grad)
    frozen = states(bank, [0, 1, 2, 3])
    for one, other in zip(states(network, [0, 1, 2, 3]), frozen, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    optimiser = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        sum(value.square().sum() for group in network([3, 0]) for value in group.params.values()).backward()
        optimiser.step()
    moved = states(network, [0, 1, 2, 3])
    for pair in (0, 3):
        delta = moved[pair]["0.weight"] - frozen[pair]["0.weight"]
        assert torch.linalg.matrix_rank(delta, rtol=1e-4) == 2
        assert not torch.equal(moved[pair]["0.bias"], frozen[pair]["0.bias"])
    assert torch.equal(moved[1]["0.weight"], frozen[1]["0.weight"])
    # one pair: U V of [out, 2] x [2, in] forward, and as much for each gradient
    wanted = sum(6 * layer.fan_out * 2 * layer.fan_in for layer in spec.layers(5, 9))
    assert network.step_flops([2], grid) == wanted

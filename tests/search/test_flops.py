import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.hypernetwork.network import Hypernetwork
from hyma_mllm.hypernetwork.presets import HypernetworkConfig
from hyma_mllm.pairs import PairGrid
from hyma_mllm.search.flops import (
    Matmul,
    connector_step_flops,
    hypernetwork_step_flops,
    matmul_flops,
    similarity_step_flops,
)


def counted(step):
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return counter.get_total_flops()


def sequential(depth, hidden, d_in, d_out):
    widths = [d_in] + [hidden] * depth + [d_out]
    layers = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("shape", [(384, 768), (1024, 192)])
def test_one_step_of_a_pair_is_what_torch_counts(depth, shape):
    """Mapping and similarity of one pair; both are exact, so the 1 % of the method's ledger is met with room."""
    batch, (d_in, d_out) = 96, shape
    connector, text, image = sequential(depth, 256, d_in, d_out), torch.randn(batch, d_in), torch.randn(batch, d_out)

    def step():
        mapped = nn.functional.normalize(connector(text), dim=-1)
        logits = mapped @ image.T
        targets = torch.arange(batch)
        (nn.functional.cross_entropy(logits, targets) + nn.functional.cross_entropy(logits.T, targets)).backward()

    spec = ConnectorSpec(depth=depth, hidden=256)
    expected = connector_step_flops(spec, shape, batch) + similarity_step_flops(batch, d_out)
    assert counted(step) == pytest.approx(expected, rel=0.01)


def test_the_closed_forms_of_the_method():
    batch, parameters = 512, 384 * 768
    linear = connector_step_flops(ConnectorSpec(depth=0), (384, 768), batch)
    assert linear == 4 * batch * parameters
    deep = ConnectorSpec(depth=1, hidden=1024)
    weights = 384 * 1024 + 1024 * 768
    assert connector_step_flops(deep, (384, 768), batch) == 6 * batch * weights - 2 * batch * 384 * 1024
    assert similarity_step_flops(batch, 768) == 4 * batch**2 * 768


def test_the_tiled_similarity_computes_its_logits_once_more():
    batch, width = 64, 32
    mapped = torch.randn(batch, width, requires_grad=True)
    image = torch.randn(batch, width)

    def step():
        logits = torch.utils.checkpoint.checkpoint(lambda side: (side @ image.T).exp(), mapped, use_reentrant=False)
        logits.sum().backward()

    assert counted(step) == similarity_step_flops(batch, width, tiled=True)


@pytest.mark.parametrize("condition", ["pair", "factored", "features"])
@pytest.mark.parametrize("head", ["dense", "chunked", "low_rank"])
@pytest.mark.parametrize("connector", ["linear", "mlp1"])
def test_one_step_of_a_hypernetwork_is_what_torch_counts(condition, head, connector):
    grid = PairGrid(("a", "b", "c"), (48, 64, 48), ("x", "y"), (40, 56))
    means = [torch.randn(width) for width in grid.vision_widths], [torch.randn(width) for width in grid.text_widths]
    config = HypernetworkConfig(condition=condition, head=head, trunk=[32, 64])
    network = Hypernetwork(grid, ConnectorSpec.named(connector, hidden=32), config, *means)
    pairs = [0, 3, 5]

    def step():
        sum(value.square().sum() for group in network(pairs) for value in group.params.values()).backward()

    assert counted(step) == pytest.approx(hypernetwork_step_flops(grid, network.spec, config, pairs), rel=0.02)


def test_frozen_sides_have_no_backward():
    assert matmul_flops([Matmul(2, 3, 5)]) == 3 * 60
    assert matmul_flops([Matmul(2, 3, 5, input_gradient=False)]) == 2 * 60
    assert matmul_flops([Matmul(2, 3, 5, input_gradient=False, weight_gradient=False)]) == 60

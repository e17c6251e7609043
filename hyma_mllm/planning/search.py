"""What any search needs, whatever its case: trained weights, checkpoints, connectors that are kept."""

from collections.abc import Iterator, Sequence

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.hypernetwork.presets import HypernetworkConfig
from hyma_mllm.hypernetwork.sizes import all_weights, frozen_starts, hypernetwork_weights
from hyma_mllm.pairs import PairGrid
from hyma_mllm.planning.needs import Need, Place
from hyma_mllm.planning.training import CHECKPOINT, CHECKPOINTS_AT_ONCE, FLOAT, GRADIENT, PREDICTED_COPIES, STATE
from hyma_mllm.search.config import CLOSED_FORMS, TRAINING_FREE, SearchConfig
from hyma_mllm.search.samplers import PairSampler
from hyma_mllm.search.session import KEPT

LIBRARIES = 0.75e9
"""Bytes of a Python process with torch, transformers and accelerate loaded."""


def trained_needs(
    grid: PairGrid, search: SearchConfig, network: HypernetworkConfig, compute: Place, visits: int
) -> Iterator[Need]:
    """Weights that are trained, with gradients and optimiser; their checkpoints; connectors on disk.

    Args:
        grid: the pairs.
        search: which methods.
        network: what predicts the connectors.
        compute: `gpu` or `memory`.
        visits: forward passes of an optimiser step.
    """
    specs = [search.spec(name) for name in search.connectors]
    rivals = [method for method in search.methods if method not in ("hyma", *CLOSED_FORMS, *TRAINING_FREE)]
    sizes: list[tuple[str, float]] = []
    if "hyma" in search.methods:
        sizes += [(f"hypernetwork of {spec.name}", hypernetwork_weights(grid, spec, network)) for spec in specs]
        started = max(FLOAT * frozen_starts(grid, spec, network) for spec in specs)
        if started:
            yield Need("closed-form starts of all pairs", compute, started, "training")
    if rivals:
        sizes += [(f"{spec.name} connectors of all pairs ({rivals[0]})", all_weights(grid, spec)) for spec in specs]
    if sizes:
        name, largest = max(sizes, key=lambda size: size[1])
        yield Need(f"{name}, with AdamW's moments", compute, STATE * largest)
        # A hypernetwork's gradients come last in a backward pass; those of earlier visits of a step wait for them.
        late = name.startswith("hypernetwork") and visits == 1
        yield Need("their gradients", compute, GRADIENT * largest, "updating" if late else "training")
        # A checkpoint holds frozen starts as well, once.
        more = max(FLOAT * frozen_starts(grid, spec, network) for spec in specs)
        yield Need("checkpoints of one training", "run", CHECKPOINTS_AT_ONCE * (CHECKPOINT * largest + more))
    kept = len({*KEPT, search.handed_over()} & set(search.methods))
    yield Need("connectors that are kept", "run", kept * FLOAT * sum(all_weights(grid, spec) for spec in specs))


def predicted_need(
    spec: ConnectorSpec, shapes: Sequence[tuple[int, int]], search: SearchConfig, compute: Place
) -> Need:
    """The predicted weights of one visit; a bank of independent connectors hands out its own."""
    copies = PREDICTED_COPIES if "hyma" in search.methods else 2
    size = copies * FLOAT * sum(spec.parameters(*shape) for shape in shapes)
    return Need(f"predicted connectors of a visit of {len(shapes)} pairs", compute, size, "training")


def sampler_of(grid: PairGrid, search: SearchConfig, groups: Sequence[int] | None = None) -> PairSampler:
    """What a training visits, and how often."""
    return PairSampler(tuple(range(len(grid))), search.pairs_per_visit, search.sampler, 0, groups)


def visit_shapes(grid: PairGrid, search: SearchConfig, groups: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """(d_in, d_out) of the pairs of the largest visit.

    Args:
        grid: the pairs.
        search: how they are visited.
        groups: of pairs that may share a visit, a number each; None where all may.
    """
    sampler = sampler_of(grid, search, groups)
    by_group: dict[int, list[tuple[int, int]]] = {}
    for pair in grid.pairs():
        by_group.setdefault(0 if groups is None else groups[pair.index], []).append(grid.shape(pair.index))
    largest = [sorted(shapes, key=lambda shape: -shape[0] * shape[1])[: sampler.size] for shapes in by_group.values()]
    return max(largest, key=lambda shapes: sum(d_in * d_out for d_in, d_out in shapes))

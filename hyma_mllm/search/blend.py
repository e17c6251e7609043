"""How far to go from the closed form to what was trained, for each pair by its validation score.

With little data a training may leave a good start behind. Connectors between a start and what was trained from it are
often better than both (Wortsman et al., arXiv 2109.01903, section 3), and looking costs a few validation scores.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.ledger import Meter
from hyma_mllm.search.method import Setting, all_states
from hyma_mllm.search.plan import Outcome


def blend(
    search: Setting,
    spec: ConnectorSpec,
    seed: int,
    network: nn.Module,
    starts: Sequence[dict[str, Tensor]],
    outcome: Outcome,
) -> ConnectorBank:
    """Every pair's best connector of those on the way from its start to what was trained.

    Args:
        search: says which shares of the way are looked at.
        spec: the connector family.
        seed: of the training, for the log.
        network: makes the trained connectors.
        starts: plain state dict that each pair was trained from, in grid order.
        outcome: of the training; looking is added to its validation bill.

    Returns:
        A bank of them. Of equal scores the larger share wins.
    """
    shares = sorted(search.config.blend, reverse=True)
    trained = all_states(network, len(starts))
    best, kept, chosen = [-1.0] * len(starts), list(trained), [1.0] * len(starts)
    with Meter(outcome.validation, search.accelerator.device):
        for share in shares:
            states = [between(start, end, share) for start, end in zip(starts, trained, strict=True)]
            bank = ConnectorBank(search.task.grid, spec, seed, states).to(search.accelerator.device)
            found = search.task.validate(bank, spec)
            outcome.validation.flops += found.flops
            for pair, score in enumerate(next(iter(found.scores.values()))):
                if score > best[pair]:
                    best[pair], kept[pair], chosen[pair] = score, states[pair], share
    search.run.log("blended", connector=spec.name, seed=seed, shares=chosen)
    return ConnectorBank(search.task.grid, spec, seed, kept).to(search.accelerator.device)


def between(start: dict[str, Tensor], end: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """`start + share (end - start)`, weight by weight; exactly `end` at 1 and `start` at 0."""
    if share in (0.0, 1.0):
        return dict(end if share else start)
    return {name: value.lerp(end[name].to(value.device), share) for name, value in start.items()}

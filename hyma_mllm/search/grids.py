"""The rivals that train a connector for each pair from its start to its end.

* `grid`: each pair's own connector, to the end; all pairs of one shape are stacked, the fastest grid there is.
* `constrained-grid`: the grid at the samples per pair that HYMA gave (C-GS).
* `random`: a random subset of the pairs, as many as the budget can train to the grid's end; the other pairs keep the
  score of their untrained connector.
"""

import torch

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.search.budget import Budget
from hyma_mllm.search.config import Method
from hyma_mllm.search.method import Found, Setting
from hyma_mllm.search.samplers import generator


def grid(search: Setting, connector: str, seed: int, budget: Budget) -> Found:
    """Every pair alone, for `search.grid_steps` or as long as the budget lasts."""
    return _train(search, "grid", connector, seed, budget, search.everything(), search.config.grid_steps)


def constrained_grid(search: Setting, connector: str, seed: int, budget: Budget) -> Found:
    """The grid at HYMA's samples per pair, or at the budget that is set."""
    steps = 0
    if not search.config.budget.given:
        assert budget.samples is not None
        steps, budget = max(1, round(budget.samples / search.config.batch)), Budget()
    return _train(search, "constrained-grid", connector, seed, budget, search.everything(), steps)


def random(search: Setting, connector: str, seed: int, budget: Budget) -> Found:
    """A random subset of the pairs, each trained for `search.grid_steps`."""
    steps = search.config.grid_steps
    members = _affordable(search, search.config.spec(connector), seed, budget)
    # What pays for no pair to the end pays for a part of one; at HYMA's cost one pair is trained whatever it costs.
    short = search.config.budget.given and len(members) == 1
    found = budget if short else Budget()
    return _train(search, "random", connector, seed, found, members, steps, at_most=steps)


def _train(
    search: Setting,
    method: Method,
    connector: str,
    seed: int,
    budget: Budget,
    members: tuple[int, ...],
    steps: int,
    at_most: int | None = None,
) -> Found:
    spec = search.config.spec(connector)
    network = search.network(method, spec, seed)
    pairs = search.pairs(members, seed)
    if budget.given and budget.seconds is None:
        steps = search.steps(budget, pairs, spec, network, search.paid(method, spec))
        steps = min(steps, at_most or steps)
    plan = search.plan(method, connector, seed, network, pairs, steps, seconds=budget.seconds)
    outcome = search.trainer(plan, network).fit()
    return search.score(method, connector, seed, network, outcome)


def _affordable(search: Setting, spec: ConnectorSpec, seed: int, budget: Budget) -> tuple[int, ...]:
    """Random pairs, as many as the budget trains to the grid's end (at least one)."""
    bank = search.network("random", spec, seed)
    price, left = search.visit_price(budget, spec, bank), search.purse(budget, search.paid("random", spec))
    chosen: list[int] = []
    for index in torch.randperm(len(search.task.grid), generator=generator(seed, 4)).tolist():
        left -= price([index]) * search.config.grid_steps
        if left < 0 and chosen:
            break
        chosen.append(index)
    return tuple(sorted(chosen))

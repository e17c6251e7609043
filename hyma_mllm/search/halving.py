"""Successive halving over the pairs: all start, and after each rung the better half goes on."""

from hyma_mllm.search.budget import Budget
from hyma_mllm.search.config import Method
from hyma_mllm.search.method import Found, Setting
from hyma_mllm.search.race import Race

RUNG = 1000.0
"""What a rung is worth in the order: more than any score, which is percent."""


def halving(search: Setting, connector: str, seed: int, budget: Budget) -> Found:
    """Train all pairs, then ever fewer, within the budget; ranked by the last rung of a pair and its score there."""
    config = search.config.halving
    race = start_race(search, "halving", connector, seed, budget, vars(config))
    race.stage(0, search.everything(), config.rungs, config.eta)
    order = [RUNG * ended + race.points[pair][-1][1] for pair, ended in enumerate(race.rungs)]
    return search.score("halving", connector, seed, race.trainer.source, race.trainer.outcome(), order)


def start_race(
    search: Setting, method: Method, connector: str, seed: int, budget: Budget, facts: dict[str, float]
) -> Race:
    """A race of fresh connectors, or the one that a checkpoint holds.

    Args:
        search: the task and the machine.
        method: its name.
        connector: family of connectors.
        seed: of initial weights and of the order of pictures and pairs.
        budget: of the race.
        facts: what must not change between a checkpoint and its resumption.
    """
    spec = search.config.spec(connector)
    network = search.network(method, spec, seed)
    pairs = search.pairs(search.everything(), seed)
    held = {"budget": vars(budget), "race": facts}
    # The race itself looks at the pairs; validation scores on the way are its own.
    plan = search.plan(method, connector, seed, network, pairs, 1, evaluate_every=0, facts=held)
    trainer = search.trainer(plan, network)
    trainer.resume()
    return Race(search, spec, seed, trainer, budget)

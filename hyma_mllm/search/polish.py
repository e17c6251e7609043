"""Generate, then polish: HYMA's best pairs are trained on alone from the connectors that were predicted for them."""

from dataclasses import replace

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.hypernetwork.network import Hypernetwork
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.budget import Budget
from hyma_mllm.search.ledger import Cost, Meter
from hyma_mllm.search.method import Setting, all_states
from hyma_mllm.search.plan import Outcome
from hyma_mllm.search.stability import StabilityConfig


def polish_price(search: Setting, spec: ConnectorSpec, budget: Budget) -> float:
    """The most that polishing may cost, in FLOPs or samples per pair of the grid: its dearest pairs are the best."""
    config, task = search.config.polish, search.task
    if budget.flops is None:
        return min(config.top, len(task.grid)) * config.steps * search.config.batch / len(task.grid)
    prices = [task.visit_flops(spec, [pair], search.config.batch) for pair in search.everything()]
    return config.price(prices)


def polish(
    search: Setting, spec: ConnectorSpec, seed: int, network: Hypernetwork | ConnectorBank, outcome: Outcome
) -> tuple[ConnectorBank, Outcome]:
    """Train the best pairs on, each alone, and keep the better of each pair's two connectors by validation score.

    Args:
        search: says how many pairs and steps.
        spec: the connector family.
        seed: of the order of pictures.
        network: the trained hypernetwork.
        outcome: of its training.

    Returns:
        A bank of every pair's connector, and the outcome of both trainings together.
    """
    config, grid = search.config, search.task.grid
    predicted = all_states(network, len(grid))
    before = ConnectorBank(grid, spec, seed, predicted).to(search.accelerator.device)
    with Meter(outcome.validation, search.accelerator.device):
        found = search.task.validate(before, spec)
    outcome.validation.flops += found.flops
    scores = next(iter(found.scores.values()))
    members = sorted(sorted(range(len(grid)), key=lambda pair: -scores[pair])[: config.polish.top])

    bank = ConnectorBank(grid, spec, seed, predicted)
    plan = search.plan(
        "hyma", spec.name, seed, bank, search.pairs(members, seed), config.polish.steps,
        optimiser=config.polish.optimiser, stability=StabilityConfig(), evaluate_every=0, paid=Cost(), stage="polish",
    )  # fmt: skip
    trainer = search.trainer(plan, bank)
    trainer.resume()
    trainer.run_leg(replace(plan.leg(), held=True))
    after = trainer.validate()
    done = trainer.outcome()
    polished = all_states(bank, len(grid))
    better = [polished[pair] if after[pair] > scores[pair] else predicted[pair] for pair in range(len(grid))]
    kept = [pair for pair in members if after[pair] > scores[pair]]
    search.run.log("polished", connector=spec.name, seed=seed, pairs=members, kept=kept)
    search.accelerator.free_memory()
    return ConnectorBank(grid, spec, seed, better).to(search.accelerator.device), _together(outcome, done)


def _together(first: Outcome, second: Outcome) -> Outcome:
    """Both trainings on one bill; samples per pair are the mean over all pairs in either."""
    visits = [a + b for a, b in zip(first.visits, second.visits, strict=True)]
    return Outcome(
        step=first.step + second.step,
        training=added(first.training, second.training, len(second.visits), sum(v > 0 for v in second.visits)),
        validation=added(first.validation, second.validation),
        skipped=first.skipped + second.skipped,
        visits=visits,
    )


def added(first: Cost, second: Cost, pairs: int = 1, of: int = 1) -> Cost:
    """Two bills as one: everything added, the higher peak.

    Args:
        first: a bill.
        second: another.
        pairs: of the grid.
        of: pairs whose mean the samples per pair of `second` are; the others saw none.
    """
    return Cost(
        samples_per_pair=first.samples_per_pair + second.samples_per_pair * of / pairs,
        steps=first.steps + second.steps,
        flops=first.flops + second.flops,
        seconds=first.seconds + second.seconds,
        peak_bytes=max(first.peak_bytes, second.peak_bytes),
    )

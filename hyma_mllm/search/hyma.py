"""The method itself: one hypernetwork learns the connectors of all pairs (HYMA, arXiv 2507.10015)."""

from dataclasses import replace

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.errors import HymaError
from hyma_mllm.hypernetwork.network import Hypernetwork
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.blend import blend
from hyma_mllm.search.budget import Budget
from hyma_mllm.search.method import Found, Setting
from hyma_mllm.search.polish import polish, polish_price


def hyma(search: Setting, connector: str, seed: int, budget: Budget) -> Found:
    """One hypernetwork, for `search.steps` or as long as the budget lasts.

    Then every pair goes back to its closed form as far as that is better, and the best pairs are polished.
    """
    config, spec = search.config, search.config.spec(connector)
    network: Hypernetwork | ConnectorBank = search.network("hyma", spec, seed)
    pairs = search.pairs(search.everything(), seed, config.sampler, config.pairs_per_visit)
    steps = config.steps
    if budget.given and budget.seconds is None:
        left = _without_polish(search, spec, budget)
        steps = search.steps(left, pairs, spec, network, search.paid("hyma", spec))
    plan = search.plan("hyma", connector, seed, network, pairs, steps, seconds=budget.seconds)
    trainer = search.trainer(plan, network)
    outcome = trainer.fit()
    if config.polish.top and config.checkpoint_every:
        # So that whoever is stopped while polishing does not train again; before anything else is on its bill.
        trainer.checkpoint()
    starts = search.starts("hyma", spec)
    if starts is not None and config.blend != [1.0]:
        network = blend(search, spec, seed, network, starts.states, outcome)
    if not config.polish.top:
        return search.score("hyma", connector, seed, network, outcome)
    search.accelerator.free_memory()
    network, outcome = polish(search, spec, seed, network, outcome)
    return search.score("hyma", connector, seed, network, outcome)


def _without_polish(search: Setting, spec: ConnectorSpec, budget: Budget) -> Budget:
    """The budget less the most that polishing may take.

    Raises:
        HymaError: polishing takes all.
    """
    top = polish_price(search, spec, budget)
    name, limit = ("flops", budget.flops) if budget.flops is not None else ("samples", budget.samples)
    assert limit is not None
    if top >= limit:
        raise HymaError(
            f"search.budget.{name} is {limit:g}, and search.polish alone takes {top:g}; raise the one, or lower "
            "search.polish.top or steps."
        )
    return replace(budget, **{name: limit - top})

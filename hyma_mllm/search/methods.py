"""Every method that ranks the pairs, behind one door: `run_method(name, ...) -> Found`.

HYMA is in `hyma`, the trained grids in `grids`, halving rivals in `halving` and `mordal`, those that train nothing
in `free`.
"""

from dataclasses import dataclass
from functools import partial

from hyma_mllm.search.budget import Budget
from hyma_mllm.search.config import AT_HYMAS_COST, Method, SearchConfig
from hyma_mllm.search.free import closed_form, similarity, unimodal
from hyma_mllm.search.grids import constrained_grid, grid, random
from hyma_mllm.search.halving import halving
from hyma_mllm.search.hyma import hyma
from hyma_mllm.search.ledger import Ledger
from hyma_mllm.search.method import Found, SearchMethod, Setting, all_connectors
from hyma_mllm.search.mordal import mordal

__all__ = ["METHODS", "Found", "Method", "Search", "SearchConfig", "SearchMethod", "all_connectors"]

METHODS: dict[Method, SearchMethod] = {
    "hyma": hyma,
    "grid": grid,
    "constrained-grid": constrained_grid,
    "random": random,
    "halving": halving,
    "mordal": mordal,
    "ridge": partial(closed_form, "ridge"),
    "whitened": partial(closed_form, "whitened"),
    "consensus": partial(closed_form, "consensus"),
    "words": partial(closed_form, "words"),
    "cka": partial(similarity, "cka"),
    "mutual-knn": partial(similarity, "mutual-knn"),
    "cca": partial(similarity, "cca"),
    "gromov-wasserstein": partial(similarity, "gromov-wasserstein"),
    "unimodal": unimodal,
}
"""Name -> method."""


@dataclass
class Search(Setting):
    """The methods of one run over one task."""

    def run_method(self, method: Method, connector: str, seed: int, hyma: Ledger | None) -> Found:
        """Score every pair by one method.

        Args:
            method: which.
            connector: family of connectors.
            seed: of initial weights and of the order of pictures and pairs.
            hyma: the hypernetwork's bill for the same family and seed, for the methods that are held to it.
        """
        return METHODS[method](self, connector, seed, self.budget_of(method, hyma))

    def budget_of(self, method: Method, hyma: Ledger | None) -> Budget:
        """What a method may spend: `search.budget`, else HYMA's cost for those that are held to it, else no limit."""
        if self.config.budget.given or method not in AT_HYMAS_COST:
            return self.config.budget
        assert hyma is not None
        paid = hyma.phases["training"]
        # A budget is above zero; each of these methods takes its first step whatever that costs.
        if method == "constrained-grid":
            return Budget(samples=max(paid.samples_per_pair, 1.0))
        return Budget(flops=max(paid.flops, 1.0))

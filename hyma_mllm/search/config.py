"""What `--search.*` says: which methods run, and how each of them trains."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.search.budget import Budget
from hyma_mllm.search.closed_form import ClosedForm, ClosedFormConfig, Start
from hyma_mllm.search.guard import GuardConfig
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.search.placement import Parallel
from hyma_mllm.search.samplers import PairSampling
from hyma_mllm.search.similarity import Measure
from hyma_mllm.search.stability import StabilityConfig

Method = Literal[
    "hyma",
    "grid",
    "constrained-grid",
    "random",
    "halving",
    "mordal",
    "ridge",
    "whitened",
    "consensus",
    "words",
    "cka",
    "mutual-knn",
    "cca",
    "gromov-wasserstein",
    "unimodal",
]

AT_HYMAS_COST = ("constrained-grid", "random", "halving", "mordal")
"""Methods that may spend what HYMA spent, where no budget is set."""

CLOSED_FORMS: tuple[Start, ...] = get_args(Start)
"""Methods whose connectors are computed and not trained."""

TRAINING_FREE = (*get_args(Measure), "unimodal")
"""Methods that rank the pairs without any connector."""

FEATURES_NEEDED = ("mordal", *get_args(ClosedForm), *TRAINING_FREE)
"""Methods that read stored features of both sides, which only the contrastive search has."""


@dataclass
class HalvingConfig:
    """Successive halving (Jamieson and Talwalkar, arXiv 1502.07943, section 3): the method `halving`.

    Attributes:
        eta: after each rung one in `eta` pairs goes on, rounded up.
        rungs: how often the pairs are compared; each rung gets the same share of the budget.
    """

    eta: float = 2.0
    rungs: int = 4

    def __post_init__(self) -> None:
        if self.eta <= 1:
            raise HymaError(f"search.halving.eta is {self.eta}; it takes more than 1, 2 for the better half.")
        if self.rungs < 1:
            raise HymaError(f"search.halving.rungs is {self.rungs}; it takes at least 1.")


@dataclass
class MordalConfig:
    """Clusters first, then halving among the best clusters' pairs (Mordal, arXiv 2502.00241): the method `mordal`.

    Attributes:
        threshold: models whose CKA is above this, on average, share a cluster.
        clusters: of each side instead of a threshold; 0 for the threshold.
        share: of the budget that goes to the pairs of medoids.
        keep: share of the pairs of clusters whose members are trained then, rounded up.
        eta: of the halving in both stages, as in `halving`.
        rungs: of each stage.
        looks: validation scores taken in each rung, from which the end score of a stopped pair is extrapolated.
    """

    threshold: float = 0.7
    clusters: int = 0
    share: float = 0.5
    keep: float = 0.25
    eta: float = 2.0
    rungs: int = 2
    looks: int = 3

    def __post_init__(self) -> None:
        for name, value, low in (("clusters", self.clusters, 0), ("rungs", self.rungs, 1), ("looks", self.looks, 1)):
            if value < low:
                raise HymaError(f"search.mordal.{name} is {value}; it takes at least {low}.")
        for name, share in (("threshold", self.threshold), ("share", self.share), ("keep", self.keep)):
            if not 0 < share < 1:
                raise HymaError(f"search.mordal.{name} is {share}; it takes a number between 0 and 1.")
        if self.eta <= 1:
            raise HymaError(f"search.mordal.eta is {self.eta}; it takes more than 1, 2 for the better half.")


@dataclass
class PolishConfig:
    """Generate, then polish: HYMA's best pairs are trained on, each alone.

    Attributes:
        top: pairs, the best by validation score; 0 for none.
        steps: optimiser steps of each.
        optimiser: of these steps.
    """

    top: int = 0
    steps: int = 100
    optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(lr=1e-3))

    def __post_init__(self) -> None:
        if self.top < 0:
            raise HymaError(f"search.polish.top is {self.top}; write a number of pairs, or 0 for none.")
        if self.steps < 1:
            raise HymaError(f"search.polish.steps is {self.steps}; it takes at least 1.")

    def price(self, visits: Iterable[float]) -> float:
        """The most that it may cost, by what a visit of each pair costs: the dearest pairs may be the best."""
        return sum(sorted(visits, reverse=True)[: self.top]) * self.steps


@dataclass
class SearchConfig:
    """How the pairs are searched.

    Attributes:
        methods: what to run; some rivals read HYMA's cost, so `hyma` comes first whatever the order here.
        connectors: families of connectors: `linear`, `mlp1`, `mlp2`, ...
        hidden: width of an MLP connector's hidden layers.
        activation: of an MLP connector, `relu` or `gelu`.
        seeds: one training per seed, method and family.
        steps: optimiser steps of the hypernetwork.
        grid_steps: optimiser steps of each pair in the grid.
        budget: what every training may spend, instead of `steps`, `grid_steps` and HYMA's cost.
        batch: pictures of a visit, over all processes (B_d); the same for every method.
        pairs_per_visit: pairs of a visit (B_m); 0 takes a quarter of them for the sampler `round`, else all.
        parallel: how several processes share the work: `data`, each takes its share of every batch; `pairs`, each
            takes the pairs of its own LLMs, and holds no others in memory (recipes/mllm.py, sampler `fair`).
        groups: with `pairs`, groups of processes; those of a group hold the same LLMs and share every batch. 0 for as
            many as the LLMs can fill and the processes divide into evenly.
        sampler: order of the pairs: `fair` (every optimiser step visits every pair), `round` (a round of optimiser
            steps does), `random` or `cyclic`.
        optimiser: of the hypernetwork.
        rival_optimiser: of the independent connectors.
        warm_start: what the rivals' connectors start from: `none` (at random), or a closed form, which is on their
            bill: `consensus`, `whitened` or `ridge` between encoders, `words` into LLMs.
        closed_form: of the hypernetwork's base `closed_form`; a strength that is given is also that of `warm_start` and
            of the methods that are closed forms.
        blend: shares of the way from a closed form to what HYMA trained from it; each pair takes the one with the best
            validation score. `[1]` takes what was trained. Of no account where HYMA starts from no closed form.
        halving: of the method `halving`.
        mordal: of the method `mordal`.
        polish: of HYMA's best pairs.
        similarity_rows: training pictures that training-free measures read, at most.
        guard: limits of the non-finite guard.
        stability: early stop of the hypernetwork when the order of the pairs has settled.
        evaluate_every: optimiser steps between validation scores; 0 for none.
        checkpoint_every: optimiser steps between checkpoints, which are also what the guard rolls back to; 0 for none,
            and then a roll-back returns to the start of this process.
    """

    methods: list[Method] = field(default_factory=lambda: ["hyma", "grid", "constrained-grid", "random"])
    connectors: list[str] = field(default_factory=lambda: ["linear", "mlp1"])
    hidden: int = 1024
    activation: Literal["relu", "gelu"] = "relu"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    steps: int = 40
    grid_steps: int = 200
    budget: Budget = field(default_factory=Budget)
    batch: int = 256
    pairs_per_visit: int = 0
    parallel: Parallel = "data"
    groups: int = 0
    sampler: PairSampling = "fair"
    optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(lr=3e-3))
    rival_optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(lr=3e-3))
    warm_start: Literal["none", "ridge", "whitened", "consensus", "words"] = "none"
    closed_form: ClosedFormConfig = field(default_factory=ClosedFormConfig)
    blend: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0])
    halving: HalvingConfig = field(default_factory=HalvingConfig)
    mordal: MordalConfig = field(default_factory=MordalConfig)
    polish: PolishConfig = field(default_factory=PolishConfig)
    similarity_rows: int = 2000
    guard: GuardConfig = field(default_factory=GuardConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    evaluate_every: int = 20
    checkpoint_every: int = 20

    def __post_init__(self) -> None:
        if not self.seeds or not self.connectors or not self.methods:
            raise HymaError("search.seeds, search.connectors and search.methods each need at least one entry.")
        for method in self.methods:
            if method not in get_args(Method):
                raise HymaError(f"There is no method {method}; {near_names(method, get_args(Method))}")
        self._check_budget()
        for name, value, low in (
            ("steps", self.steps, 1),
            ("grid_steps", self.grid_steps, 1),
            ("similarity_rows", self.similarity_rows, 2),
            ("groups", self.groups, 0),
        ):
            if value < low:
                raise HymaError(f"search.{name} is {value}; it takes at least {low}.")
        if not self.blend or not all(0 <= share <= 1 for share in self.blend):
            raise HymaError(f"search.blend is {self.blend}; list shares between 0 and 1, [1] to keep what was trained.")
        if set(self.methods) <= set(TRAINING_FREE):
            raise HymaError(
                "search.methods lists training-free methods only, which score no task; add hyma, grid or whitened."
            )
        if self.parallel == "pairs" and self.sampler != "fair":
            raise HymaError(
                f"search.parallel is pairs and search.sampler is {self.sampler}, whose steps leave processes "
                "without a pair; set search.sampler to fair."
            )
        for name in self.connectors:
            self.spec(name)

    def _check_budget(self) -> None:
        if "hyma" not in self.methods and not self.budget.given and set(AT_HYMAS_COST) & set(self.methods):
            raise HymaError(
                "search.methods lists a rival that is measured at HYMA's cost; list hyma too, or set search.budget."
            )
        if self.budget.seconds is not None and "random" in self.methods:
            raise HymaError(
                "search.methods lists random, which must know beforehand how many pairs it can train; "
                "set search.budget.flops or samples instead of seconds."
            )
        if self.budget.seconds is not None and self.polish.top:
            raise HymaError(
                "search.polish takes a part of the budget that is known beforehand; "
                "set search.budget.flops or samples instead of seconds, or search.polish.top to 0."
            )

    def spec(self, name: str) -> ConnectorSpec:
        """The connector family of this name."""
        return ConnectorSpec.named(name, hidden=self.hidden, activation=self.activation)

    def ordered_methods(self) -> list[Method]:
        """The methods, `hyma` first."""
        return sorted(self.methods, key=lambda method: method != "hyma")

    def handed_over(self) -> Method:
        """The method whose best pair becomes a model: `hyma`, else the first that makes connectors."""
        return next(method for method in self.ordered_methods() if method not in TRAINING_FREE)

    def check_causal(self, hypernetwork_base: str | None) -> None:
        """Refuse what an MLLM search cannot do, for it has no stored features of an LLM.

        Raises:
            HymaError: a method, a warm start or a base needs them.
        """
        chosen = [method for method in self.methods if method in FEATURES_NEEDED]
        if chosen:
            raise HymaError(
                f"search.methods lists {chosen[0]}, which compares stored features of both sides, and an LLM has none; "
                "take it out, or search with recipes/vlm.py."
            )
        for key, given in self._starts(hypernetwork_base):
            if given != "words":
                raise HymaError(
                    f"{key} is {given}, which joins two encoders; set it to words, the closed form of towers and LLMs."
                )

    def check_contrastive(self, hypernetwork_base: str | None) -> None:
        """Refuse what a search over encoders cannot do, for it has no LLM whose words could be read.

        Raises:
            HymaError: a method, a warm start or a base needs them.
        """
        if "words" in self.methods:
            raise HymaError(
                "search.methods lists words, which joins vision towers to LLMs; take consensus, or search with "
                "recipes/mllm.py."
            )
        for key, given in self._starts(hypernetwork_base):
            if given == "words":
                raise HymaError(f"{key} is words, which joins vision towers to LLMs; set it to consensus or whitened.")

    def _starts(self, hypernetwork_base: str | None) -> list[tuple[str, str]]:
        """Keys that name a closed form that would be used, with what they say."""
        found: list[tuple[str, str]] = [("search.warm_start", self.warm_start)] if self.warm_start != "none" else []
        if hypernetwork_base == "closed_form" and "hyma" in self.methods:
            found.append(("search.closed_form.kind", self.closed_form.kind))
        return found

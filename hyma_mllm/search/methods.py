"""Every method that ranks the pairs, behind one door: `run(method, ...) -> (Ranking, Ledger, connectors)`.

* `hyma`: one hypernetwork for all pairs.
* `grid`: each pair's own connector, to the end; all pairs of one shape are stacked, the fastest grid there is.
* `constrained-grid`: the grid at the samples per pair that HYMA gave (C-GS).
* `random`: a random subset of the pairs, as many as HYMA's FLOPs can train to the grid's end; the other pairs keep
  the score of their untrained connector.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.errors import HymaError
from hyma_mllm.hypernetwork.network import Hypernetwork
from hyma_mllm.hypernetwork.presets import HypernetworkConfig
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.search import flops
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.guard import GuardConfig
from hyma_mllm.search.interrupt import StopRequest
from hyma_mllm.search.ledger import Cost, Ledger, Meter
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.search.pair_loss import PairLoss, SearchTask
from hyma_mllm.search.placement import ALONE, Parallel, Placement
from hyma_mllm.search.ranking import Ranking
from hyma_mllm.search.samplers import BatchSampler, PairSampler, PairSampling, generator
from hyma_mllm.search.stability import StabilityConfig
from hyma_mllm.search.trainer import Outcome, Plan, Trainer

Method = Literal["hyma", "grid", "constrained-grid", "random"]


@dataclass
class SearchConfig:
    """How the pairs are searched.

    Attributes:
        methods: what to run; the rivals read HYMA's cost, so `hyma` comes first whatever the order here.
        connectors: families of connectors: `linear`, `mlp1`, `mlp2`, ...
        hidden: width of an MLP connector's hidden layers.
        activation: of an MLP connector, `relu` or `gelu`.
        seeds: one training per seed, method and family.
        steps: optimiser steps of the hypernetwork.
        grid_steps: optimiser steps of each pair in the grid.
        batch: pictures of a visit, over all processes (B_d); the same for every method.
        pairs_per_visit: pairs of a visit (B_m); 0 takes a quarter of them for the sampler `round`, else all.
        parallel: how several processes share the work: `data`, each takes its share of every batch; `pairs`, each
            takes the pairs of its own LLMs, and holds no others in memory (recipes/mllm.py, sampler `fair`).
        sampler: order of the pairs: `fair` (every optimiser step visits every pair), `round` (a round of optimiser
            steps does), `random` or `cyclic`.
        optimiser: of the hypernetwork.
        rival_optimiser: of the independent connectors.
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
    batch: int = 256
    pairs_per_visit: int = 0
    parallel: Parallel = "data"
    sampler: PairSampling = "fair"
    optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(lr=3e-3))
    rival_optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(lr=3e-3))
    guard: GuardConfig = field(default_factory=GuardConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    evaluate_every: int = 20
    checkpoint_every: int = 20

    def __post_init__(self) -> None:
        if "hyma" not in self.methods and {"constrained-grid", "random"} & set(self.methods):
            raise HymaError("search.methods lists a rival that is measured at HYMA's cost; list hyma too.")
        for name, value in (("steps", self.steps), ("grid_steps", self.grid_steps)):
            if value < 1:
                raise HymaError(f"search.{name} is {value}; it takes at least 1.")
        if self.parallel == "pairs" and self.sampler != "fair":
            raise HymaError(
                f"search.parallel is pairs and search.sampler is {self.sampler}, whose steps leave processes "
                "without a pair; set search.sampler to fair."
            )
        if not self.seeds or not self.connectors or not self.methods:
            raise HymaError("search.seeds, search.connectors and search.methods each need at least one entry.")
        for name in self.connectors:
            self.spec(name)

    def spec(self, name: str) -> ConnectorSpec:
        """The connector family of this name."""
        return ConnectorSpec.named(name, hidden=self.hidden, activation=self.activation)

    def ordered_methods(self) -> list[Method]:
        """The methods, `hyma` first."""
        return sorted(self.methods, key=lambda method: method != "hyma")


@dataclass
class Found:
    """What one method came to.

    Attributes:
        ranking: scores of every pair.
        ledger: what they cost.
        outcome: of the training.
        network: makes every pair's connector.
    """

    ranking: Ranking
    ledger: Ledger
    outcome: Outcome
    network: nn.Module


@dataclass
class Search:
    """The methods of one run over one task.

    Attributes:
        config: how to search.
        hypernetwork: what predicts the connectors.
        objective: builds the loss.
        task: frozen models and their data.
        vision_means, text_means: mean feature [width] of each model, for the condition `features`.
        accelerator: device, processes, precision.
        run: the run directory.
        stop: set by a signal.
        placement: which process works on which pairs.
    """

    config: SearchConfig
    hypernetwork: HypernetworkConfig
    objective: Callable[[], nn.Module]
    task: SearchTask
    vision_means: Sequence[Tensor] | None
    text_means: Sequence[Tensor] | None
    accelerator: Accelerator
    run: RunDirectory
    stop: StopRequest
    placement: Placement = ALONE

    def run_method(self, method: Method, connector: str, seed: int, hyma: Ledger | None) -> Found:
        """Train and score every pair by one method.

        Args:
            method: which.
            connector: family of connectors.
            seed: of initial weights and of the order of pictures and pairs.
            hyma: the hypernetwork's bill for the same family and seed, for the methods that are held to it.
        """
        spec, task = self.config.spec(connector), self.task
        network = self.network(method, spec, seed)
        plan = self._plan(method, spec, seed, network, hyma)
        model = PairLoss(network, self.objective(), task, spec)
        outcome = Trainer(plan, model, task, self.accelerator, self.run, self.stop).fit()
        source = self.accelerator.unwrap_model(model).network
        evaluation = outcome.validation
        with Meter(evaluation, self.accelerator.device):
            found = task.evaluate(source, spec)
        evaluation.flops += found.flops
        ranking = Ranking(method, connector, seed, found.scores, found.details)
        ledger = Ledger(
            method, connector, seed, {"training": outcome.training, "evaluation": evaluation}, plan.batches.size
        )
        self.accelerator.free_memory()
        return Found(ranking, ledger, outcome, source)

    def network(self, method: Method, spec: ConnectorSpec, seed: int) -> Hypernetwork | ConnectorBank:
        """What makes the connectors of this method, untrained."""
        if method != "hyma":
            return ConnectorBank(self.task.grid, spec, seed)
        return Hypernetwork(
            self.task.grid,
            spec,
            self.hypernetwork,
            self.vision_means,
            self.text_means,
            seed,
        )

    def _plan(self, method: Method, spec: ConnectorSpec, seed: int, network: nn.Module, hyma: Ledger | None) -> Plan:
        config, task = self.config, self.task
        everything = tuple(range(len(task.grid)))
        members: Sequence[int] = everything
        steps, per_visit = config.grid_steps, 0
        sampling: PairSampling = "fair"
        if method == "hyma":
            steps, per_visit, sampling = config.steps, config.pairs_per_visit, config.sampler
        elif method != "grid":
            assert hyma is not None
            paid = hyma.phases["training"]
            if method == "constrained-grid":
                steps = max(1, round(paid.samples_per_pair / config.batch))
            else:
                members = self._affordable(spec, seed, paid)
        of_hyma = isinstance(network, Hypernetwork)
        return Plan(
            method=method,
            connector=spec.name,
            seed=seed,
            steps=steps,
            pairs=PairSampler(tuple(members), per_visit, sampling, seed, task.visit_groups()),
            batches=BatchSampler(task.train, config.batch, seed),
            optimiser=config.optimiser if of_hyma else config.rival_optimiser,
            guard=config.guard,
            stability=config.stability if of_hyma else StabilityConfig(),
            evaluate_every=config.evaluate_every,
            checkpoint_every=config.checkpoint_every,
            placement=self.placement,
            visit_flops=partial(flops.hypernetwork_step_flops, network)
            if isinstance(network, Hypernetwork)
            else lambda pairs: 0.0,
        )

    def _affordable(self, spec: ConnectorSpec, seed: int, budget: Cost) -> list[int]:
        """Random pairs, as many as these FLOPs train to the grid's end (at least one)."""
        task, left = self.task, budget.flops
        chosen: list[int] = []
        order = torch.randperm(len(task.grid), generator=generator(seed, 4)).tolist()
        for index in order:
            left -= task.visit_flops(spec, [index], self.config.batch) * self.config.grid_steps
            if left < 0 and chosen:
                break
            chosen.append(index)
        return sorted(chosen)


def all_connectors(network: nn.Module, pairs: int) -> dict[str, Tensor]:
    """Every pair's plain weights under `<pair index>.<name>`, on the CPU, to be written to one file."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for index in range(pairs):
            for group in network([index]):
                for name, value in group.params.items():
                    found[f"{index}.{name}"] = value[0].detach().cpu().contiguous().clone()
    return found

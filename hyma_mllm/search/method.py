"""What every method is given and gives back: `run(search, connector, seed, budget) -> Found`."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.hypernetwork.network import Hypernetwork
from hyma_mllm.hypernetwork.presets import HypernetworkConfig, parts
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.search import flops
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.budget import Budget, period, steps_within
from hyma_mllm.search.closed_form import Start
from hyma_mllm.search.config import CLOSED_FORMS, Method, SearchConfig
from hyma_mllm.search.interrupt import StopRequest
from hyma_mllm.search.ledger import Cost, Ledger, Meter
from hyma_mllm.search.pair_loss import ConnectorSource, PairLoss, SearchTask
from hyma_mllm.search.placement import ALONE, Placement
from hyma_mllm.search.plan import Outcome, Plan
from hyma_mllm.search.ranking import Ranking
from hyma_mllm.search.samplers import BatchSampler, PairSampler, PairSampling
from hyma_mllm.search.stability import StabilityConfig
from hyma_mllm.search.starts import Starts, closed_starts
from hyma_mllm.search.trainer import Trainer


@dataclass
class Found:
    """What one method came to.

    Attributes:
        ranking: scores of every pair.
        ledger: what they cost.
        outcome: of the training; of a method that trains nothing, an empty one.
        network: makes every pair's connector; None for a method that has none.
    """

    ranking: Ranking
    ledger: Ledger
    outcome: Outcome
    network: nn.Module | None


@dataclass
class Setting:
    """Where methods work: one task, its frozen models, and the machine.

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
        labels: [rows of the task] int64, class of each picture, -1 for none; None where no picture has one.
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
    labels: Tensor | None = None
    _starts: dict[tuple[Start, str], Starts] = field(default_factory=dict, init=False, repr=False)

    def network(self, method: Method, spec: ConnectorSpec, seed: int) -> Hypernetwork | ConnectorBank:
        """What makes the connectors of this method, untrained."""
        starts = self.starts(method, spec)
        states = None if starts is None else starts.states
        if method != "hyma":
            return ConnectorBank(self.task.grid, spec, seed, states)
        means = self.vision_means, self.text_means
        return Hypernetwork(self.task.grid, spec, self.hypernetwork, *means, seed, starts=states)

    def starts(self, method: Method, spec: ConnectorSpec) -> Starts | None:
        """The closed-form connectors that a method starts from, computed once; None where it starts at random."""
        config, kind = self.config, self.config.closed_form.kind
        if method == "hyma":
            if parts(self.hypernetwork, spec.depth).base != "closed_form":
                return None
        elif method in CLOSED_FORMS:
            kind = method
        elif config.warm_start == "none":
            return None
        else:
            kind = config.warm_start
        key = (kind, spec.name)
        if key not in self._starts:
            self._starts[key] = closed_starts(
                self.task, spec, kind, config.closed_form.strength_of(kind), self.accelerator
            )
        return self._starts[key]

    def paid(self, method: Method, spec: ConnectorSpec) -> Cost:
        """What a method's connectors cost before their first step."""
        starts = self.starts(method, spec)
        return Cost() if starts is None else Cost(**asdict(starts.cost))

    def everything(self) -> tuple[int, ...]:
        """The indices of all pairs."""
        return tuple(range(len(self.task.grid)))

    def pairs(self, members: Sequence[int], seed: int, kind: PairSampling = "fair", per_visit: int = 0) -> PairSampler:
        """The order in which these pairs are visited."""
        return PairSampler(tuple(members), per_visit, kind, seed, self.task.visit_groups())

    def plan(
        self,
        method: Method,
        connector: str,
        seed: int,
        network: nn.Module,
        pairs: PairSampler,
        steps: int,
        **more: object,
    ) -> Plan:
        """The training of a network with everything that the configuration says of it.

        Args:
            method: its name.
            connector: family of connectors.
            seed: of the order of pictures and pairs.
            network: a hypernetwork or a bank.
            pairs: sampler of the pairs.
            steps: optimiser steps.
            more: further fields of `Plan`.
        """
        config = self.config
        of_hyma = isinstance(network, Hypernetwork)
        values: dict[str, object] = {
            "optimiser": config.optimiser if of_hyma else config.rival_optimiser,
            "stability": config.stability if of_hyma else StabilityConfig(),
            "evaluate_every": config.evaluate_every,
            "checkpoint_every": config.checkpoint_every,
            "paid": self.paid(method, config.spec(connector)),
            "visit_flops": own_flops(network),
        }
        return Plan(
            method=method,
            connector=connector,
            seed=seed,
            steps=steps,
            pairs=pairs,
            batches=BatchSampler(self.task.train, config.batch, seed),
            guard=config.guard,
            placement=self.placement,
            **(values | more),  # type: ignore[arg-type]
        )

    def trainer(self, plan: Plan, network: nn.Module) -> Trainer:
        """What carries out a plan."""
        spec = self.config.spec(plan.connector)
        model = PairLoss(network, self.objective(), self.task, spec)
        return Trainer(plan, model, self.task, self.accelerator, self.run, self.stop)

    def visit_price(self, budget: Budget, spec: ConnectorSpec, network: nn.Module) -> Callable[[Sequence[int]], float]:
        """What a visit of some pairs costs in the unit of the budget: FLOPs, or visits of a pair."""
        if budget.flops is None:
            return lambda pairs: float(len(pairs))
        own = own_flops(network)
        return lambda pairs: self.task.visit_flops(spec, pairs, self.config.batch) + own(pairs)

    def purse(self, budget: Budget, paid: Cost) -> float:
        """What a budget of FLOPs or samples leaves for the steps, in the unit of `visit_price`."""
        if budget.flops is not None:
            return budget.flops - paid.flops
        assert budget.samples is not None
        return (budget.samples - paid.samples_per_pair) * len(self.task.grid) / self.config.batch

    def steps(self, budget: Budget, pairs: PairSampler, spec: ConnectorSpec, network: nn.Module, paid: Cost) -> int:
        """Optimiser steps that a budget of FLOPs or samples buys; at least one, which the log says if it costs more.

        Args:
            budget: with a limit of FLOPs or samples.
            pairs: which pairs each step visits.
            spec: the connector family.
            network: what makes the connectors.
            paid: what was spent on them before.
        """
        price = self.visit_price(budget, spec, network)
        apart = self.placement.owners is not None  # pair-parallel work bills each pair for itself

        def cost(step: int) -> float:
            visits = pairs.visits(step)
            return sum(price([pair]) for visit in visits for pair in visit) if apart else sum(map(price, visits))

        found = steps_within(self.purse(budget, paid), cost, period(pairs))
        if found < 1:
            self.say_overdrawn(spec.name)
        return max(1, found)

    def say_overdrawn(self, connector: str) -> None:
        """Say in the log that one step costs more than there is."""
        sentence = f"search.budget pays for no step of a {connector} training; one is taken all the same."
        self.accelerator.print(sentence)
        self.run.log("budget", connector=connector, reason=sentence)

    def score(
        self,
        method: Method,
        connector: str,
        seed: int,
        source: nn.Module,
        outcome: Outcome,
        order_by: list[float] | None = None,
    ) -> Found:
        """Score every pair on everything held out, and write the bill.

        Args:
            method: of the ranking.
            connector: of the ranking.
            seed: of the ranking.
            source: makes every pair's connector.
            outcome: of its training.
            order_by: what the method ranks by, [pairs], where that is not the first task's score.
        """
        evaluation = outcome.validation
        with Meter(evaluation, self.accelerator.device):
            found = self.task.evaluate(as_source(source), self.config.spec(connector))
        evaluation.flops += found.flops
        ranking = Ranking(method, connector, seed, found.scores, found.details, order_by)
        batch = self.config.batch if outcome.step else 0
        ledger = Ledger(method, connector, seed, {"training": outcome.training, "evaluation": evaluation}, batch)
        self.accelerator.free_memory()
        return Found(ranking, ledger, outcome, source)


class SearchMethod(Protocol):
    """A way to rank all pairs."""

    def __call__(self, search: Setting, connector: str, seed: int, budget: Budget) -> Found:
        """Rank all pairs.

        Args:
            search: the task and the machine.
            connector: family of connectors.
            seed: of initial weights and of the order of pictures and pairs.
            budget: what the training may spend; none where the configuration's steps hold.
        """


def own_flops(network: nn.Module) -> Callable[[Sequence[int]], float]:
    """FLOPs of a source of connectors in one visit of some pairs: a hypernetwork's own work, nothing for a bank."""
    if isinstance(network, Hypernetwork):
        return partial(flops.hypernetwork_step_flops, network.grid, network.spec, network.config)
    return _nothing


def _nothing(pairs: Sequence[int]) -> float:
    return 0.0


def as_source(network: nn.Module) -> ConnectorSource:
    """The network as what a task scores."""
    assert isinstance(network, Hypernetwork | ConnectorBank)
    return network


def all_states(network: nn.Module, pairs: int) -> list[dict[str, Tensor]]:
    """Every pair's plain state dict, on the CPU."""
    found: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for index in range(pairs):
            (group,) = as_source(network)([index])
            found.append({name: value[0].detach().cpu().contiguous().clone() for name, value in group.params.items()})
    return found


def all_connectors(network: nn.Module, pairs: int) -> dict[str, Tensor]:
    """Every pair's plain weights under `<pair index>.<name>`, on the CPU, to be written to one file."""
    return {
        f"{index}.{name}": value
        for index, state in enumerate(all_states(network, pairs))
        for name, value in state.items()
    }

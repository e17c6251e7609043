"""Where `unseen.py` runs: the task and its parts, what is computed once, and a training of anything on some samples."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.hypernetwork.newcomer import Side
from hyma_mllm.search.closed_form import ClosedForm, ClosedFormConfig, closed_forms, training_start
from hyma_mllm.search.methods import Search
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.search.samplers import PairSampling
from hyma_mllm.search.similarity import views, within
from hyma_mllm.search.task import VLMTask
from hyma_mllm.search.unseen import subtask

LINEAR = ConnectorSpec(depth=0)
BATCH = 128
SIMILARITY_ROWS = 1000
"""Rows by which the trained model that a newcomer is most like is found (CKA)."""


PLAIN = {"preset": "default", "base": None}
"""Of a search that is asked for a plan alone: it computes no closed forms of its own."""


@dataclass(frozen=True)
class Recipe:
    """A training.

    Attributes:
        steps: optimiser steps.
        lr: peak learning rate.
        sampler: of the pairs.
    """

    steps: int
    lr: float
    sampler: PairSampling = "fair"


def recipe_for(samples: int, recipes: Mapping[int, Recipe]) -> Recipe:
    """That of the nearest number of samples, in their ratio."""
    return recipes[min(recipes, key=lambda known: abs(math.log(known / samples)))]


def free(pairs: Sequence[int]) -> float:
    """FLOPs of a source of connectors that computes nothing."""
    return 0.0


@dataclass
class Ground:
    """Where everything runs.

    Attributes:
        make: builds a search of the whole grid, as `fidelity.Bench` does.
        task: the whole grid's.
        means: per side the mean feature of each model.
        likeness: per side the CKA of each model with each.
        starts: of every pair the closed form of all training samples that a hypernetwork starts from.
    """

    make: Callable[..., Search]
    task: VLMTask
    means: dict[Side, Sequence[Tensor]]
    likeness: dict[Side, Tensor]
    starts: list[dict[str, Tensor]]
    _forms: dict[tuple[int, int], tuple[list[dict[str, Tensor]], float]] = field(default_factory=dict)

    def rows(self, samples: int, seed: int) -> Tensor:
        """The training pictures that are the samples, [samples] int64; 0 takes all."""
        if not samples:
            return self.task.train
        drawn = torch.randperm(len(self.task.train), generator=torch.Generator().manual_seed(seed))
        return self.task.train[drawn[:samples]]

    def models(self, side: Side) -> int:
        """How many there are."""
        return len(self.task.grid.vision_ids if side == "vision" else self.task.grid.text_ids)

    def pairs(self, side: Side, number: int) -> list[int]:
        """The pairs of a model, partner by partner."""
        return [pair.index for pair in self.task.grid.pairs()
                if (pair.vision if side == "vision" else pair.text) == number]  # fmt: skip

    def part(self, side: Side, numbers: Sequence[int]) -> VLMTask:
        """The task of some models of a side with all of the other."""
        if side == "vision":
            return subtask(self.task, numbers, range(self.models("text")))
        return subtask(self.task, range(self.models("vision")), numbers)

    def forms(self, samples: int, seed: int, strength: float) -> tuple[list[dict[str, Tensor]], float]:
        """Whitened forms of every pair from the samples, ready to be trained on, and their FLOPs; the last are kept."""
        key = (samples, seed)
        if key not in self._forms:
            if len(self._forms) > 3:
                self._forms.clear()
            self._forms[key] = form(self, "whitened", samples, seed, strength)
        return self._forms[key]


def form(
    ground: Ground, kind: ClosedForm, samples: int, seed: int, strength: float
) -> tuple[list[dict[str, Tensor]], float]:
    """Closed forms of every pair from the samples alone, and their FLOPs."""
    task = replace(ground.task, train=ground.rows(samples, seed))
    found = closed_forms(task, ClosedFormConfig(kind, strength))
    return [training_start(state, LINEAR) for state in found.states], found.flops


def fit(
    ground: Ground, task: VLMTask, network: nn.Module, recipe: Recipe, seed: int,
    visit_flops: Callable[[Sequence[int]], float],
) -> float:  # fmt: skip
    """Train on the task's training pictures; the FLOPs."""
    search = replace(ground.make({"batch": min(BATCH, len(task.train))}, None, PLAIN), task=task)
    pairs = search.pairs(search.everything(), seed, recipe.sampler)
    plan = search.plan(
        "grid", "linear", seed, network, pairs, recipe.steps, optimiser=OptimiserConfig(lr=recipe.lr),
        visit_flops=visit_flops,
    )  # fmt: skip
    outcome = search.trainer(plan, network).fit()
    search.accelerator.free_memory()
    return outcome.training.flops


def scored(network: nn.Module, task: VLMTask) -> list[float]:
    """Test score of each pair, percent."""
    with torch.no_grad():
        return task.scores(network, LINEAR, task.test)["retrieval"]


def ground_of(make: Callable[..., Search]) -> Ground:
    """Everything that is computed once: likeness of the models, closed forms of all samples."""
    search = make({}, None, PLAIN)
    task = search.task
    assert isinstance(task, VLMTask) and search.vision_means is not None and search.text_means is not None
    seen = views(task, SIMILARITY_ROWS, 0)
    likeness: dict[Side, Tensor] = {"vision": within("cka", seen.vision)[0], "text": within("cka", seen.text)[0]}
    means: dict[Side, Sequence[Tensor]] = {"vision": search.vision_means, "text": search.text_means}
    ground = Ground(make, task, means, likeness, [])
    ground.starts, _ = form(ground, "whitened", 0, 0, search.config.closed_form.strength_of("whitened"))
    return ground


def cell(method: str, samples: int | Literal["0"], scores: Sequence[float], flops: float) -> dict[str, Any]:
    """One entry of the result; samples "0" is none, 0 is all."""
    return {"method": method, "samples": samples, "scores": list(scores), "flops": flops}

"""Other orders of the pairs from one training of HYMA: ideas that have a row among the ablations of `fidelity.py`."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import scipy.stats
from sklearn.linear_model import Ridge

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.pairs import PairGrid
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.config import PolishConfig
from hyma_mllm.search.ledger import Cost, Meter
from hyma_mllm.search.method import Found, all_states
from hyma_mllm.search.methods import Search
from hyma_mllm.search.pair_loss import ConnectorSource, Scored, SearchTask
from hyma_mllm.search.similarity import pair_scores, views
from hyma_mllm.search.stability import StabilityConfig
from hyma_mllm.search.starts import contrastive
from hyma_mllm.search.unimodal import standardised

Order = Literal["own", "gain over blind", "loss", "loss gain", "checkpoints", "landmarks", "prior"]

PRIOR_ROWS = 1000
PRIOR_WEIGHT = 0.2
"""Of the mutual nearest neighbours in the order; the test score has the rest. Chosen on split 1."""

READINGS: dict[str, Callable[[dict[str, Any]], list[float]]] = {
    "gain over blind": lambda run: [score - blind for score, blind in zip(run["test"], run["blind"], strict=True)],
    "loss": lambda run: [-loss for loss in run["loss"]],
    "loss gain": lambda run: [blind - loss for loss, blind in zip(run["loss"], run["blind loss"], strict=True)],
}
"""Orders that a finished training's record holds; the others need more work while it is there."""


def watched(task: SearchTask) -> tuple[SearchTask, list[list[float]]]:
    """The same task, and a list that takes the test scores [pairs] of every look at its validation split."""
    seen: list[list[float]] = []
    copied = copy.copy(task)

    def validate(source: ConnectorSource, spec: ConnectorSpec) -> Scored:
        found = task.evaluate(source, spec)
        seen.append(next(iter(found.scores.values())))
        return task.validate(source, spec)

    copied.validate = validate  # type: ignore[method-assign]
    return copied, seen


def averaged(seen: Sequence[Sequence[float]]) -> list[float]:
    """Mean place of each pair over the later half of the looks, higher is better."""
    later = seen[len(seen) // 2 :]
    found: list[float] = np.mean([scipy.stats.rankdata(scores) for scores in later], axis=0).tolist()
    return found


def diagonal(grid: PairGrid) -> list[int]:
    """A few pairs in which every model of both shelves occurs."""
    vision, text = len(grid.vision_ids), len(grid.text_ids)
    return sorted({(k % vision) * text + k % text for k in range(max(vision, text))})


def calibrated(grid: PairGrid, scores: Sequence[float], members: Sequence[int], after: Sequence[float]) -> list[float]:
    """Scores [pairs] plus what training alone would gain them, told by the members' gains.

    A gain is taken as a sum of a part of each model (ridge regression, strength 1); a member's own score is `after`.
    """
    models = np.zeros((len(grid), len(grid.vision_ids) + len(grid.text_ids)))
    for pair in grid.pairs():
        models[pair.index, pair.vision] = models[pair.index, len(grid.vision_ids) + pair.text] = 1
    gains = [after[pair] - scores[pair] for pair in members]
    told = Ridge(alpha=1.0).fit(models[list(members)], gains).predict(models)
    known = set(members)
    return [after[k] if k in known else float(score + told[k]) for k, score in enumerate(scores)]


def by_landmarks(
    search: Search, connector: str, seed: int, found: Found, how: PolishConfig
) -> tuple[list[float], Cost]:
    """The order that a few pairs calibrate, each trained on alone, and what their training cost.

    Args:
        search: that found the pairs.
        connector: family.
        seed: of the order of pictures.
        found: HYMA's connectors and scores.
        how: steps and optimiser of a landmark.
    """
    grid, spec = search.task.grid, search.config.spec(connector)
    assert found.network is not None
    bank = ConnectorBank(grid, spec, seed, all_states(found.network, len(grid)))
    members = diagonal(grid)
    plan = search.plan(
        "grid", connector, seed, bank, search.pairs(members, seed), how.steps,
        optimiser=how.optimiser, stability=StabilityConfig(), evaluate_every=0, paid=Cost(), stage="landmarks",
    )  # fmt: skip
    outcome = search.trainer(plan, bank).fit()
    after = next(iter(search.task.evaluate(bank, spec).scores.values()))
    scores = next(iter(found.ranking.scores.values()))
    return calibrated(grid, scores, members, after), outcome.training


def with_prior(search: Search, seed: int, found: Found) -> tuple[list[float], Cost]:
    """Standardised scores and a training-free measure of each pair, mutual nearest neighbours; and what that cost.

    Args:
        search: that found the pairs.
        seed: of the pictures that are compared.
        found: HYMA's scores.
    """
    cost, scores = Cost(), standardised(next(iter(found.ranking.scores.values())))
    with Meter(cost, search.accelerator.device):
        seen = views(contrastive(search.task, "A prior"), PRIOR_ROWS, seed)
        shared, cost.flops = pair_scores("mutual-knn", seen, search.task.grid, seed)
    known = standardised(shared)
    return [(1 - PRIOR_WEIGHT) * own + PRIOR_WEIGHT * told for own, told in zip(scores, known, strict=True)], cost

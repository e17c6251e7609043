"""Rivals that train nothing: connectors in closed form, and measures that rank the pairs without any connector."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hyma_mllm.data.rows import Row
from hyma_mllm.search.budget import Budget
from hyma_mllm.search.closed_form import Start
from hyma_mllm.search.config import Method
from hyma_mllm.search.ledger import Cost, Ledger, Meter
from hyma_mllm.search.method import Found, Setting
from hyma_mllm.search.plan import Outcome
from hyma_mllm.search.ranking import Ranking
from hyma_mllm.search.similarity import Measure, pair_scores, views
from hyma_mllm.search.starts import contrastive
from hyma_mllm.search.unimodal import unimodal_scores


def closed_form(kind: Start, search: Setting, connector: str, seed: int, budget: Budget) -> Found:
    """Score the closed-form connector of every pair; it costs what it costs, whatever the budget."""
    spec = search.config.spec(connector)
    bank = search.network(kind, spec, seed).to(search.accelerator.device)
    outcome = Outcome(0, replace(search.paid(kind, spec)), Cost(), visits=[0] * len(search.task.grid))
    return search.score(kind, connector, seed, bank, outcome)


def similarity(measure: Measure, search: Setting, connector: str, seed: int, budget: Budget) -> Found:
    """Rank the pairs by how alike their two sides represent the same rows."""
    task, cost = contrastive(search.task, f"The method {measure}"), Cost()
    with Meter(cost, search.accelerator.device):
        seen = views(task, search.config.similarity_rows, seed)
        scores, cost.flops = pair_scores(measure, seen, task.grid, seed)
    return _unscored(search, measure, connector, seed, scores, cost)


def unimodal(search: Setting, connector: str, seed: int, budget: Budget) -> Found:
    """Rank the pairs by how good each side is by itself."""
    task, cost = contrastive(search.task, "The method unimodal"), Cost()
    with Meter(cost, search.accelerator.device):
        scores, cost.flops, measures = unimodal_scores(task, search.labels, search.config.similarity_rows, seed)
    search.run.log("unimodal", connector=connector, seed=seed, measures=measures)
    return _unscored(search, "unimodal", connector, seed, scores, cost)


def _unscored(search: Setting, method: Method, connector: str, seed: int, order: list[float], cost: Cost) -> Found:
    """An order without a score of any task: there is no connector that could have one."""
    ranking = Ranking(method, connector, seed, {}, {}, order)
    ledger = Ledger(method, connector, seed, {"evaluation": cost})
    return Found(ranking, ledger, Outcome(0, Cost(), Cost(), visits=[0] * len(search.task.grid)), None)


def labels_of(rows: Sequence[Row]) -> Tensor | None:
    """The class of each picture [rows] int64, -1 for none; None where there are not two classes.

    Args:
        rows: of the task, in order; a class is a label within its class set.
    """
    names = sorted({(row.class_set or "", row.label) for row in rows if row.label is not None})
    if len(names) < 2:
        return None
    number = {name: index for index, name in enumerate(names)}
    return torch.tensor([-1 if row.label is None else number[row.class_set or "", row.label] for row in rows])

"""Training-free scores of pairs: what all models make of the same training pictures and captions, compared.

The measures and their costs stand in `measures`; a model's half of the work is done once and shared by its pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.pairs import PairGrid
from hyma_mllm.search.measures import (
    COMPONENTS,
    GW_ROWS,
    NEIGHBOURS,
    STRENGTH,
    Kind,
    cca_kind,
    choose,
    cka_kind,
    gw_kind,
    knn_kind,
    prepared,
)
from hyma_mllm.search.task import VLMTask, captions_of

Measure = Literal["cka", "mutual-knn", "cca", "gromov-wasserstein"]


@dataclass
class Views:
    """The same pictures as all models of both shelves see them.

    Attributes:
        vision: per vision model [rows, width] float32 on the CPU.
        text: per text model [rows, width] float32 on the CPU, the mean of the picture's captions.
    """

    vision: list[Tensor]
    text: list[Tensor]


def views(task: VLMTask, rows: int, seed: int) -> Views:
    """Features of `rows` random training pictures (all, if there are no more) and the mean of their captions.

    Raises:
        HymaError: if there are too few of them.
    """
    pictures = choose(task.train, rows, seed)
    captions, owner = captions_of(task.first_caption, pictures)
    count = torch.bincount(owner, minlength=len(pictures))[:, None]
    text = []
    for model in task.texts:
        spoken = model[captions].cpu().double()
        mean = torch.zeros(len(pictures), spoken.shape[1], dtype=torch.float64).index_add_(0, owner, spoken) / count
        text.append(mean.float())
    return Views([model[pictures].cpu() for model in task.images], text)


def pair_scores(measure: Measure, seen: Views, grid: PairGrid, seed: int = 0) -> tuple[list[float], float]:
    """Score of every pair in grid order, higher is better, and the FLOPs of it all.

    CKA is the debiased one, because shelves mix widths and the plain one favours the wide.

    Args:
        measure: which.
        seen: matched rows of all models.
        grid: the pairs.
        seed: of the rows that Gromov-Wasserstein takes.

    Raises:
        HymaError: for an unknown measure, too few rows, values that are not finite, or if POT is missing.
        ValueError: if the views are not those of the grid's models, or their rows do not match.
    """
    if (len(seen.vision), len(seen.text)) != (len(grid.vision_ids), len(grid.text_ids)):
        raise ValueError("the views are of other models than the grid's")
    kind = _kind(measure)
    ready, flops = prepared(kind, [*seen.vision, *seen.text], seed)
    scores = []
    for pair in grid.pairs():
        score, cost = kind.compare(ready[pair.vision], ready[len(seen.vision) + pair.text])
        scores.append(score)
        flops += cost
    return scores, flops


def within_scores(measure: Measure, models: Sequence[Tensor]) -> Tensor:
    """Similarity among models of one side, [models, models] float64: `within` without its bill."""
    return within(measure, models)[0]


def within(measure: Measure, models: Sequence[Tensor], seed: int = 0) -> tuple[Tensor, float]:
    """Similarity of each model of a shelf with each, and the FLOPs of it.

    Args:
        measure: which; CKA is the debiased one.
        models: per model matched rows [rows, width].
        seed: of the rows that Gromov-Wasserstein takes.

    Returns:
        [models, models] float64, symmetric, and FLOPs.

    Raises:
        HymaError, ValueError: as `pair_scores`.
    """
    kind = _kind(measure)
    ready, flops = prepared(kind, models, seed)
    table = torch.zeros(len(models), len(models), dtype=torch.float64)
    for row in range(len(models)):
        for column in range(row, len(models)):
            score, cost = kind.compare(ready[row], ready[column])
            table[row, column] = table[column, row] = score
            flops += cost
    return table, flops


def _kind(measure: Measure) -> Kind:
    if measure == "cka":
        return cka_kind(debiased=True)
    if measure == "mutual-knn":
        return knn_kind(NEIGHBOURS)
    if measure == "cca":
        return cca_kind(COMPONENTS, STRENGTH)
    if measure == "gromov-wasserstein":
        return gw_kind(GW_ROWS)
    raise HymaError(f"The similarity measure {measure!r} is unknown; {near_names(measure, get_args(Measure))}")

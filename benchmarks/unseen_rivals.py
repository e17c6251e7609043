"""What `unseen.py` compares with, on the same few samples: the closed forms' strength, chosen without a further sample.

Ridge predictions that leave their own sample out have a closed form (Allen 1974, PRESS), so that every sample serves as
a test: of n predictions, the own picture is looked up among the n by the score of each closed form, and the strength
with the highest mean reciprocal rank, over both directions and the pairs looked at, is taken.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.closed_form import ClosedForm
from hyma_mllm.search.task import VLMTask, captions_of

if TYPE_CHECKING:  # as in unseen.py
    from benchmarks.unseen_ground import LINEAR, Ground, Recipe, cell, fit, form, free, recipe_for, scored
else:
    from unseen_ground import LINEAR, Ground, Recipe, cell, fit, form, free, recipe_for, scored

SCRATCH = {32: Recipe(20, 0.0), 1000: Recipe(60, 5e-3), 2000: Recipe(100, 5e-3)}
"""Samples -> how a connector from scratch is trained; a rate of 0 is chosen among `SCRATCH_RATES`."""

SCRATCH_RATES = (5e-3, 2e-2)
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def choose_strengths(task: VLMTask, pictures: Tensor, pairs: Sequence[int]) -> dict[str, float]:
    """The strengths of `ridge` and `whitened` that leave-one-out takes, common to all pairs.

    Args:
        task: features.
        pictures: [n] int64 row numbers of the samples, each with the mean of its captions.
        pairs: indices in the grid that are looked at.
    """
    captions, owner = captions_of(task.first_caption, pictures)
    count = torch.bincount(owner, minlength=len(pictures))[:, None]
    totals = {kind: torch.zeros(len(STRENGTHS)) for kind in ("ridge", "whitened")}
    for index in pairs:
        pair = task.grid.pair(index)
        said = task.texts[pair.text][captions].float()
        text = torch.zeros(len(pictures), said.shape[1]).index_add_(0, owner, said) / count
        image = task.images[pair.vision][pictures].float()
        for number, found in enumerate(_by_strength(text, image)):
            for kind, value in found.items():
                totals[kind][number] += value
    return {kind: STRENGTHS[int(total.argmax())] for kind, total in totals.items()}


def _by_strength(text: Tensor, image: Tensor) -> list[dict[str, float]]:
    """Mean reciprocal ranks of both closed forms at each strength; text [n, d_t], image [n, d_i]."""
    n = len(text)
    text, varying = text - text.mean(0), image - image.mean(0)
    values, vectors = torch.linalg.eigh(text @ text.T / n)
    spread, axes = torch.linalg.eigh(varying @ varying.T / n)
    values, spread = values.clamp_min(0), spread.clamp_min(0)
    plain = image @ image.T
    found = []
    for strength in STRENGTHS:
        lifted = values + strength * values.sum() / text.shape[1]
        hat = (vectors * (values / lifted)) @ vectors.T + 1 / n
        own = hat.diagonal()
        left_out = (hat - torch.diag(own)) / (1 - own)[:, None]
        once = spread + strength * spread.sum() / image.shape[1]
        turned = left_out @ axes
        scores = {"ridge": left_out @ plain, "whitened": (turned * (n * spread / once)) @ axes.T}
        lengths = {
            "ridge": (scores["ridge"] * left_out).sum(1),
            "whitened": (turned.square() * (n * spread / once.square())).sum(1),
        }
        found.append(
            {kind: reciprocal_rank(value / lengths[kind].clamp_min(1e-12).sqrt()[:, None])
             for kind, value in scores.items()}
        )  # fmt: skip
    return found


def reciprocal_rank(scores: Tensor) -> float:
    """Mean over both directions of 1 / rank of the diagonal of `scores` [n, n]; ties count as lost."""
    own = scores.diagonal()
    ranks = [(scores >= own[:, None]).sum(1), (scores >= own[None, :]).sum(0)]
    return float(torch.stack([(1 / rank.float()).mean() for rank in ranks]).mean())


def from_scratch(ground: Ground, samples: int, seed: int) -> dict[str, Any]:
    """A connector of its own for each pair."""
    rows, flops = ground.rows(samples, seed), 0.0
    recipe = recipe_for(len(rows), SCRATCH)
    if not recipe.lr:
        quarter = len(rows) // 4
        found = {}
        for rate in SCRATCH_RATES:
            bank = ConnectorBank(ground.task.grid, LINEAR, seed)
            flops += fit(ground, replace(ground.task, train=rows[quarter:]), bank, replace(recipe, lr=rate), seed, free)
            scores = ground.task.scores(bank, LINEAR, rows[:quarter])
            found[rate] = sum(sum(scores[f"{way} R@1"]) for way in ("image_to_text", "text_to_image"))
        recipe = replace(recipe, lr=max(found, key=found.__getitem__))
    bank = ConnectorBank(ground.task.grid, LINEAR, seed)
    flops += fit(ground, replace(ground.task, train=rows), bank, recipe, seed, free)
    return cell("connector from scratch", samples, scored(bank, ground.task), flops) | {"lr": recipe.lr}


def closed_rival(
    ground: Ground, label: str, kind: ClosedForm, samples: int, seed: int, strength: float
) -> dict[str, Any]:
    """A closed form of the samples for each pair."""
    states, flops = form(ground, kind, samples, seed, strength)
    scores = scored(ConnectorBank(ground.task.grid, LINEAR, 0, states), ground.task)
    return cell(label, samples, scores, flops) | {"strength": strength}

"""A rival after Mordal (arXiv 2502.00241): cluster both shelves, train medoids first, then halve the best clusters.

Models of one shelf that represent the same pictures (or captions) alike share a cluster, by linear CKA and average
linkage. The pairs of medoids are trained first; the pairs of the best clusters follow, with the medoids' connectors
going on from where they are. A pair that was stopped is given the score that its learning curve, straight in log-log
axes, would reach; a pair that was never trained inherits that of its clusters' medoids.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hyma_mllm.search.budget import Budget
from hyma_mllm.search.config import MordalConfig
from hyma_mllm.search.halving import start_race
from hyma_mllm.search.ledger import Cost, Meter
from hyma_mllm.search.method import Found, Setting
from hyma_mllm.search.race import Points, Race
from hyma_mllm.search.similarity import pair_scores, views, within
from hyma_mllm.search.starts import contrastive

TIE = 1e-3
"""Points between an inherited score and the highest of its heirs by CKA: less than any two scores differ by."""

LEAST_ERROR = 1e-3
"""Points of error that a perfect score still has, so that it has a logarithm."""


@dataclass
class Clusters:
    """What the similarity of models says of pairs.

    Attributes:
        medoids: for each pair of the grid, the pair of its clusters' medoids.
        cka: of the two sides of each pair.
        cost: of all similarities.
    """

    medoids: list[int]
    cka: list[float]
    cost: Cost


def mordal(search: Setting, connector: str, seed: int, budget: Budget) -> Found:
    """Medoids first, then halving among the pairs of the best clusters; ranked by the end score that is expected."""
    config = search.config.mordal
    found = cluster_pairs(search, seed)
    race = start_race(search, "mordal", connector, seed, budget, vars(config))
    first = sorted(set(found.medoids))
    race.stage(0, first, config.rungs, config.eta, config.looks, config.share)
    best = best_medoids(race, first, config)
    race.stage(
        1, [pair for pair, medoid in enumerate(found.medoids) if medoid in best], config.rungs, config.eta, config.looks
    )
    outcome = race.trainer.outcome()
    outcome.validation.flops += found.cost.flops
    outcome.validation.seconds += found.cost.seconds
    order = inherited(expected(race), found)
    return search.score("mordal", connector, seed, race.trainer.source, outcome, order)


def cluster_pairs(search: Setting, seed: int) -> Clusters:
    """Clusters of both shelves, on some training pictures.

    Args:
        search: over a contrastive task.
        seed: draws the pictures.
    """
    task = contrastive(search.task, "The method mordal")
    config, cost = search.config.mordal, Cost()
    with Meter(cost, search.accelerator.device):
        seen = views(task, search.config.similarity_rows, seed)
        vision, vision_flops = within("cka", seen.vision)
        text, text_flops = within("cka", seen.text)
        cka, flops = pair_scores("cka", seen, task.grid, seed)
        of_vision = medoid_of(vision, clusters(vision, config.threshold, config.clusters))
        of_text = medoid_of(text, clusters(text, config.threshold, config.clusters))
    cost.flops = vision_flops + text_flops + flops
    medoids = [of_vision[pair.vision] * len(task.grid.text_ids) + of_text[pair.text] for pair in task.grid.pairs()]
    return Clusters(medoids, cka, cost)


def clusters(similarity: Tensor, threshold: float, count: int) -> list[list[int]]:
    """Agglomerative clusters with average linkage on the distance 1 - similarity.

    Args:
        similarity: [models, models], symmetric, 1 on the diagonal.
        threshold: clusters are joined while their mean similarity is above it.
        count: join down to so many instead; 0 for the threshold.

    Returns:
        Members of each cluster, in order of their first.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    models = len(similarity)
    if models == 1:
        return [[0]]
    distance = (1 - np.asarray(similarity.double().cpu())).clip(min=0)
    distance = (distance + distance.T) / 2
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance), "average")
    by_count = {"t": count, "criterion": "maxclust"}
    labels = fcluster(tree, **(by_count if count else {"t": 1 - threshold, "criterion": "distance"}))
    found: dict[int, list[int]] = {}
    for model, label in enumerate(labels.tolist()):
        found.setdefault(label, []).append(model)
    return list(found.values())


def medoid_of(similarity: Tensor, grouped: Sequence[Sequence[int]]) -> list[int]:
    """For each model the member of its cluster that is most like all members; of equal ones the first.

    Args:
        similarity: [models, models].
        grouped: members of each cluster.
    """
    found = [0] * len(similarity)
    for members in grouped:
        likeness = {model: sum(float(similarity[model, other]) for other in members) for model in members}
        # Sums in another order differ in their last digit, which must not choose.
        medoid = min(members, key=lambda model: (-round(likeness[model], 9), model))
        for model in members:
            found[model] = medoid
    return found


def best_medoids(race: Race, medoids: Sequence[int], config: MordalConfig) -> set[int]:
    """The medoids' pairs whose clusters are looked into: a share of them, by expected score."""
    scores = expected(race)
    count = math.ceil(config.keep * len(medoids) - 1e-9)
    return set(sorted(medoids, key=lambda pair: (-scores[pair], pair))[:count])


def expected(race: Race) -> dict[int, float]:
    """The score of each trained pair once it had seen as many samples as the pair that has seen most."""
    points = race.points
    most = max(seen[-1][0] for seen in points.values())
    return {pair: seen[-1][1] if seen[-1][0] == most else extrapolated(seen, most) for pair, seen in points.items()}


def extrapolated(points: Points, samples: float) -> float:
    """The score at so many samples, percent: error = 100 - score, a straight line in log-log axes by least squares.

    A line that rises, which is noise, is taken as level; one point says that nothing changes.

    Args:
        points: (samples, score) of one pair, samples rising.
        samples: where to read the line.
    """
    x = np.log([seen for seen, _ in points])
    y = np.log([max(100 - score, LEAST_ERROR) for _, score in points])
    slope = float(np.polyfit(x, y, 1)[0]) if len(points) > 1 else 0.0
    if slope >= 0:
        return points[-1][1]
    return float(100 - np.exp(y.mean() + slope * (math.log(samples) - x.mean())))


def inherited(scores: dict[int, float], found: Clusters) -> list[float]:
    """The score of every pair: its own, or that of its clusters' medoids, heirs in order of CKA just below it."""
    low, high = min(found.cka), max(found.cka)
    spread = (high - low) or 1.0
    return [
        scores[pair] if pair in scores else scores[medoid] - TIE * (2 - (found.cka[pair] - low) / spread) / 2
        for pair, medoid in enumerate(found.medoids)
    ]

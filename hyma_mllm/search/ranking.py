"""What a search found (`ranking.json`), and how well one ranking agrees with the oracle grid.

* `Ranking`: the scores that one method gave all pairs of the grid; `SearchResult`: all of them, as saved.
* `ndcg`, `spearman`, `kendall`, `weighted_kendall`, `top1_regret`: one ranking against one oracle.
* `compare`, `ceiling`: the same over seeds, with Student's t intervals.

scipy and scikit-learn are imported where they are used: they take a second that `--help` need not wait for.

The schema of the file is documented in docs/schema.md.
"""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.paths import write_text
from hyma_mllm.search.schema_files import check_whole, describe, read_json

SCHEMA = 1
DECIMALS = 6
MAX_SCORE = 1e12

Scores = Sequence[float]


class ModelEntry(TypedDict):
    """One model of the grid: its id, what pins its weights, and its feature width."""

    id: str
    revision: str
    width: int


class Interval(NamedTuple):
    """A mean over seeds and its confidence interval; the bounds are nan when there is one seed only."""

    mean: float
    low: float
    high: float


@dataclass
class Ranking:
    """What one method gave all pairs, with one connector family and one seed.

    Attributes:
        method: "hyma", "grid", "constrained-grid", "random", "halving", "cka", ...
        connector: name of the connector family, "linear", "mlp1", ...
        seed: of the training.
        scores: task ("retrieval", "zero-shot/<class set>") -> score of each pair in grid order, percent; of the
            connector that the method holds for the pair, trained or not. Empty for a method without connectors.
        details: further measures of each pair in grid order, e.g. "text_to_image R@1", percent.
        order_by: what the method ranks by, of each pair in grid order, higher is better, on a scale of its own: a
            similarity, a rung and the validation score there, a score that is expected. None: the task's scores.
    """

    method: str
    connector: str
    seed: int
    scores: dict[str, list[float]]
    details: dict[str, list[float]] = field(default_factory=dict)
    order_by: list[float] | None = None

    def ranks_by(self, task: str) -> list[float]:
        """What the order of the pairs for a task comes from, [pairs]; higher is better."""
        return self.scores[task] if self.order_by is None else self.order_by

    def order(self, task: str) -> list[int]:
        """Pair indices, best first; equal ones in grid order."""
        values = self.ranks_by(task)
        return sorted(range(len(values)), key=lambda index: -values[index])

    def hand_over_by(self, task: str) -> list[float]:
        """What the pair that is handed over is chosen by, [pairs]: never a score on the test split.

        Args:
            task: the first of the result's.

        Raises:
            HymaError: the method makes no connectors, so there is nothing to hand over.
        """
        if not self.scores:
            raise HymaError(f"{self.method} ranks pairs without connectors; hand over a pair of another method.")
        return self.details[f"validation {task}"] if self.order_by is None else self.order_by


@dataclass
class SearchResult:
    """What `ranking.json` holds. No timings, so that the same seed writes the same bytes twice.

    Attributes:
        case: "vlm".
        vision: the N vision models in grid order.
        text: the M text models in grid order; pair (i, j) has index i * M + j.
        tasks: names of the tasks that every ranking with connectors scores.
        rankings: one per method, connector family and seed.
        oracle: the method that the others are compared with.
        config: the resolved configuration of the run.
        data: where the scores come from: "fingerprints", "rows", "splits" (name -> rows), "note", "attribution".
    """

    case: str
    vision: list[ModelEntry]
    text: list[ModelEntry]
    tasks: list[str]
    rankings: list[Ranking]
    oracle: str = "grid"
    config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(vision id, text id) of each pair in grid order."""
        return [(vision["id"], text["id"]) for vision in self.vision for text in self.text]

    @property
    def methods(self) -> list[str]:
        """All methods, the oracle last, the others in order of first appearance."""
        names = dict.fromkeys(ranking.method for ranking in self.rankings)
        return sorted(names, key=lambda name: name == self.oracle)

    @property
    def connectors(self) -> list[str]:
        """All connector families in order of first appearance."""
        return list(dict.fromkeys(ranking.connector for ranking in self.rankings))

    def scores(self, method: str, connector: str, task: str) -> list[list[float]]:
        """Scores [seeds, pairs] of a method, seeds in rising order; empty when it did not run there or has none."""
        return [ranking.scores[task] for ranking in self._chosen(method, connector) if ranking.scores]

    def ranks_by(self, method: str, connector: str, task: str) -> list[list[float]]:
        """What a method orders the pairs by, [seeds, pairs], seeds in rising order; empty when it did not run there."""
        return [ranking.ranks_by(task) for ranking in self._chosen(method, connector)]

    def _chosen(self, method: str, connector: str) -> list[Ranking]:
        chosen = [ranking for ranking in self.rankings if (ranking.method, ranking.connector) == (method, connector)]
        return sorted(chosen, key=lambda ranking: ranking.seed)

    def mean_scores(self, method: str, connector: str, task: str) -> list[float]:
        """Mean over seeds of each pair's score; empty when the method did not run there or has no connectors."""
        scores = self.scores(method, connector, task)
        return [float(mean) for mean in np.mean(scores, axis=0)] if scores else []

    def agreement(self, method: str, connector: str, task: str) -> dict[str, Interval]:
        """`compare` of a method's order with the oracle's scores, or the oracle's `ceiling`; empty without either."""
        oracle = self.scores(self.oracle, connector, task)
        if method == self.oracle:
            return ceiling(oracle)
        ours = self.ranks_by(method, connector, task)
        return compare(ours, oracle) if ours and oracle else {}

    def check(self, where: str) -> None:
        """Raise `HymaError` naming `where` and the ranking unless every pair has a finite score for every task.

        A ranking without any score is whole if every pair has a finite place in its order.
        """
        # Counted before they are named: a file of a few names can claim any number of pairs.
        pairs, seen = len(self.vision) * len(self.text), set()
        for ranking in self.rankings:
            name = f"{where}, ranking {ranking.method}/{ranking.connector}/seed {ranking.seed}"
            key = (ranking.method, ranking.connector, ranking.seed)
            if key in seen:
                raise HymaError(f"{name} stands there twice; remove one of the two.")
            seen.add(key)
            missing = [task for task in self.tasks if task not in ranking.scores]
            if missing and (ranking.scores or ranking.order_by is None):
                raise HymaError(f"{name} has no scores for the task {missing[0]}; run the evaluation again.")
            order = {} if ranking.order_by is None else {"order_by": ranking.order_by}
            for column, values in (ranking.scores | ranking.details | order).items():
                if len(values) != pairs:
                    raise HymaError(f"{name}, {column} holds {len(values)} values for {pairs} pairs; run it again.")
                for index, value in enumerate(values):
                    if not abs(value) < MAX_SCORE:  # nor is nan
                        pair = ",".join(self.pairs[index])
                        raise HymaError(f"{name}, {column} of pair {pair} is {value}, not a number; run it again.")

    def save(self, path: Path) -> None:
        """Write the file in one atomic step: floats rounded to 6 decimals, keys sorted.

        Raises:
            HymaError: when a score is missing or not finite.
        """
        self.check(str(path))
        content = {"schema": SCHEMA, **asdict(self)}
        for entry in content["rankings"]:
            entry |= {name: _columns(entry[name]) for name in ("scores", "details")}  # numpy's and whole numbers too
            if entry["order_by"] is None:
                entry.pop("order_by")
            else:
                entry["order_by"] = [float(value) for value in entry["order_by"]]
        write_text(path, json.dumps(_rounded(content), indent=1, sort_keys=True, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> "SearchResult":
        """Read and check the file.

        Raises:
            HymaError: when it is missing, broken, or of another schema.
        """
        content = read_json(path, SCHEMA)
        try:
            rankings = [
                Ranking(
                    method=str(entry["method"]),
                    connector=str(entry["connector"]),
                    seed=int(entry["seed"]),
                    scores=_columns(entry["scores"]),
                    details=_columns(entry.get("details", {})),
                    order_by=[float(value) for value in entry["order_by"]] if "order_by" in entry else None,
                )
                for entry in content["rankings"]
            ]
            result = cls(
                case=str(content["case"]),
                vision=_models(content["vision"]),
                text=_models(content["text"]),
                tasks=[str(task) for task in content["tasks"]],
                rankings=rankings,
                oracle=str(content["oracle"]),
                config=dict(content.get("config", {})),
                data=dict(content.get("data", {})),
            )
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise HymaError(f"{path} is not a ranking: {describe(error)}; write it again with a search.") from error
        result.check(str(path))
        lists = {
            "vision models": [entry["id"] for entry in result.vision],
            "text models": [entry["id"] for entry in result.text],
            "tasks": result.tasks,
            "rankings": result.methods,
        }
        check_whole(lists, result.data, str(path))
        return result


def known(value: str, names: Sequence[str], what: str, where: str = "this ranking") -> str:
    """`value` if it is one of `names`, else `HymaError` with the near names."""
    if value not in names:
        raise HymaError(f"There is no {what} {value} in {where}; {near_names(value, names)}")
    return value


def _models(entries: list[dict[str, Any]]) -> list[ModelEntry]:
    return [{"id": str(e["id"]), "revision": str(e["revision"]), "width": int(e["width"])} for e in entries]


def _columns(columns: dict[str, list[float]]) -> dict[str, list[float]]:
    return {str(name): [float(value) for value in values] for name, values in columns.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DECIMALS) + 0.0  # + 0.0 turns -0.0 into 0.0: the same bytes for the same number
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def _aligned(scores: Scores, oracle: Scores) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    if len(scores) != len(oracle) or not len(scores):
        raise ValueError(f"a ranking of {len(scores)} pairs cannot be compared with an oracle of {len(oracle)}")
    return np.asarray(scores, dtype=np.float64), np.asarray(oracle, dtype=np.float64)


def ndcg(scores: Scores, oracle: Scores, k: int) -> float:
    """Normalised discounted cumulative gain of the first k pairs, in [0, 1].

    The gain of a pair is its oracle score scaled so that the grid's worst pair is 0 and its best is 1: raw percents
    lie so close together that even a random order would come out near 1. Pairs with equal scores share their places.
    An oracle that finds all pairs equal makes every order ideal: 1.

    Args:
        scores: [pairs], higher is better.
        oracle: [pairs], in the same order.
        k: places that count, at least 1; more than there are pairs means all.
    """
    ours, true = _aligned(scores, oracle)
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    spread = float(np.ptp(true))
    if spread == 0:
        return 1.0
    from sklearn.metrics import ndcg_score

    return float(ndcg_score([(true - true.min()) / spread], [ours], k=k))


def spearman(scores: Scores, oracle: Scores) -> float:
    """Spearman's rho of the two orders [pairs]; nan when either holds one value only."""
    import scipy.stats

    ours, true = _aligned(scores, oracle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
        return float(scipy.stats.spearmanr(ours, true).statistic) if len(ours) > 1 else math.nan


def kendall(scores: Scores, oracle: Scores) -> float:
    """Kendall's tau-b of the two orders [pairs]; nan when either holds one value only."""
    import scipy.stats

    return float(scipy.stats.kendalltau(*_aligned(scores, oracle)).statistic)


def weighted_kendall(scores: Scores, oracle: Scores) -> float:
    """Kendall's tau with hyperbolic weights [pairs]: an exchange among the best pairs costs more (Vigna, 2015).

    The mean of the tau weighted by our places and the one weighted by the oracle's, as scipy's default; nan when
    either holds one value only.
    """
    import scipy.stats

    return float(scipy.stats.weightedtau(*_aligned(scores, oracle)).statistic)


def top1_regret(scores: Scores, oracle: Scores) -> float:
    """What the user loses by taking our best pair: points (percent) of the oracle's score, 0 is perfect.

    Of equally scored best pairs the first in grid order is taken, as `Ranking.order` does.
    """
    ours, true = _aligned(scores, oracle)
    return float(true.max() - true[int(ours.argmax())])


METRICS = ("ndcg@1", "ndcg@3", "ndcg@5", "spearman", "kendall", "weighted_kendall", "regret")
"""What `compare` returns; all but the regret (points) lie in [-1, 1] and are best at 1."""


def _metrics(scores: Scores, oracle: Scores) -> dict[str, float]:
    return {
        **{f"ndcg@{k}": ndcg(scores, oracle, k) for k in (1, 3, 5)},
        "spearman": spearman(scores, oracle),
        "kendall": kendall(scores, oracle),
        "weighted_kendall": weighted_kendall(scores, oracle),
        "regret": top1_regret(scores, oracle),
    }


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean over seeds with Student's t interval for the mean.

    Args:
        values: one per seed. A single one has nan bounds, and a nan among them makes everything nan.
        level: confidence in (0, 1).
    """
    if not len(values):
        raise ValueError("an interval needs at least one value")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    import scipy.stats

    half = float(scipy.stats.t.ppf((1 + level) / 2, len(values) - 1) * scipy.stats.sem(values))
    return Interval(mean, mean - half, mean + half)


def compare(scores: Sequence[Scores], oracle: Sequence[Scores], level: float = 0.95) -> dict[str, Interval]:
    """Every metric of a method against the oracle, over the method's seeds.

    Args:
        scores: [seeds, pairs] of the method.
        oracle: [seeds, pairs] of the oracle; what is compared with is the mean over its seeds.
        level: confidence of the intervals.

    Returns:
        metric (`METRICS`) -> (mean, low, high).
    """
    true = np.mean(oracle, axis=0)
    each = [_metrics(one, true) for one in scores]
    return {metric: interval([one[metric] for one in each], level) for metric in METRICS}


def ceiling(oracle: Sequence[Scores], level: float = 0.95) -> dict[str, Interval]:
    """What a perfect method could reach: each seed of the oracle [seeds, pairs] against the mean of the others.

    The left-out seeds share most of their partners, so the interval is a guide, not a test. Empty below two seeds.
    """
    if len(oracle) < 2:
        return {}
    each = []
    for left_out, one in enumerate(oracle):
        others = [other for seed, other in enumerate(oracle) if seed != left_out]
        each.append(_metrics(one, np.mean(others, axis=0)))
    return {metric: interval([one[metric] for one in each], level) for metric in METRICS}

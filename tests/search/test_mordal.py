"""Mordal-style search: clusters and curves by hand and by scipy, the order by its rules."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyma_mllm.errors import HymaError
from hyma_mllm.search.budget import Budget
from hyma_mllm.search.config import MordalConfig
from hyma_mllm.search.ledger import Cost
from hyma_mllm.search.methods import Search
from hyma_mllm.search.mordal import TIE, Clusters, cluster_pairs, clusters, extrapolated, inherited, medoid_of
from hyma_mllm.search.similarity import pair_scores, views, within_scores

Maker = Callable[..., Search]


LIKE = torch.tensor(
    [
        [1.0, 0.91, 0.2, 0.8, 0.1],
        [0.91, 1.0, 0.1, 0.9, 0.2],
        [0.2, 0.1, 1.0, 0.1, 0.6],
        [0.8, 0.9, 0.1, 1.0, 0.1],
        [0.1, 0.2, 0.6, 0.1, 1.0],
    ]
)
"""0, 1 and 3 are alike, 1 the most; 2 and 4 are so at 0.6."""


@pytest.mark.parametrize(
    ("threshold", "count", "wanted"),
    [
        (0.7, 0, [[0, 1, 3], [2], [4]]),
        (0.5, 0, [[0, 1, 3], [2, 4]]),
        (0.86, 0, [[0, 1], [2], [3], [4]]),  # the third joins at a mean of (0.8 + 0.9) / 2
        (0.99, 0, [[0], [1], [2], [3], [4]]),
        (0.99, 2, [[0, 1, 3], [2, 4]]),
        (0.01, 1, [[0, 1, 2, 3, 4]]),
    ],
)
def test_clusters_are_those_of_paper_and_pencil(threshold: float, count: int, wanted: list[list[int]]) -> None:
    assert clusters(LIKE, threshold, count) == wanted


def test_medoids_are_the_most_alike() -> None:
    assert medoid_of(LIKE, [[0, 1, 3], [2, 4]]) == [1, 1, 2, 1, 2]
    assert medoid_of(LIKE, [[0], [1], [2], [3], [4]]) == [0, 1, 2, 3, 4]
    assert clusters(torch.ones(1, 1), 0.7, 0) == [[0]]


def test_pairs_cluster_by_both_sides(search: Maker) -> None:
    one = search(mordal=MordalConfig(threshold=0.9))
    found = cluster_pairs(one, 0)
    seen = views(one.task, one.config.similarity_rows, 0)  # type: ignore[arg-type]
    vision = medoid_of(*(lambda s: (s, clusters(s, 0.9, 0)))(within_scores("cka", seen.vision)))
    text = medoid_of(*(lambda s: (s, clusters(s, 0.9, 0)))(within_scores("cka", seen.text)))
    assert found.medoids == [v * 3 + t for v in vision for t in text]
    assert found.cka == pair_scores("cka", seen, one.task.grid)[0]
    assert found.cost.flops > 0


@given(
    error=st.floats(1.0, 90.0),
    slope=st.floats(-1.5, -0.01),
    samples=st.lists(st.integers(1, 10**5), min_size=2, max_size=6, unique=True),
    further=st.integers(10**5, 10**6),
)
def test_a_power_law_is_read_on(error: float, slope: float, samples: list[int], further: int) -> None:
    first = min(samples)
    points = [(float(n), 100 - error * (n / first) ** slope) for n in sorted(samples)]
    if points[-1][1] < 100 - 2e-3:
        assert extrapolated(points, further) == pytest.approx(100 - error * (further / first) ** slope, abs=1e-2)


@given(st.lists(st.tuples(st.integers(1, 10**5), st.floats(0, 99)), min_size=2, max_size=8, unique_by=lambda p: p[0]))
def test_a_curve_is_scipys_line_in_log_log_axes(raw: list[tuple[int, float]]) -> None:
    points = [(float(n), score) for n, score in sorted(raw)]
    line = scipy.stats.linregress(np.log([n for n, _ in points]), np.log([100 - s for _, s in points]))
    further = 3e5
    found = extrapolated(points, further)
    if line.slope < -1e-9:
        assert found == pytest.approx(
            100 - math.exp(line.intercept + line.slope * math.log(further)), rel=1e-6, abs=1e-6
        )
        assert found <= 100
    elif line.slope > 1e-9:  # a curve that falls is noise, and says nothing of the end
        assert found == points[-1][1]


def test_one_point_and_a_perfect_score_are_finite() -> None:
    assert extrapolated([(32.0, 40.0)], 1e4) == 40.0
    assert math.isfinite(extrapolated([(32.0, 99.0), (64.0, 100.0)], 1e4))


def test_heirs_stand_just_below_their_medoids_by_cka() -> None:
    # Pairs 0 and 1 share the medoid 1; 3, 4 and 5 the medoid 4; 2 is its own and was trained with 0.
    found = Clusters([1, 1, 2, 4, 4, 4], [0.1, 0.9, 0.5, 0.3, 0.2, 0.7], Cost())
    order = inherited({0: 55.0, 1: 50.0, 2: 70.0, 4: 60.0}, found)
    assert [order[pair] for pair in (0, 1, 2, 4)] == [55.0, 50.0, 70.0, 60.0]
    assert 60 - TIE <= order[3] < order[5] < 60
    assert sorted(range(6), key=lambda pair: -order[pair]) == [2, 4, 5, 3, 0, 1]


def test_medoids_are_trained_first_and_heirs_only_inherit(search: Maker) -> None:
    config = MordalConfig(threshold=0.9, keep=0.25, share=0.5, rungs=2, looks=2)
    one = search(mordal=config, budget=Budget(samples=240), methods=["mordal"])
    first = sorted(set(cluster_pairs(one, 0).medoids))
    found = one.run_method("mordal", "linear", 0, None)
    order, visits = found.ranking.order_by, found.outcome.visits
    assert order is not None and len(order) == 6
    assert sum(visits) * 16 / 6 <= 240
    assert all(visits[pair] for pair in first)
    medoids = cluster_pairs(one, 0).medoids
    for pair, count in enumerate(visits):
        if not count:
            assert order[medoids[pair]] - TIE <= order[pair] < order[medoids[pair]]
    # Its similarities are on the bill.
    evaluation = found.ledger.phases["evaluation"].flops
    scored = one.task.scoring_flops(one.config.spec("linear"), one.task.validation)  # type: ignore[attr-defined]
    assert evaluation > 2 * scored


def test_models_that_are_all_alike_leave_one_pair_to_begin_with(search: Maker) -> None:
    one = search(mordal=MordalConfig(clusters=1), budget=Budget(samples=240), methods=["mordal"])
    assert len(set(cluster_pairs(one, 0).medoids)) == 1
    found = one.run_method("mordal", "linear", 0, None)
    assert all(found.outcome.visits)  # its cluster is everything


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"clusters": -1}, "mordal.clusters is -1"),
        ({"rungs": 0}, "mordal.rungs is 0"),
        ({"looks": 0}, "mordal.looks is 0"),
        ({"threshold": 1.0}, "mordal.threshold is 1.0"),
        ({"share": 0.0}, "mordal.share is 0.0"),
        ({"keep": 1.5}, "mordal.keep is 1.5"),
        ({"eta": 1.0}, "mordal.eta is 1.0"),
    ],
)
def test_what_cannot_be_clustered_is_refused(values: dict[str, float], sentence: str) -> None:
    with pytest.raises(HymaError, match=sentence):
        MordalConfig(**values)  # type: ignore[arg-type]

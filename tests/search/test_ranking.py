import json
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from hyma_mllm.errors import HymaError
from hyma_mllm.search.ranking import (
    METRICS,
    Ranking,
    SearchResult,
    ceiling,
    compare,
    interval,
    kendall,
    known,
    ndcg,
    spearman,
    top1_regret,
    weighted_kendall,
)

VISION = [{"id": f"v{i}", "revision": f"sha{i}", "width": 8 + i} for i in range(2)]
TEXT = [{"id": f"t{i}", "revision": f"sha{i}", "width": 16 + i} for i in range(3)]


def result(**changes):
    rankings = [
        Ranking("hyma", "linear", seed, {"retrieval": [1.0, 3.0, 2.0, 3.0, 0.5 + seed, 1 / 3]}) for seed in (1, 0)
    ] + [Ranking("grid", "linear", seed, {"retrieval": [1.0, 4.0, 2.0, 3.0, 0.0, seed]}) for seed in (0, 1)]
    arguments = {"case": "vlm", "vision": VISION, "text": TEXT, "tasks": ["retrieval"], "rankings": rankings} | changes
    return SearchResult(**arguments)


def test_order_is_best_first_with_ties_in_grid_order():
    assert Ranking("m", "linear", 0, {"t": [1.0, 3.0, 2.0, 3.0]}).order("t") == [1, 3, 2, 0]


def test_save_and_load_give_the_same_result_and_the_same_bytes(tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    result(data={"rows": {"train": 5}, "b": [(1, -0.0)]}).save(one)
    loaded = SearchResult.load(one)
    loaded.save(two)
    assert one.read_bytes() == two.read_bytes()
    assert loaded.rankings[0].scores["retrieval"][5] == 0.333333
    assert loaded.pairs[4] == ("v1", "t1")
    assert (loaded.methods, loaded.connectors) == (["hyma", "grid"], ["linear"])
    assert "-0.0" not in one.read_text()


def test_scores_come_in_the_order_of_seeds():
    assert [scores[4] for scores in result().scores("hyma", "linear", "retrieval")] == [0.5, 1.5]
    assert result().mean_scores("hyma", "linear", "retrieval")[4] == 1.0
    assert result().mean_scores("random", "linear", "retrieval") == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "no schema number"),
        ('{"schema": 99}', "schema 99 but this version reads 1"),
        ('{"schema": 1, "rankings": []}', "'case' is missing"),
        ('{"schema": 1, "rankings": [3]}', "is not a ranking"),
    ],
)
def test_a_broken_file_is_refused_in_one_sentence(tmp_path, text, said):
    path = tmp_path / "ranking.json"
    path.write_text(text)
    with pytest.raises(HymaError, match=said) as caught:
        SearchResult.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(HymaError, match="No such file"):
        SearchResult.load(tmp_path / "ranking.json")


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ({"other": [1.0] * 6}, "has no scores for the task retrieval"),
        ({"retrieval": [1.0] * 5}, "holds 5 values for 6 pairs"),
        ({"retrieval": [1.0, math.nan] + [1.0] * 4}, "of pair v0,t1 is nan"),
    ],
)
def test_incomplete_scores_are_never_written(tmp_path, scores, said):
    with pytest.raises(HymaError, match=said):
        result(rankings=[Ranking("hyma", "linear", 0, scores)]).save(tmp_path / "ranking.json")
    assert not list(tmp_path.iterdir())


def test_a_ranking_that_stands_twice_is_refused(tmp_path):
    with pytest.raises(HymaError, match="twice"):
        result(rankings=[Ranking("hyma", "linear", 0, {"retrieval": [1.0] * 6})] * 2).save(tmp_path / "ranking.json")


def test_an_edited_score_is_refused_on_loading(tmp_path):
    path = tmp_path / "ranking.json"
    result().save(path)
    content = json.loads(path.read_text())
    content["rankings"][0]["scores"]["retrieval"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(HymaError, match="holds 5 values"):
        SearchResult.load(path)


def test_an_unknown_name_is_answered_with_near_ones():
    with pytest.raises(HymaError, match="did you mean retrieval"):
        known("retreival", ["retrieval", "zero-shot/x"], "task")


def test_ndcg_against_the_formula_written_out():
    scores, oracle = [3.0, 2.0, 1.0, 0.0], [40.0, 48.0, 44.0, 32.0]
    gain = [(value - 32) / 16 for value in oracle]
    dcg = gain[0] / math.log2(2) + gain[1] / math.log2(3) + gain[2] / math.log2(4)
    ideal = gain[1] / math.log2(2) + gain[2] / math.log2(3) + gain[0] / math.log2(4)
    assert ndcg(scores, oracle, 3) == pytest.approx(dcg / ideal)
    assert ndcg(scores, oracle, 1) == pytest.approx(0.5)
    assert ndcg(scores, oracle, 99) == pytest.approx(ndcg(scores, oracle, 4))


def test_ndcg_of_equal_scores_is_the_mean_over_orders_and_of_an_equal_oracle_is_one():
    assert ndcg([1.0, 1.0], [0.0, 10.0], 1) == pytest.approx(0.5)
    assert ndcg([1.0, 2.0], [5.0, 5.0], 1) == 1.0
    assert ndcg([1.0], [5.0], 1) == 1.0


def tau_by_counting(scores, oracle):
    n = len(scores)
    signs = [np.sign(scores[i] - scores[j]) * np.sign(oracle[i] - oracle[j]) for i in range(n) for j in range(i)]
    return sum(signs) / len(signs)


grids = st.integers(2, 9).flatmap(
    lambda n: st.tuples(st.permutations(list(map(float, range(n)))), st.permutations(list(map(float, range(n)))))
)


@given(grids)
def test_correlations_against_their_definitions(grid):
    scores, oracle = grid
    n = len(scores)
    gaps = sum((a - b) ** 2 for a, b in zip(scores, oracle, strict=True))
    assert spearman(scores, oracle) == pytest.approx(1 - 6 * gaps / (n * (n * n - 1)))
    assert kendall(scores, oracle) == pytest.approx(tau_by_counting(scores, oracle))


@given(grids)
def test_metrics_lie_in_their_range_and_only_the_order_of_the_scores_counts(grid):
    scores, oracle = grid
    stretched = [math.exp(value) for value in scores]
    for metric in (spearman, kendall, weighted_kendall):
        assert -1 - 1e-9 <= metric(scores, oracle) <= 1 + 1e-9
        assert metric(stretched, oracle) == pytest.approx(metric(scores, oracle))
        assert metric(oracle, oracle) == pytest.approx(1)
    assert 0 <= ndcg(scores, oracle, 3) <= 1 + 1e-9
    assert ndcg(oracle, oracle, 3) == pytest.approx(1)
    assert top1_regret(oracle, oracle) == 0 <= top1_regret(scores, oracle) <= len(oracle) - 1


def test_weighted_kendall_minds_the_best_pairs_most():
    oracle = [5.0, 4.0, 3.0, 2.0, 1.0]
    best_swapped, worst_swapped = [4.0, 5.0, 3.0, 2.0, 1.0], [5.0, 4.0, 3.0, 1.0, 2.0]
    assert kendall(best_swapped, oracle) == pytest.approx(kendall(worst_swapped, oracle))
    assert weighted_kendall(best_swapped, oracle) < weighted_kendall(worst_swapped, oracle)


def test_regret_is_in_points_of_the_oracle():
    assert top1_regret([1.0, 9.0, 9.0], [48.5, 46.0, 40.0]) == pytest.approx(2.5)


def test_a_constant_ranking_has_no_correlation():
    for metric in (spearman, kendall, weighted_kendall):
        assert math.isnan(metric([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))


def test_rankings_of_different_grids_are_not_compared():
    with pytest.raises(ValueError, match="3 pairs cannot be compared with an oracle of 2"):
        spearman([1.0, 2.0, 3.0], [1.0, 2.0])


def test_interval_against_scipy_and_a_table():
    values = [0.95, 0.97, 0.92]
    low, high = scipy.stats.t.interval(0.9, 2, np.mean(values), scipy.stats.sem(values))
    assert interval(values, 0.9) == pytest.approx((np.mean(values), low, high))
    assert interval([0.0, 2.0]).high == pytest.approx(1 + 12.7062, abs=1e-3)
    assert interval([3.0, 3.0]) == (3.0, 3.0, 3.0)


def test_one_seed_has_no_interval():
    mean, low, high = interval([0.5])
    assert mean == 0.5 and math.isnan(low) and math.isnan(high)


def test_compare_is_with_the_mean_of_the_oracle_over_seeds():
    compared = compare([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]], [[30.0, 10.0, 0.0], [10.0, 10.0, 10.0]])
    assert tuple(compared) == METRICS
    assert compared["regret"].mean == pytest.approx((0 + 15) / 2)  # the mean oracle is 20, 10, 5
    assert compared["spearman"].mean == pytest.approx(0)


def test_the_ceiling_leaves_one_seed_out():
    oracle = [[3.0, 2.0, 1.0], [3.0, 2.0, 1.5], [1.0, 2.0, 3.0]]
    # The others' means are (2, 2, 2.25), (2, 2, 2) and (3, 2, 1.25); the second has no order, so no correlation.
    assert math.isnan(ceiling(oracle)["spearman"].mean)
    assert ceiling(oracle)["regret"].mean == pytest.approx((0.25 + 0 + 1.75) / 3)
    assert ceiling([oracle[0], oracle[1]])["spearman"].mean == pytest.approx(1)
    assert ceiling(oracle[:1]) == {}


def test_agreement_of_a_method_of_the_oracle_and_of_what_did_not_run():
    assert result().agreement("hyma", "linear", "retrieval")["regret"].mean == pytest.approx(0)
    assert result().agreement("grid", "linear", "retrieval")["spearman"].mean > 0.8
    assert result().agreement("random", "linear", "retrieval") == {}


def free(seed=0, order=(0.1, 0.9, 0.5, 0.4, 0.3, 0.2)):
    """A ranking by similarity, which has no score of any task."""
    return Ranking("cka", "linear", seed, {}, {}, list(order))


def test_an_order_of_its_own_replaces_the_scores_in_every_comparison():
    stopped = Ranking("halving", "linear", 0, {"retrieval": [9.0, 1, 1, 1, 1, 1]}, {}, [1000.0, 2001, 1003, 3, 2, 1])
    found = result(rankings=[*result().rankings, stopped, free(1), free(0, [6.0, 5, 4, 3, 2, 1])])
    assert stopped.order("retrieval") == [1, 2, 0, 3, 4, 5]
    assert found.ranks_by("cka", "linear", "retrieval") == [[6, 5, 4, 3, 2, 1], [0.1, 0.9, 0.5, 0.4, 0.3, 0.2]]
    assert found.ranks_by("grid", "linear", "retrieval") == found.scores("grid", "linear", "retrieval")
    assert found.scores("cka", "linear", "retrieval") == found.mean_scores("cka", "linear", "retrieval") == []
    # The oracle's means are 1, 4, 2, 3, 0, 0.5: its best pair is the second, as halving says and its scores do not.
    assert found.agreement("halving", "linear", "retrieval")["regret"].mean == 0
    assert found.agreement("cka", "linear", "retrieval")["regret"].mean == pytest.approx((0 + 3) / 2)


def test_an_order_is_saved_and_an_old_file_has_none(tmp_path):
    path = tmp_path / "ranking.json"
    found = result(rankings=[*result().rankings, free()])
    found.save(path)
    assert SearchResult.load(path).rankings[-1] == free()
    entries = json.loads(path.read_text())["rankings"]
    assert [sorted(entry) for entry in entries[:1]] == [["connector", "details", "method", "scores", "seed"]]
    assert entries[-1]["order_by"] == free().order_by
    # numpy's numbers are numbers too
    result(rankings=[free(order=np.arange(6, dtype=np.float32))]).save(path)
    assert SearchResult.load(path).rankings[0].order_by == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("ranking", "said"),
    [
        (Ranking("cka", "linear", 0, {}), "has no scores for the task retrieval"),
        (Ranking("halving", "linear", 0, {"other": [1.0] * 6}, {}, [1.0] * 6), "no scores for the task retrieval"),
        (free(order=[1.0] * 5), "order_by holds 5 values for 6 pairs"),
        (free(order=[math.inf] + [1.0] * 5), "order_by of pair v0,t0 is inf"),
    ],
)
def test_an_order_must_be_whole(tmp_path, ranking, said):
    with pytest.raises(HymaError, match=said):
        result(rankings=[ranking]).save(tmp_path / "ranking.json")


def test_nothing_is_handed_over_by_a_test_score():
    seen = {"validation retrieval": [1.0, 2.0]}
    assert Ranking("hyma", "linear", 0, {"retrieval": [9.0, 0.0]}, seen).hand_over_by("retrieval") == [1.0, 2.0]
    raced = Ranking("halving", "linear", 0, {"retrieval": [9.0, 0.0]}, seen, [5.0, 3.0])
    assert raced.hand_over_by("retrieval") == [5.0, 3.0]
    with pytest.raises(HymaError, match="cka ranks pairs without connectors"):
        free().hand_over_by("retrieval")

"""Training-free measures against loops in numpy and the libraries, their invariances, and the door that pairs use."""

import importlib.util
import itertools
import math
import sys
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from hyma_mllm.errors import HymaError
from hyma_mllm.pairs import PairGrid
from hyma_mllm.search import measures, similarity
from hyma_mllm.search.measures import cca, gromov_wasserstein, linear_cka, mutual_knn
from hyma_mllm.search.similarity import Measure, Views, pair_scores, views, within, within_scores
from hyma_mllm.search.task import VLMTask

Array = NDArray[np.float64]

EVERY: tuple[Measure, ...] = ("cka", "mutual-knn", "cca", "gromov-wasserstein")
needs_pot = pytest.mark.skipif(importlib.util.find_spec("ot") is None, reason="POT comes with the extra `rivals`")
EACH = [pytest.param(m, marks=needs_pot) if m == "gromov-wasserstein" else m for m in EVERY]

MEASURES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "cka": linear_cka,
    "debiased cka": lambda x, y: linear_cka(x, y, debiased=True),
    "mutual-knn": lambda x, y: mutual_knn(x, y, k=5),
    "cca": lambda x, y: cca(x, y, components=3),
    "plain cca": lambda x, y: cca(x, y, components=3, strength=0.0),
    "gromov-wasserstein": gromov_wasserstein,
}
ALL = [pytest.param(name, marks=needs_pot) if name == "gromov-wasserstein" else name for name in MEASURES]
seeds = st.integers(0, 10_000)


def pair(seed: int, rows: int = 30, widths: tuple[int, int] = (6, 9)) -> tuple[Tensor, Tensor]:
    """Two noisy views of one latent."""
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(rows, 4, generator=g, dtype=torch.float64)
    x, y = (
        latent @ torch.randn(4, w, generator=g, dtype=torch.float64)
        + torch.randn(rows, w, generator=g, dtype=torch.float64)
        for w in widths
    )
    return x, y


def rotation(width: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64)).Q


def gram_hsic(x: Array, y: Array, debiased: bool) -> float:
    """By Gram matrices and sums over rows, as the papers write it."""
    n = len(x)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    if not debiased:
        centre = np.eye(n) - 1 / n
        return float(np.trace(k @ centre @ l @ centre))
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    one = np.ones(n)
    total = (
        np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    )
    return float(total / (n * (n - 3)))


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("widths", [(6, 9), (50, 7), (40, 60)])
def test_cka_is_the_papers(debiased: bool, widths: tuple[int, int]) -> None:
    x, y = pair(0, widths=widths)
    a, b = x.numpy() + 3, y.numpy() - 1
    wanted = gram_hsic(a, b, debiased) / math.sqrt(gram_hsic(a, a, debiased) * gram_hsic(b, b, debiased))
    assert linear_cka(torch.from_numpy(a), torch.from_numpy(b), debiased) == pytest.approx(wanted, rel=1e-9)


def test_debiased_cka_of_unrelated_features_is_zero_in_the_mean_and_the_plain_is_not() -> None:
    g = torch.Generator().manual_seed(0)
    drawn = [(torch.randn(60, 40, generator=g), torch.randn(60, 50, generator=g)) for _ in range(60)]
    plain = np.array([linear_cka(x, y) for x, y in drawn])
    fair = np.array([linear_cka(x, y, debiased=True) for x, y in drawn])
    assert plain.min() > 0.3
    assert abs(fair.mean()) < 4 * fair.std() / math.sqrt(len(fair))
    assert (fair < 0).any()


@pytest.mark.parametrize("chunk", [7, 1024])
def test_mutual_knn_is_a_loop_over_rows(chunk: int) -> None:
    x, y = pair(1)

    def nearest(features: Array, row: int, k: int) -> set[int]:
        unit = [r / math.sqrt(sum(v * v for v in r)) for r in features]
        others = [other for other in range(len(features)) if other != row]
        return set(sorted(others, key=lambda other: -float(unit[row] @ unit[other]))[:k])

    for k in (1, 5, 29):
        shares = [len(nearest(x.numpy(), r, k) & nearest(y.numpy(), r, k)) / k for r in range(30)]
        with mock.patch.object(measures, "CHUNK", chunk):
            assert mutual_knn(x, y, k) == pytest.approx(sum(shares) / 30, abs=1e-12)
    assert mutual_knn(x, y, 29) == 1.0


@pytest.mark.parametrize("components", [1, 3, 5])
def test_cca_without_a_ridge_is_sklearns(components: int) -> None:
    from sklearn.cross_decomposition import CCA

    x, y = pair(2, rows=60)
    a, b = CCA(n_components=components, max_iter=5000, tol=1e-12).fit(x.numpy(), y.numpy()).transform(x, y)
    wanted = [np.corrcoef(a[:, c], b[:, c])[0, 1] for c in range(components)]
    assert cca(x, y, components, strength=0.0) == pytest.approx(float(np.mean(wanted)), abs=1e-5)


@pytest.mark.parametrize("strength", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("widths", [(6, 9), (45, 9)])
def test_cca_with_a_ridge_is_the_generalised_eigenproblem(strength: float, widths: tuple[int, int]) -> None:
    import scipy.linalg

    x, y = (side.numpy() for side in pair(3, widths=widths))
    x, y = x - x.mean(0), y - y.mean(0)

    def covariance(side: Array) -> Array:
        c = side.T @ side / len(side)
        return np.asarray(c + strength * np.trace(c) / len(c) * np.eye(len(c)))

    cross = x.T @ y / len(x)
    squares = scipy.linalg.eigh(cross @ np.linalg.solve(covariance(y), cross.T), covariance(x), eigvals_only=True)
    wanted = np.sqrt(squares[::-1][:4].clip(0)).mean()
    assert cca(torch.from_numpy(x), torch.from_numpy(y), 4, strength) == pytest.approx(wanted, rel=1e-7)


def test_missing_canonical_correlations_count_as_zero() -> None:
    x, y = pair(4)
    line = x[:, :1] @ torch.ones(1, 5, dtype=torch.float64)  # rank 1
    assert cca(line, y, 4, strength=0.0) == pytest.approx(cca(line, y, 1, strength=0.0) / 4)
    assert cca(x, x, 12, strength=0.0) == pytest.approx(6 / 12)


def scaled_cosine_distances(x: Tensor) -> Array:
    unit = torch.nn.functional.normalize(x, dim=1).numpy()
    distance = np.array([[0 if i == j else 1 - float(a @ b) for j, b in enumerate(unit)] for i, a in enumerate(unit)])
    return distance / distance.mean()


@needs_pot
def test_gromov_wasserstein_is_no_worse_than_its_starts_and_near_the_best_matching() -> None:
    import ot

    for seed in range(4):
        x, y = pair(seed, rows=6)
        a, b = scaled_cosine_distances(x), scaled_cosine_distances(y)

        def loss(plan: Array, a: Array = a, b: Array = b) -> float:
            n = range(len(a))
            every = itertools.product(n, n, n, n)
            return float(sum((a[i, k] - b[j, m]) ** 2 * plan[i, j] * plan[k, m] for i, j, k, m in every))

        found = gromov_wasserstein(x, y) ** 2
        assert found <= loss(np.full((6, 6), 1 / 36)) + 1e-9
        assert found <= loss(np.eye(6) / 6) + 1e-9
        assert found <= ot.gromov_wasserstein2(a, b) + 1e-7
        best = min(float(np.square(a - b[np.ix_(order, order)]).mean()) for order in itertools.permutations(range(6)))
        if seed == 0:
            # An optimum of the relaxed problem may lie below every permutation's, by little.
            assert 0.5 * best <= found <= 2 * best


@needs_pot
def test_gromov_wasserstein_takes_the_same_rows_for_one_seed() -> None:
    x, y = pair(5, rows=40)
    rows = measures.choose(torch.arange(40), 15, 3)
    assert len(rows) == 15
    assert gromov_wasserstein(x, y, 15, 3) == gromov_wasserstein(x[rows], y[rows])
    assert gromov_wasserstein(x, y, 15, 3) == gromov_wasserstein(x, y, 15, 3)
    assert gromov_wasserstein(x, y, 15, 3) != gromov_wasserstein(x, y, 15, 4)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=12, deadline=None)
@given(seed=seeds, scale=st.floats(1e-3, 1e3))
def test_rotations_scales_and_the_order_of_rows_do_not_matter(name: str, seed: int, scale: float) -> None:
    x, y = pair(seed)
    measure = MEASURES[name]
    plain = measure(x, y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    close = {"rel": 1e-4, "abs": 1e-7} if name == "gromov-wasserstein" else {"rel": 1e-8, "abs": 1e-10}
    assert measure(x @ rotation(6, seed), y) == pytest.approx(plain, **close)
    assert measure(x, y @ rotation(9, seed) * scale) == pytest.approx(plain, **close)
    assert measure(x[order], y[order]) == pytest.approx(plain, **close)
    assert measure(y, x) == pytest.approx(plain, **close)


@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_cca_without_a_ridge_does_not_feel_invertible_maps(seed: int) -> None:
    x, y = pair(seed)
    g = torch.Generator().manual_seed(seed)
    sheer = torch.eye(6, dtype=torch.float64) + torch.randn(6, 6, generator=g, dtype=torch.float64).triu(1)
    mapped = x @ (rotation(6, seed) @ sheer) + torch.randn(6, generator=g, dtype=torch.float64)
    assert cca(mapped, y, 4, strength=0.0) == pytest.approx(cca(x, y, 4, strength=0.0), rel=1e-7)


@pytest.mark.parametrize("name", ["cka", "debiased cka", "cca", "plain cca"])
def test_shifts_do_not_matter(name: str) -> None:
    x, y = pair(6)
    assert MEASURES[name](x + 5, y - 2) == pytest.approx(MEASURES[name](x, y), rel=1e-9)


@pytest.mark.parametrize("name", [p for p in ALL if p != "cca"])
@settings(max_examples=12, deadline=None)
@given(seed=seeds)
def test_nothing_is_more_like_a_model_than_itself(name: str, seed: int) -> None:
    x, y = pair(seed)
    own = MEASURES[name](x, x)
    assert own == pytest.approx(0.0 if name == "gromov-wasserstein" else 1.0, abs=1e-6)
    assert MEASURES[name](x, y) <= own + 1e-9


@settings(max_examples=25, deadline=None)
@given(seed=seeds, strength=st.floats(0, 10))
def test_under_a_ridge_two_models_agree_at_most_as_with_themselves_in_the_mean(seed: int, strength: float) -> None:
    x, y = pair(seed)
    bound = math.sqrt(cca(x, x, 4, strength) * cca(y, y, 4, strength))
    assert 0 <= cca(x, y, 4, strength) <= bound + 1e-9


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_encoder_scores_lowest(name: str, dtype: torch.dtype) -> None:
    x, y = (side.to(dtype) for side in pair(7))
    for value in (0.0, 0.1, 1e-20, 12345.678):
        same = torch.full_like(x, value)
        lowest = -30.0 if name == "gromov-wasserstein" else 0.0
        assert MEASURES[name](same, y) == MEASURES[name](y, same) == MEASURES[name](same, same) == lowest
    assert MEASURES[name](x, y) > lowest


@pytest.mark.parametrize("name", ALL)
def test_odd_features_give_finite_scores(name: str) -> None:
    x, y = (side.float() for side in pair(8))
    measure = MEASURES[name]
    low = x[:, :1] * torch.ones(1, 6)
    repeated = x[torch.arange(30) // 10]  # three distinct rows
    lone = torch.zeros(30, 6)
    lone[3, 2] = 1.0
    wide = torch.randn(30, 400, generator=torch.Generator().manual_seed(0))
    for odd in (low, repeated, lone, wide, torch.cat([x, torch.zeros(30, 3)], 1)):
        for score in (measure(odd, y), measure(y, odd), measure(odd, odd), measure(odd, low)):
            assert math.isfinite(score)
            assert -30 <= score <= 1 + 1e-9
    for size in (1e-30, 1e30):
        assert measure(x * size, y) == pytest.approx(measure(x, y), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_float32_features_score_like_their_float64_form(name: str) -> None:
    x, y = pair(9)
    close = pytest.approx(MEASURES[name](x, y), rel=1e-3)
    assert MEASURES[name](x.float(), y.float()) == close


@pytest.mark.parametrize("name", ALL)
def test_rows_that_do_not_match_are_refused(name: str) -> None:
    x, y = pair(10)
    with pytest.raises(ValueError, match="matched rows"):
        MEASURES[name](x, y[:-1])
    with pytest.raises(ValueError, match="matched rows"):
        MEASURES[name](x[0], y[0])
    with pytest.raises(HymaError, match="3 rows are too few"):
        MEASURES[name](x[:3], y[:3])
    y[4, 2] = math.nan
    with pytest.raises(HymaError, match="not finite"):
        MEASURES[name](x, y)


def test_values_out_of_range_are_refused() -> None:
    x, y = pair(11)
    with pytest.raises(HymaError, match="30 rows are too few for this similarity measure; give at least 31"):
        mutual_knn(x, y, 30)
    with pytest.raises(ValueError, match="k is 0"):
        mutual_knn(x, y, 0)
    with pytest.raises(ValueError, match="0 components"):
        cca(x, y, 0)
    with pytest.raises(ValueError, match="ridge of -1"):
        cca(x, y, 2, -1.0)


def test_without_pot_one_sentence_says_what_to_install() -> None:
    x, y = pair(12)
    with mock.patch.dict(sys.modules, {"ot": None, "ot.gromov": None}), pytest.raises(HymaError, match=r"\[rivals\]"):
        gromov_wasserstein(x, y)


# The door.


def test_views_are_training_pictures_and_the_mean_of_their_captions(task: VLMTask) -> None:
    seen = views(task, 30, seed=1)
    assert [tuple(x.shape) for x in seen.vision] == [(30, 16), (30, 24)]
    assert [tuple(x.shape) for x in seen.text] == [(30, 20), (30, 20), (30, 12)]
    train = {p: task.images[0][torch.tensor([p])][0] for p in task.train.tolist()}
    for row in range(30):
        (picture,) = [p for p, x in train.items() if torch.equal(x, seen.vision[0][row])]
        assert torch.equal(seen.vision[1][row], task.images[1][torch.tensor([picture])][0])
        first, last = task.first_caption[picture : picture + 2].tolist()
        for model, text in zip(task.texts, seen.text, strict=True):
            wanted = sum(model[torch.tensor([c])][0].double() for c in range(first, last)) / (last - first)
            torch.testing.assert_close(text[row].double(), torch.as_tensor(wanted), atol=1e-6, rtol=1e-5)
    again, other = views(task, 30, seed=1), views(task, 30, seed=2)
    assert torch.equal(again.vision[0], seen.vision[0])
    assert not torch.equal(other.vision[0], seen.vision[0])
    assert len(views(task, 10_000, seed=0).vision[0]) == len(task.train)
    with pytest.raises(HymaError, match="3 training pictures are too few"):
        views(task, 3, seed=0)


@pytest.mark.parametrize("measure", EACH)
def test_pairs_are_scored_in_grid_order_as_one_by_one(task: VLMTask, measure: Measure) -> None:
    seen = views(task, 40, seed=0)
    single: dict[str, Callable[[Tensor, Tensor], float]] = {
        "cka": lambda x, y: linear_cka(x, y, debiased=True),
        "mutual-knn": mutual_knn,
        "cca": cca,
        "gromov-wasserstein": gromov_wasserstein,
    }
    scores, flops = pair_scores(measure, seen, task.grid)
    wanted = [single[measure](seen.vision[p.vision], seen.text[p.text]) for p in task.grid.pairs()]
    assert scores == wanted
    assert len(set(scores)) > 1
    assert flops > 0
    assert (scores, flops) == pair_scores(measure, seen, task.grid)


@pytest.mark.parametrize("measure", EACH)
def test_a_duplicate_scores_the_same_and_noise_scores_lower(task: VLMTask, measure: Measure) -> None:
    seen = views(task, 60, seed=0)
    noise = torch.randn(60, 16, generator=torch.Generator().manual_seed(5))
    grid = PairGrid(("v", "v#2", "noise", "none"), (16, 16, 16, 4), ("t",), (20,))
    vision = [seen.vision[0], seen.vision[0].clone(), noise, torch.ones(60, 4)]
    scores, _ = pair_scores(measure, Views(vision, [seen.text[0]]), grid)
    assert scores[0] == scores[1] > scores[2]
    assert scores[3] == (-60.0 if measure == "gromov-wasserstein" else 0.0) < scores[0]


@pytest.mark.parametrize("measure", EACH)
def test_a_models_half_is_done_once(task: VLMTask, measure: Measure) -> None:
    kind = similarity._kind(measure)
    prepare = mock.Mock(side_effect=kind.prepare)
    compare = mock.Mock(side_effect=kind.compare)
    with mock.patch.object(similarity, "_kind", lambda _: kind._replace(prepare=prepare, compare=compare)):
        pair_scores(measure, views(task, 20, 0), task.grid)
    assert (prepare.call_count, compare.call_count) == (5, 6)


def test_flops_are_those_of_the_products(task: VLMTask) -> None:
    """What torch counts is what is billed, decompositions aside; those have forms of their own."""
    from torch.utils.flop_counter import FlopCounterMode

    seen = views(task, 40, 0)
    for measure in ("cka", "mutual-knn"):
        with FlopCounterMode(display=False) as counter:
            _, flops = pair_scores(measure, seen, task.grid)
        assert flops <= counter.get_total_flops() <= 1.2 * flops  # row sums are not billed
    assert measures.svd_flops(100, 10, vectors=False) == measures.svd_flops(10, 100, vectors=False) == 22_000
    assert measures.svd_flops(100, 10, vectors=True) == 71_000
    flops = pair_scores("cca", seen, task.grid)[1]
    whole = sum(measures.svd_flops(40, w, vectors=True) for w in (16, 24, 20, 20, 12))
    pairs = [(v, t) for v in (16, 24) for t in (20, 20, 12)]
    # The pictures are unit rows, the captions have 12 dimensions that the rest is a map of.
    ranks = {16: 12, 24: 24, 20: 12, 12: 12}
    for v, t in pairs:
        whole += 2.0 * 40 * ranks[v] * ranks[t] + measures.svd_flops(ranks[v], ranks[t], vectors=False)
    assert flops == pytest.approx(whole, rel=0.2)


@pytest.mark.parametrize("measure", EACH)
def test_within_a_shelf_is_symmetric_and_highest_on_the_diagonal(task: VLMTask, measure: Measure) -> None:
    shelf = views(task, 40, 0).text
    table, flops = within(measure, shelf)
    assert torch.equal(table, within_scores(measure, shelf))
    assert table.dtype == torch.float64
    assert torch.equal(table, table.T)
    assert flops > 0
    if measure != "cca":  # under its ridge 1 is not reached
        assert (table <= table.diagonal()[:, None] + 1e-9).all()
    one, _ = pair_scores(measure, Views(shelf[:1], shelf[2:]), PairGrid(("a",), (20,), ("b",), (12,)))
    assert table[0, 2] == pytest.approx(one[0], rel=1e-6)


def test_what_does_not_belong_together_is_refused(task: VLMTask) -> None:
    seen = views(task, 20, 0)
    with pytest.raises(HymaError, match=r"'cka2' is unknown; did you mean .*cka"):
        pair_scores("cka2", seen, task.grid)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="other models"):
        pair_scores("cka", Views(seen.vision, seen.text[:2]), task.grid)
    with pytest.raises(ValueError, match="matched rows"):
        within_scores("cka", [])

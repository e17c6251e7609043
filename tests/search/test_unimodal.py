"""The uni-modal score: each part against a plain loop or the library, and what the data do not allow."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hyma_mllm.errors import HymaError
from hyma_mllm.search import unimodal
from hyma_mllm.search.measures import choose
from hyma_mllm.search.task import VLMTask, captions_of
from hyma_mllm.search.unimodal import (
    caption_pairs,
    closeness,
    concepts,
    linear_probe,
    rank_me,
    standardised,
    unimodal_scores,
)


@pytest.fixture
def labels() -> Tensor:
    """The latent class of each picture of the synthetic task."""
    return torch.arange(120) % 4


def single_captions(task: VLMTask) -> VLMTask:
    first = task.first_caption[:-1]
    texts = [text[first] for text in task.texts]
    return dataclasses.replace(
        task, texts=texts, first_caption=torch.arange(121), caption_group=torch.arange(120), zero_shot=[]
    )


@pytest.mark.parametrize("shape", [(40, 12), (9, 30)])
def test_rank_me_is_the_papers(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 5, shape[1])
    values = np.sqrt(np.linalg.eigvalsh((x.double() @ x.double().T).numpy()).clip(0))
    entropy = 0.0
    for p in values / values.sum():
        entropy -= p * math.log(p) if p > 1e-7 else 0.0
    assert rank_me(x) == pytest.approx(math.exp(entropy), rel=1e-4)


def test_rank_me_counts_dimensions() -> None:
    q = torch.linalg.qr(torch.randn(50, 8, generator=torch.Generator().manual_seed(0))).Q
    assert rank_me(q) == pytest.approx(8, rel=1e-4)
    assert rank_me(7 * q[:, :3]) == pytest.approx(3, rel=1e-4)
    assert rank_me(torch.ones(50, 8)) == pytest.approx(1, abs=1e-4)
    assert rank_me(torch.zeros(50, 8)) == 0


def test_the_probe_is_a_ridge_on_unseen_concepts(task: VLMTask, labels: Tensor) -> None:
    """Least squares on one-hot labels in {-1, 1} with a mean eigenvalue of ridge, fold by fold."""
    from sklearn.model_selection import StratifiedGroupKFold

    x, classes = task.images[1][task.train], labels[task.train]
    groups = torch.arange(70) // 2
    folds = list(StratifiedGroupKFold(5, shuffle=True, random_state=3).split(x, classes, groups))
    moved = x.double().numpy() - x.double().numpy().mean(0)
    ridge = np.square(moved).sum() / 24
    right = 0
    for train, test in folds:
        assert not set(groups[train].tolist()) & set(groups[test].tolist())
        mean, target = moved[train].mean(0), np.where(classes[train].numpy()[:, None] == np.arange(4), 1.0, -1.0)
        a = moved[train] - mean
        weights = np.linalg.solve(a.T @ a + ridge * np.eye(24), a.T @ (target - target.mean(0)))
        guess = ((moved[test] - mean) @ weights + target.mean(0)).argmax(1)
        right += int((guess == classes[test].numpy()).sum())
    score, flops = linear_probe(x, classes, groups, 3)
    assert score == pytest.approx(100 * right / 70)
    assert score > 60  # a quarter by chance
    assert flops > 5 * 2 * 56 * 24 * 24


def test_the_probe_of_a_constant_encoder_names_the_largest_class() -> None:
    classes = torch.tensor([0] * 30 + [1] * 20)
    for x in (torch.ones(50, 6), torch.zeros(50, 6)):
        assert linear_probe(x, classes, torch.arange(50), 0)[0] == 60


def test_closeness_is_the_share_of_pairs_in_order() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, generator=g)
    first, second = torch.randint(12, (2, 60), generator=g)
    same = torch.rand(60, generator=g) < 0.3
    cosine = [float(torch.cosine_similarity(x[a].double(), x[b].double(), dim=0)) for a, b in zip(first, second)]  # noqa: B905
    near = [c for c, s in zip(cosine, same, strict=True) if s]
    far = [c for c, s in zip(cosine, same, strict=True) if not s]
    wins = sum((n > f + 1e-12) + 0.5 * (abs(n - f) <= 1e-12) for n in near for f in far)
    found = closeness(x, first, second, same)
    assert found == pytest.approx(100 * wins / (len(near) * len(far)), abs=0.2)
    assert closeness(torch.full((12, 5), 0.3), first, second, same) == 50
    assert closeness(x * 1e-20, first, second, same) == pytest.approx(found, abs=0.2)


def test_pairs_of_captions_are_what_they_say(task: VLMTask) -> None:
    pictures = choose(task.train, 60, 0)
    # The first captions of the first two pictures say the same, and so do two captions of one picture.
    captions, owner = captions_of(task.first_caption, pictures)
    starts = task.first_caption[pictures]
    group = task.caption_group.clone()
    group[starts[1]] = group[starts[0]]
    many = int((torch.bincount(owner) == 3).nonzero()[0])
    group[starts[many] + 1] = group[starts[many]]
    changed = dataclasses.replace(task, caption_group=group)
    pairs = caption_pairs(changed, pictures, seed=1)
    assert pairs is not None
    owner_of = dict(zip(captions.tolist(), owner.tolist(), strict=True))
    shows = concepts(changed, pictures)
    near = set()
    for one, other, same in zip(pairs.first.tolist(), pairs.second.tolist(), pairs.same.tolist(), strict=True):
        assert group[one] != group[other]
        assert (owner_of[one] == owner_of[other]) == same
        if same:
            near.add((one, other))
        else:
            assert shows[owner_of[one]] != shows[owner_of[other]]
    wanted = {
        (a, b) for a in captions.tolist() for b in captions.tolist()
        if a < b and owner_of[a] == owner_of[b] and group[a] != group[b]
    }  # fmt: skip
    assert near == wanted
    assert int(pairs.same.sum()) == len(near)
    again = caption_pairs(changed, pictures, seed=1)
    assert again is not None
    assert torch.equal(again.second, pairs.second)


def test_at_most_so_many_captions_of_a_picture_are_compared(task: VLMTask) -> None:
    crowd = dataclasses.replace(task, first_caption=torch.arange(13) * 20, caption_group=torch.arange(240))
    pairs = caption_pairs(crowd, torch.arange(12), seed=0)
    assert pairs is not None
    assert int(pairs.same.sum()) == 12 * 5 * 4 // 2


@settings(max_examples=40, deadline=None)
@given(edges=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5)), min_size=1, max_size=20))
def test_concepts_are_chains_of_equal_captions(edges: list[tuple[int, int]]) -> None:
    says: list[list[int]] = [[100 + p] for p in range(8)]
    for picture, group in edges:
        says[picture].append(group)
    counts = torch.tensor([len(captions) for captions in says])
    task = VLMTask.__new__(VLMTask)
    task.first_caption = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    task.caption_group = torch.tensor([group for captions in says for group in captions])
    found = concepts(task, torch.arange(8)).tolist()
    # Spread the smallest number until nothing moves.
    wanted = list(range(8))
    for _ in range(8):
        for a in range(8):
            for b in range(8):
                if set(says[a]) & set(says[b]):
                    wanted[a] = wanted[b] = min(wanted[a], wanted[b])
    assert [[x == y for y in found] for x in found] == [[x == y for y in wanted] for x in wanted]


@given(scores=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9))
def test_standardised_scores_have_mean_0_and_spread_1(scores: list[float]) -> None:
    found = np.array(standardised(scores))
    assert np.isfinite(found).all()
    if np.ptp(scores) > 1e-3:
        assert found.mean() == pytest.approx(0, abs=1e-6)
        assert found.std() == pytest.approx(1, rel=1e-6)
        order = np.argsort(scores, kind="stable")
        assert (np.diff(found[order]) >= 0).all()


def test_scores_that_are_all_alike_say_nothing() -> None:
    assert standardised([0.1 + 0.2, 0.3, 0.3]) == [0.0] * 3
    assert standardised([7.0]) == [0.0]
    assert standardised([0.0, 0.0]) == [0.0] * 2


def test_a_pairs_score_is_the_sum_of_its_models(task: VLMTask, labels: Tensor) -> None:
    scores, flops, name = unimodal_scores(task, labels, 60, 0)
    assert name == "vision: linear probe, text: caption AUC"
    vision, text = unimodal.vision_scores(task, labels, 60, 0), unimodal.text_scores(task, 60, 0)
    assert all(40 < score <= 100 for score in vision.scores)
    assert all(70 < score <= 100 for score in text.scores)
    v, t = standardised(vision.scores), standardised(text.scores)
    assert scores == [v[p.vision] + t[p.text] for p in task.grid.pairs()]
    assert flops == vision.flops + text.flops > 0
    assert (scores, flops, name) == unimodal_scores(task, labels, 60, 0)


def test_better_encoders_and_duplicates_are_told(task: VLMTask, labels: Tensor) -> None:
    g = torch.Generator().manual_seed(1)
    noise, babble = torch.randn(120, 16, generator=g), torch.randn(len(task.texts[0]), 20, generator=g)
    changed = dataclasses.replace(
        task, images=[task.images[0], noise], texts=[task.texts[0], task.texts[0].clone(), babble[:, :12]]
    )  # type: ignore[index]
    scores, _, _ = unimodal_scores(changed, labels, 70, 0)
    assert scores[0] == scores[1] > scores[2]
    assert scores[0] > scores[3] > scores[5]


def test_without_labels_or_several_captions_rank_me_is_said(task: VLMTask, labels: Tensor) -> None:
    alone = single_captions(task)
    scores, flops, name = unimodal_scores(alone, None, 50, 0)
    assert name == "vision: RankMe, text: RankMe"
    rows = choose(task.train, 50, 0)
    v = standardised([rank_me(x[rows]) for x in alone.images])
    t = standardised([rank_me(x[rows]) for x in alone.texts])
    assert scores == [v[p.vision] + t[p.text] for p in task.grid.pairs()]
    assert flops > 0
    assert unimodal_scores(task, None, 50, 0)[2] == "vision: RankMe, text: caption AUC"
    assert unimodal_scores(alone, labels, 50, 0)[2] == "vision: linear probe, text: RankMe"


def test_labels_that_do_not_carry_a_probe_are_left_out(task: VLMTask, labels: Tensor) -> None:
    def measure(known: Tensor, of: VLMTask = task) -> str:
        return unimodal_scores(of, known, 70, 0)[2].split(",")[0]

    nothing = torch.full_like(labels, -1)
    assert measure(nothing) == "vision: RankMe"
    assert measure(torch.zeros_like(labels)) == "vision: RankMe"  # one class
    assert measure(torch.arange(120)) == "vision: RankMe"  # a class each
    held_out = labels.clone()
    held_out[task.train] = -1
    assert measure(held_out) == "vision: RankMe"
    some = nothing.clone()
    some[task.train[:40]] = labels[task.train[:40]]
    assert measure(some) == "vision: linear probe"
    # Many pictures of four concepts are not many concepts.
    few = dataclasses.replace(task, caption_group=torch.repeat_interleave(labels, task.first_caption.diff()))
    assert measure(labels, few) == "vision: RankMe"


def test_only_training_pictures_are_read(task: VLMTask, labels: Tensor) -> None:
    held = torch.cat([task.validation, task.test])
    images = [x[torch.arange(120)].clone() for x in task.images]
    texts = [x[torch.arange(len(x))].clone() for x in task.texts]
    captions, _ = captions_of(task.first_caption, held)
    for x in images:
        x[held] = math.nan
    for x in texts:
        x[captions] = math.nan
    blind = dataclasses.replace(task, images=images, texts=texts)
    for known in (labels, None):
        assert unimodal_scores(blind, known, 60, 0) == unimodal_scores(task, known, 60, 0)


def test_degenerate_encoders_give_finite_scores(task: VLMTask, labels: Tensor) -> None:
    line = torch.arange(120.0)[:, None] * torch.ones(1, 24)
    count = len(task.texts[0])
    changed = dataclasses.replace(
        task,
        images=[torch.ones(120, 16), line],
        texts=[torch.zeros(count, 20), torch.ones(count, 20), torch.randn(count, 1) @ torch.ones(1, 12)],
    )
    for of in (changed, single_captions(changed)):
        for known in (labels, None):
            assert np.isfinite(unimodal_scores(of, known, 60, 0)[0]).all()


def test_bad_input_is_refused(task: VLMTask, labels: Tensor) -> None:
    with pytest.raises(ValueError, match="labels of 120 pictures"):
        unimodal_scores(task, labels[:-1], 60, 0)
    with pytest.raises(HymaError, match="2 training pictures are too few"):
        unimodal_scores(task, None, 2, 0)
    for part in ("images", "texts"):
        broken = [x[torch.arange(len(x))].clone() for x in getattr(task, part)]
        broken[1][:, 3] = math.inf
        with pytest.raises(HymaError, match="not finite"):
            unimodal_scores(dataclasses.replace(task, **{part: broken}), labels, 60, 0)

"""The uni-modal score of a pair: how good its two encoders are, each alone, without a look at how they fit.

Vision encoders are judged by a linear probe where the pictures have labels, text encoders by whether captions of one
picture lie closer than captions of others. Where the data do not allow this, RankMe (Garrido et al., 2023, section
3), an effective rank, takes the place: it needs nothing but features, and favours wide encoders. FLOPs are counted as
in `measures`.

scikit-learn and scipy are imported where they are used: they take a second that `--help` need not wait for.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hyma_mllm.data.resident import FeatureRows
from hyma_mllm.search.measures import CHUNK, centred, choose, directions, finite, svd_flops
from hyma_mllm.search.samplers import generator
from hyma_mllm.search.task import VLMTask, captions_of

FOLDS = 5
"""Of the probe's cross-validation; a class counts if it occurs in at least so many concepts."""

CAPTIONS = 5
"""Captions of a picture that are compared with each other, at most."""

NEGATIVES = 4
"""Pairs of captions of different pictures, for each pair of captions of the same one."""

LEAST_PAIRS = 20
"""Pairs of captions of the same picture without which their closeness says nothing."""


class Shelf(NamedTuple):
    """Each model of one side alone: its score, the FLOPs of them all, and what the score is."""

    scores: list[float]
    flops: float
    measure: str


class CaptionPairs(NamedTuple):
    """Pairs of captions: row numbers of the first and of the second, and whether they are of the same picture."""

    first: Tensor
    second: Tensor
    same: Tensor


def unimodal_scores(task: VLMTask, labels: Tensor | None, rows: int, seed: int) -> tuple[list[float], float, str]:
    """Score of every pair in grid order: z(vision score) + z(text score), each standardised over its shelf.

    Args:
        task: only its training pictures are read.
        labels: [pictures] int64 class of every picture of the task, -1 where there is none; None if there are none.
        rows: training pictures to take at most.
        seed: which, and of the probe's folds.

    Returns:
        Scores (higher is better), FLOPs, and which measures they come from.

    Raises:
        HymaError: if there are too few training pictures, or features that are not finite.
        ValueError: if the labels are not one per picture.
    """
    if labels is not None and labels.shape != (len(task.first_caption) - 1,):
        raise ValueError(f"labels of {len(task.first_caption) - 1} pictures, not {list(labels.shape)}")
    vision, text = vision_scores(task, labels, rows, seed), text_scores(task, rows, seed)
    of_vision, of_text = standardised(vision.scores), standardised(text.scores)
    scores = [of_vision[pair.vision] + of_text[pair.text] for pair in task.grid.pairs()]
    return scores, vision.flops + text.flops, f"vision: {vision.measure}, text: {text.measure}"


def vision_scores(task: VLMTask, labels: Tensor | None, rows: int, seed: int) -> Shelf:
    """Accuracy of a linear probe in percent, or RankMe where too few training pictures have labels."""
    pictures = _probed(task, labels, rows, seed)
    if labels is None or pictures is None:
        return _ranks(task.images, choose(task.train, rows, seed))
    groups, classes = concepts(task, pictures), labels[pictures]
    scores, flops = [], 0.0
    for model in task.images:
        score, cost = linear_probe(finite(model[pictures]), classes, groups, seed)
        scores.append(score)
        flops += cost
    return Shelf(scores, flops, "linear probe")


def text_scores(task: VLMTask, rows: int, seed: int) -> Shelf:
    """Area under the ROC curve of caption cosines, or RankMe where too few pictures have several captions."""
    pictures = choose(task.train, rows, seed)
    pairs = caption_pairs(task, pictures, seed)
    if pairs is None:
        return _ranks(task.texts, task.first_caption[pictures])
    used, position = torch.unique(torch.cat([pairs.first, pairs.second]), return_inverse=True)
    first, second = torch.split(position, len(pairs.first))
    scores = [closeness(finite(model[used]), first, second, pairs.same) for model in task.texts]
    flops = 2.0 * len(first) * sum(task.grid.text_widths)
    return Shelf(scores, flops, "caption AUC")


def rank_me(x: Tensor) -> float:
    """Effective rank: exp of the entropy of the singular values over their sum (Garrido et al., 2023, section 3).

    Between 1 and min(rows, width); 0 for features that are all zero.

    Args:
        x: [rows, width] floating, not centred, as in the paper.
    """
    sizes = torch.linalg.svdvals(x.double())
    if not sizes[0] > 0:
        return 0.0
    return float(torch.special.entr(sizes / sizes.sum()).sum().exp())


def linear_probe(x: Tensor, labels: Tensor, groups: Tensor, seed: int) -> tuple[float, float]:
    """Accuracy of a ridge classifier in percent on concepts that it has not seen, and its FLOPs.

    The ridge is the mean eigenvalue of the features' covariance. An encoder that gives every picture the same feature
    scores the share of the largest class.

    Args:
        x: [pictures, width] floating.
        labels: [pictures] int64 classes, at least two, each in at least `FOLDS` groups.
        groups: [pictures] int64 concepts; none stands in training and test at once.
        seed: of the folds.
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    rows, width = x.shape
    # Features of total square 1 have a mean eigenvalue of 1 / width; the labels are not looked at for it.
    guessed = cross_val_predict(
        RidgeClassifier(alpha=1 / width), centred(x).numpy(), labels.numpy(), groups=groups.numpy(),
        cv=StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed % 2**32),
    )  # fmt: skip
    train, short = rows * (FOLDS - 1) / FOLDS, min(rows * (FOLDS - 1) / FOLDS, width)
    classes = len(torch.unique(labels))
    solve = 2.0 * train * width * short + short**3 / 3 + 2.0 * train * width * classes
    return 100 * float((guessed == labels.numpy()).mean()), FOLDS * solve + 2.0 * rows * width * classes


def closeness(x: Tensor, first: Tensor, second: Tensor, same: Tensor) -> float:
    """Chance in percent that two captions of one picture have a higher cosine than two of different pictures.

    50 is guessing, and what an encoder gets that gives every caption the same feature.

    Args:
        x: [captions, width] floating.
        first: [pairs] int64 row numbers.
        second: [pairs] int64 row numbers.
        same: [pairs] bool, whether they are of the same picture; both kinds occur.
    """
    from sklearn.metrics import roc_auc_score

    unit = directions(x)
    blocks = zip(torch.split(first, CHUNK), torch.split(second, CHUNK), strict=True)
    cosine = torch.cat([(unit[one] * unit[other]).sum(1) for one, other in blocks])
    return 100 * float(roc_auc_score(same.numpy(), cosine.numpy()))


def caption_pairs(task: VLMTask, pictures: Tensor, seed: int) -> CaptionPairs | None:
    """Captions of the same picture that say different things, and `NEGATIVES` times as many of different concepts.

    Args:
        task: tells whose captions are whose and which say the same.
        pictures: [pictures] int64 row numbers.
        seed: of the pairs of different concepts.

    Returns:
        The pairs; None where fewer than `LEAST_PAIRS` are of the same picture or of different concepts.
    """
    captions, owner = captions_of(task.first_caption, pictures)
    kept = captions - task.first_caption[pictures][owner] < CAPTIONS
    captions, owner = captions[kept], owner[kept]
    says, shows = task.caption_group[captions], concepts(task, pictures)[owner]
    one, other = [], []
    for step in range(1, CAPTIONS):
        at = (owner[:-step] == owner[step:]) & (says[:-step] != says[step:])
        one.append(at.nonzero()[:, 0])
        other.append(one[-1] + step)
    near = torch.stack([torch.cat(one), torch.cat(other)])
    drawn = torch.randint(len(captions), (2, NEGATIVES * near.shape[1]), generator=generator(seed, 12))
    far = drawn[:, shows[drawn[0]] != shows[drawn[1]]]
    if min(near.shape[1], far.shape[1]) < LEAST_PAIRS:
        return None
    first, second = captions[torch.cat([near, far], dim=1)]
    return CaptionPairs(first, second, torch.arange(len(first)) < near.shape[1])


def concepts(task: VLMTask, pictures: Tensor) -> Tensor:
    """A number for what each picture shows [pictures] int64: pictures are one concept when any captions say the same.

    A chain of such pictures is one concept too, as in the split of the data.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    captions, owner = captions_of(task.first_caption, pictures)
    sayings, said = torch.unique(task.caption_group[captions], return_inverse=True)
    size = len(pictures) + len(sayings)
    edges = (np.ones(len(owner)), (owner.numpy(), len(pictures) + said.numpy()))
    found = connected_components(coo_array(edges, shape=(size, size)), directed=False)[1]
    return torch.from_numpy(found[: len(pictures)]).long()


def standardised(scores: list[float]) -> list[float]:
    """Less their mean, over their standard deviation; zeros where they do not differ but for rounding."""
    values = np.asarray(scores)
    spread = values.std()
    if spread <= 1e-12 * np.abs(values).max():
        return [0.0] * len(scores)
    found: list[float] = ((values - values.mean()) / spread).tolist()
    return found


def _probed(task: VLMTask, labels: Tensor | None, rows: int, seed: int) -> Tensor | None:
    """Training pictures for the probe: of classes that occur in `FOLDS` concepts; None if those are fewer than two."""
    if labels is None or int((labels[task.train] >= 0).sum()) < 2 * FOLDS:
        return None
    pictures = choose(task.train[labels[task.train] >= 0], rows, seed)
    seen = torch.unique(torch.stack([labels[pictures], concepts(task, pictures)]), dim=1)
    classes, count = torch.unique(seen[0], return_counts=True)
    enough = classes[count >= FOLDS]
    return pictures[torch.isin(labels[pictures], enough)] if len(enough) > 1 else None


def _ranks(models: Sequence[FeatureRows], rows: Tensor) -> Shelf:
    """RankMe of every model over these rows."""
    seen = [finite(model[rows]) for model in models]
    flops = sum(svd_flops(len(x), x.shape[1], vectors=False) for x in seen)
    return Shelf([rank_me(x) for x in seen], flops, "RankMe")

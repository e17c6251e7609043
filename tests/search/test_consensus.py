"""The consensus of all models against sample-space algebra in numpy, and what more views are good for."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.data.resident import FeatureRows
from hyma_mllm.search import consensus
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.closed_form import ClosedForm, ClosedFormConfig, ClosedForms, closed_forms
from hyma_mllm.search.flops import symmetric_flops
from hyma_mllm.search.moments import add_upper, mirrored
from hyma_mllm.search.starts import closed_starts, start_flops
from hyma_mllm.search.task import VLMTask
from tests.search.conftest import make_task

LINEAR = ConnectorSpec(0)


def forms(task: VLMTask, kind: str = "consensus", strength: float | None = None) -> ClosedForms:
    return closed_forms(task, ClosedFormConfig(kind, strength))  # type: ignore[arg-type]


def one_caption_each(task: VLMTask) -> VLMTask:
    """The first caption of every picture alone: the views of all models then are plain matrices."""
    first = task.first_caption[:-1]
    texts: list[FeatureRows] = [text[first] for text in task.texts]
    return replace(
        task, texts=texts, first_caption=torch.arange(len(first) + 1), caption_group=torch.arange(len(first))
    )


def by_samples(task: VLMTask, strength: float, axes: int, rank: int) -> dict[int, np.ndarray]:
    """The same connectors' weights by the eigenvectors of the [rows, rows] Gram matrix, up to a factor."""
    views = [x[task.train].double().numpy() for x in (*task.images, *task.texts)]
    rows, inverses, gram = [], [], 0.0
    for view in views:
        x = view - view.mean(0)
        covariance = x.T @ x / len(x)
        lam = strength * np.trace(covariance) / len(x)
        values, vectors = np.linalg.eigh(covariance)
        z = x @ vectors[:, ::-1][:, :axes] / np.sqrt(values[::-1][:axes] + lam)
        rows.append(x)
        inverses.append(np.linalg.inv(covariance + lam * np.eye(len(covariance))))
        gram = gram + z @ z.T
    values, vectors = np.linalg.eigh(gram)
    shared = vectors[:, ::-1][:, :rank]
    paths = shared * values[::-1][:rank] @ shared.T
    images = len(task.images)
    return {
        pair.index: inverses[pair.vision] @ rows[pair.vision].T @ paths @ rows[images + pair.text]
        @ inverses[images + pair.text]
        for pair in task.grid.pairs()
    }  # fmt: skip


@pytest.mark.parametrize(("axes", "rank"), [(8, 10), (8, 256), (1024, 12), (1024, 256)])
@pytest.mark.parametrize("strength", [0.05, 0.4])
def test_it_is_the_sum_over_paths_through_the_components(
    task: VLMTask, axes: int, rank: int, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consensus, "ALL_AXES", 1)
    monkeypatch.setattr(consensus, "LEAST_AXES", axes)
    monkeypatch.setattr(consensus, "RANK", rank)
    monkeypatch.setattr(consensus, "LEAST_SHARE", math.inf)  # all in float64, as the reference
    plain = one_caption_each(task)
    theirs = by_samples(plain, strength, axes, rank)
    for index, state in enumerate(forms(plain, strength=strength).states):
        ours = state["0.weight"].double().numpy()
        np.testing.assert_allclose(
            ours / np.linalg.norm(ours), theirs[index] / np.linalg.norm(theirs[index]), atol=2e-6
        )


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_products_in_float32_say_the_same(
    task: VLMTask, size: float, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of any size, with a mean that dominates them, too."""
    images: list[FeatureRows] = [size * (x[torch.arange(len(x))] + offset) for x in task.images]
    moved = replace(task, images=images)
    assert consensus.products_of(1.0, len(moved.train)) is torch.float32
    quick = forms(moved).states
    monkeypatch.setattr(consensus, "LEAST_SHARE", math.inf)
    for ours, exact in zip(quick, forms(moved).states, strict=True):
        assert ours["0.weight"].isfinite().all()
        for name in exact:
            gap = (ours[name].double() - exact[name].double()).norm() / exact[name].double().norm()
            assert gap < 2e-5


def test_a_weak_regularisation_takes_float64(task: VLMTask) -> None:
    pictures = len(task.train)
    assert consensus.products_of(1e-5 * pictures, pictures) is torch.float32
    assert consensus.products_of(0.9e-5 * pictures, pictures) is torch.float64


@pytest.mark.parametrize("count", [1, 5, 20])
def test_leading_axes_are_eigenvectors(count: int) -> None:
    g = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(90, 90, generator=g, dtype=torch.float64)).Q
    values = 0.8 ** torch.arange(90, dtype=torch.float64)
    found, axes = consensus.leading_axes(turn * values @ turn.T, count)
    torch.testing.assert_close(found, values[:count], rtol=1e-6, atol=0)
    torch.testing.assert_close((axes.T @ turn[:, :count]).abs(), torch.eye(count).double(), atol=1e-3, rtol=0)


def test_axes_are_shared_out_among_the_models(monkeypatch: pytest.MonkeyPatch, task: VLMTask) -> None:
    monkeypatch.setattr(consensus, "ALL_AXES", 50)
    monkeypatch.setattr(consensus, "LEAST_AXES", 4)
    seen: list[int] = []
    plain = consensus.whitened_axes

    def whitened(model: consensus.ModelMoments, strength: float, count: int) -> Tensor:
        seen.append(count)
        return plain(model, strength, count)

    monkeypatch.setattr(consensus, "whitened_axes", whitened)
    forms(task)
    assert seen == [10] * 5  # 2 image and 3 text models


def test_more_views_of_the_same_pictures_make_better_connectors() -> None:
    """Of few and noisy pictures: what the other models saw helps a pair, where the whitened form has it alone."""
    gains = []
    for seed in range(5):
        g, sound = torch.Generator().manual_seed(seed), make_task((96,) * 6, (64,) * 4)
        noisy = [
            [x + size * torch.randn(len(x), x.shape[1], generator=g) for x in models]  # type: ignore[attr-defined]
            for models, size in ((sound.images, 0.3), (sound.texts, 1.2))
        ]
        shelf = replace(sound, images=noisy[0], texts=noisy[1], train=sound.train[:40], test=sound.train[40:])
        scores = {
            (kind, strength): shelf.scores(
                ConnectorBank(shelf.grid, LINEAR, 0, forms(shelf, kind, strength).states), LINEAR, shelf.test
            )["retrieval"]
            for kind, strength in (("consensus", None), ("whitened", 0.4), ("whitened", 3.0))
        }
        means = {key: sum(values) / len(values) for key, values in scores.items()}
        gains.append(means["consensus", None] - max(means["whitened", 0.4], means["whitened", 3.0]))
    assert sum(gains) / len(gains) > 1


def test_a_pair_alone_has_a_consensus_of_two(small_task: VLMTask) -> None:
    state = forms(small_task).states[0]
    scores = small_task.scores(ConnectorBank(small_task.grid, LINEAR, 0, [state]), LINEAR, small_task.test)
    fresh = small_task.scores(ConnectorBank(small_task.grid, LINEAR, 0), LINEAR, small_task.test)
    assert scores["retrieval"][0] > fresh["retrieval"][0] + 20


@pytest.mark.parametrize("kind", ["consensus", "whitened", "ridge"])
@pytest.mark.parametrize("connector", ["linear", "mlp1"])
def test_the_price_before_is_the_bill_after(task: VLMTask, kind: ClosedForm, connector: str) -> None:
    spec = ConnectorSpec.named(connector, hidden=16)
    captions = int((task.first_caption[task.train + 1] - task.first_caption[task.train]).sum())
    paid = closed_starts(task, spec, kind, 1.0, Accelerator(cpu=True)).cost.flops
    assert start_flops(task.grid, spec, kind, captions, len(task.train)) == pytest.approx(paid, rel=1e-12)


@pytest.mark.parametrize("width", [1, 256, 257, 600])
def test_symmetric_products_are_computed_above_the_diagonal_and_billed_so(width: int) -> None:
    rows = torch.randn(40, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    square = torch.zeros(width, width, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        add_upper(square, rows[:25], rows[:25])
        add_upper(square, rows[25:], rows[25:])
    torch.testing.assert_close(mirrored(square), rows.T @ rows, atol=1e-12, rtol=1e-12)
    assert counter.get_total_flops() == symmetric_flops(40, width) <= 2 * 40 * width**2

"""Closed forms against sklearn and plain float64 loops, and what they do with features that say little."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorGroup, ConnectorSpec
from hyma_mllm.data.resident import FeatureRows
from hyma_mllm.errors import HymaError
from hyma_mllm.search import moments
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.closed_form import ClosedForm, ClosedFormConfig, ClosedForms, closed_forms
from hyma_mllm.search.flops import closed_form_flops, consensus_flops
from hyma_mllm.search.task import VLMTask

LINEAR = ConnectorSpec(0)
Array = NDArray[np.float64]


def forms(task: VLMTask, kind: str = "whitened", strength: float = 3.0, pairs: list[int] | None = None) -> ClosedForms:
    return closed_forms(task, ClosedFormConfig(kind, strength), pairs)  # type: ignore[arg-type]


def training_rows(task: VLMTask, index: int) -> tuple[Array, Array, Array]:
    """One row per training caption by a plain loop: text, image, weight; float64."""
    pair = task.grid.pair(index)
    text, image, weight = [], [], []
    for p in task.train.tolist():
        first, last = task.first_caption[p].item(), task.first_caption[p + 1].item()
        for c in range(int(first), int(last)):
            text.append(task.texts[pair.text][torch.tensor([c])][0].double().numpy())
            image.append(task.images[pair.vision][torch.tensor([p])][0].double().numpy())
            weight.append(1 / (last - first))
    return np.array(text), np.array(image), np.array(weight)


def rows_of(task: VLMTask) -> tuple[int, int]:
    """Training captions and pictures."""
    return len(training_rows(task, 0)[0]), len(task.train)


def moments_by_loop(task: VLMTask, index: int) -> tuple[Array, Array, Array, Array, Array]:
    """mean_t, mean_v, C_t, C_i, M, term by term."""
    t, v, w = training_rows(task, index)
    w = w / w.sum()
    mean_t = sum(a * x for a, x in zip(w, t, strict=True))
    mean_v = sum(a * x for a, x in zip(w, v, strict=True))
    c_t = sum(a * np.outer(x - mean_t, x - mean_t) for a, x in zip(w, t, strict=True))
    c_i = sum(a * np.outer(x - mean_v, x - mean_v) for a, x in zip(w, v, strict=True))
    m = sum(a * np.outer(x - mean_t, y - mean_v) for a, x, y in zip(w, t, v, strict=True))
    return mean_t, mean_v, c_t, c_i, m  # type: ignore[return-value]


def lifted(covariance: Array, strength: float) -> Array:
    return np.asarray(covariance + strength * np.trace(covariance) / len(covariance) * np.eye(len(covariance)))


def mapped(task: VLMTask, index: int, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mapped training captions [captions, d_image] and their weights, float64."""
    t, _, w = training_rows(task, index)
    y = torch.from_numpy(t) @ state["0.weight"].double().T + state["0.bias"].double()
    return y, torch.from_numpy(w / w.sum())


def assert_same_direction(state: dict[str, Tensor], weight: Array, bias: Array) -> None:
    """Equal up to one positive factor."""
    ours = torch.cat([state["0.weight"].double().flatten(), state["0.bias"].double()])
    theirs = torch.from_numpy(np.concatenate([weight.ravel(), bias]))
    torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("strength", [0.01, 3.0])
def test_ridge_is_sklearns(task: VLMTask, strength: float) -> None:
    """With several captions a picture: sklearn gets each caption at its share of the picture's weight."""
    for index, state in enumerate(forms(task, "ridge", strength).states):
        t, v, w = training_rows(task, index)
        _, _, c_t, _, _ = moments_by_loop(task, index)
        lam = strength * np.trace(c_t) / len(c_t)
        model = Ridge(alpha=lam * w.sum(), solver="cholesky").fit(t, v, sample_weight=w)
        assert_same_direction(state, model.coef_, model.intercept_)


@pytest.mark.parametrize("strength", [0.01, 3.0])
def test_both_kinds_are_the_formula_in_float64(task: VLMTask, strength: float) -> None:
    ridge, whitened = forms(task, "ridge", strength).states, forms(task, "whitened", strength).states
    for index in range(len(task.grid)):
        mean_t, mean_v, c_t, c_i, m = moments_by_loop(task, index)
        weight = np.linalg.inv(lifted(c_t, strength)) @ m
        assert_same_direction(ridge[index], weight.T, mean_v - weight.T @ mean_t)
        weight = weight @ np.linalg.inv(lifted(c_i, strength))
        assert_same_direction(whitened[index], weight.T, -weight.T @ mean_t)


@pytest.mark.parametrize("kind", get_args(ClosedForm))
def test_training_rows_are_mapped_to_unit_rms_norm(task: VLMTask, kind: str) -> None:
    for index, state in enumerate(forms(task, kind).states):
        y, w = mapped(task, index, state)
        assert float((w * y.square().sum(1)).sum()) == pytest.approx(1, abs=1e-5)
        assert all(value.dtype == torch.float32 for value in state.values())
        connectors.check_state(LINEAR, task.grid.shape(index), state)


def test_the_whitened_bias_ranks_pictures_by_the_centred_bilinear_score(task: VLMTask) -> None:
    state = forms(task).states[0]
    mean_t, mean_v, c_t, c_i, m = moments_by_loop(task, 0)
    bilinear = np.linalg.inv(lifted(c_t, 3)) @ m @ np.linalg.inv(lifted(c_i, 3))
    t, v = task.texts[0].double().numpy(), task.images[0].double().numpy()  # type: ignore[attr-defined]
    wanted = (t - mean_t) @ bilinear @ (v - mean_v).T
    ours = (t @ state["0.weight"].double().numpy().T + state["0.bias"].double().numpy()) @ v.T
    gaps = ours / np.linalg.norm(ours - ours.mean(1, keepdims=True)) - wanted / np.linalg.norm(
        wanted - wanted.mean(1, keepdims=True)
    )
    np.testing.assert_allclose(gaps, gaps[:, :1] * np.ones_like(gaps), atol=1e-6)  # one constant per caption


def test_every_picture_counts_once(task: VLMTask) -> None:
    """A picture's only caption, said three times over, changes nothing."""
    owner = torch.repeat_interleave(torch.arange(120), task.first_caption.diff())
    first = task.first_caption[:-1]
    one = replace(task, texts=[x[first] for x in task.texts], first_caption=torch.arange(121))  # type: ignore[index]
    thrice = replace(task, texts=[x[first[owner]] for x in task.texts])  # type: ignore[index]
    torch.testing.assert_close(forms(one).states, forms(thrice).states, atol=1e-6, rtol=1e-5)


def test_pictures_without_captions_are_left_out(task: VLMTask) -> None:
    """Captions of some training pictures are taken away; they are as if not in the split."""
    silent = task.train[:10]
    counts = task.first_caption.diff()
    keep = torch.repeat_interleave(~torch.isin(torch.arange(120), silent), counts)
    counts[silent] = 0
    first_caption = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    cut = replace(task, texts=[x[keep] for x in task.texts], first_caption=first_caption)  # type: ignore[index]
    fewer = replace(task, train=task.train[10:])
    torch.testing.assert_close(forms(cut).states, forms(fewer).states)
    with pytest.raises(HymaError, match="No training picture has a caption"):
        forms(replace(cut, train=silent))


def test_only_training_rows_count(task: VLMTask) -> None:
    other = [x.clone() for x in task.images]  # type: ignore[attr-defined]
    for x in other:
        x[task.test] = float("nan")
    torch.testing.assert_close(forms(replace(task, images=other)).states, forms(task).states, atol=0, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 70])
def test_chunks_change_nothing(task: VLMTask, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for features that can only be asked for by row numbers."""

    class Rows:
        def __init__(self, rows: FeatureRows) -> None:
            self.rows = rows

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, numbers: Tensor) -> Tensor:
            assert len(numbers) <= 3 * chunk
            return self.rows[numbers]

    whole = forms(task).states
    monkeypatch.setattr(moments, "CHUNK_PICTURES", chunk)
    asked = replace(task, images=[Rows(x) for x in task.images], texts=[Rows(x) for x in task.texts])
    torch.testing.assert_close(forms(asked).states, whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", get_args(ClosedForm))
def test_each_model_is_read_and_factored_once(task: VLMTask, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    factored, read = [], []
    cholesky, add = torch.linalg.cholesky, moments._Sums.add

    def counting(matrix: Tensor) -> Tensor:
        factored.append(len(matrix))
        factor: Tensor = cholesky(matrix)
        return factor

    def reading(self: moments._Sums, rows: Tensor, weights: Tensor) -> Tensor:
        read.append(rows.shape[1])
        return add(self, rows, weights)

    monkeypatch.setattr(torch.linalg, "cholesky", counting)
    monkeypatch.setattr(moments._Sums, "add", reading)
    forms(task, kind)
    assert sorted(factored) == sorted([20, 20, 12] + ([16, 24] if kind != "ridge" else []))
    assert sorted(read) == sorted([20, 20, 12, 16, 24])


def test_some_pairs_are_those_of_the_whole(task: VLMTask) -> None:
    whole = forms(task)
    some = forms(task, pairs=[4, 0, 4])
    torch.testing.assert_close(some.states, [whole.states[k] for k in (4, 0, 4)], atol=0, rtol=0)
    assert some.flops < whole.flops
    assert forms(task, pairs=[]).states == []


@pytest.mark.parametrize("kind", get_args(ClosedForm))
def test_products_are_billed_as_torch_counts_them(task: VLMTask, kind: str) -> None:
    with FlopCounterMode(display=False) as counter:
        bill = forms(task, kind).flops
    texts, images = [20, 20, 12], [16, 24]
    shapes = [task.grid.shape(index) for index in range(6)]
    if kind == "consensus":  # its axes, being few, are all taken, by eigenvectors
        axes, rank = [*images, *texts], sum([*images, *texts])
        assert bill == consensus_flops(rows_of(task), task.grid, range(6), axes, rank)
        unseen = float(sum(2 * d * d * rank + 9 * d**3 for d in axes) + 9 * rank**3)
    else:
        assert bill == closed_form_flops(rows_of(task), task.grid, range(6), kind == "whitened")
        unseen = float(sum(2 * t * t * i + (2 * i * i * t if kind == "whitened" else 0) for t, i in shapes))
    unseen += sum(width**3 / 3 for width in texts + (images if kind != "ridge" else []))
    assert counter.get_total_flops() == pytest.approx(bill - unseen, rel=1e-9)


def scores(task: VLMTask, states: list[dict[str, Tensor]]) -> list[float]:
    return task.scores(ConnectorBank(task.grid, LINEAR, 0, states), LINEAR, task.test)["retrieval"]


@pytest.mark.parametrize("kind", get_args(ClosedForm))
def test_closed_forms_retrieve_what_they_never_saw(task: VLMTask, kind: str) -> None:
    fresh = task.scores(ConnectorBank(task.grid, LINEAR, 0), LINEAR, task.test)["retrieval"]
    found = scores(task, forms(task, kind, 0.1).states)
    assert all(after > before + 20 for before, after in zip(fresh, found, strict=True))


def degenerate(task: VLMTask, case: str) -> VLMTask:
    g = torch.Generator().manual_seed(3)
    images, texts = [x.clone() for x in task.images], [x.clone() for x in task.texts]  # type: ignore[attr-defined]
    if case == "constant text":
        texts[0] = texts[0][:1].expand_as(texts[0]).clone()
    elif case == "constant image":
        images[0] = images[0][:1].expand_as(images[0]).clone()
    elif case == "zero text and image":
        texts[0].zero_()
        images[0].zero_()
    elif case == "rank one":
        texts[0] = torch.outer(texts[0][:, 0], torch.randn(20, generator=g))
        images[0] = nn.functional.normalize(torch.outer(images[0][:, 0], torch.randn(16, generator=g)), dim=1)
    elif case == "huge":
        texts[0], images[0] = texts[0] * 1e30, images[0] * 1e30
    elif case == "tiny":
        texts[0], images[0] = texts[0] * 1e-30, images[0] * 1e-30
    elif case == "one picture":
        return replace(task, train=task.train[:1])
    elif case == "two pictures":
        return replace(task, train=task.train[:2])
    return replace(task, images=images, texts=texts)


CASES = ["constant text", "constant image", "zero text and image", "rank one", "huge", "tiny", "one picture"]


@pytest.mark.parametrize("kind", get_args(ClosedForm))
@pytest.mark.parametrize("strength", [1e-6, 3.0])
@pytest.mark.parametrize("case", [*CASES, "two pictures"])
def test_degenerate_features_give_finite_connectors_of_unit_rows(
    task: VLMTask, case: str, strength: float, kind: str
) -> None:
    broken = degenerate(task, case)
    states = forms(broken, kind, strength).states
    for index, state in enumerate(states):
        assert all(value.isfinite().all() for value in state.values())
        y, w = mapped(broken, index, state)
        assert float((w * y.square().sum(1)).sum()) == pytest.approx(1, abs=1e-3)
    assert all(np.isfinite(scores(broken, states)))


@pytest.mark.parametrize("factor", [1e-30, 1e30])
@pytest.mark.parametrize("kind", get_args(ClosedForm))
def test_the_size_of_text_features_is_taken_out(task: VLMTask, kind: str, factor: float) -> None:
    """Directions do not follow the unit of the features; float32 weights hold them all the same."""
    scaled = replace(task, texts=[x * factor for x in task.texts])  # type: ignore[operator,misc]
    for ours, theirs in zip(forms(scaled, kind).states, forms(task, kind).states, strict=True):
        torch.testing.assert_close(ours["0.weight"] * factor, theirs["0.weight"], atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(ours["0.bias"], theirs["0.bias"], atol=1e-6, rtol=1e-3)


def test_an_offset_of_all_rows_costs_no_accuracy(task: VLMTask) -> None:
    """Where sums about zero in float32 would lose every digit."""
    moved = replace(task, texts=[x.double() + 1e5 for x in task.texts])  # type: ignore[attr-defined]
    for ours, theirs in zip(forms(moved).states, forms(task).states, strict=True):
        torch.testing.assert_close(ours["0.weight"], theirs["0.weight"], atol=1e-6, rtol=1e-4)


def test_a_duplicate_gets_the_same_connector(task: VLMTask) -> None:
    states = forms(replace(task, texts=[task.texts[0], task.texts[0], task.texts[2]])).states
    torch.testing.assert_close(states[0], states[1], atol=0, rtol=0)
    torch.testing.assert_close(states[3], states[4], atol=0, rtol=0)


@pytest.mark.parametrize("side", ["images", "texts"])
def test_features_that_are_not_finite_are_refused(task: VLMTask, side: str) -> None:
    rows = [x.clone() for x in getattr(task, side)]
    rows[1][:, 3] = float("inf")
    name = {"images": "v1", "texts": "t1"}[side]
    with pytest.raises(HymaError, match=f"The training features of {name} are not all finite"):
        forms(replace(task, **{side: rows}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "white"}, "closed form 'white' is unknown; did you mean whitened"),
        ({"strength": 0.0}, "strength is 0.0; write a number of at least 1e-06"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"strength": float("inf")}, "strength is inf"),
    ],
)
def test_bad_configuration(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HymaError, match=message):
        ClosedFormConfig(**values)


def test_a_source_scores_what_its_states_say(task: VLMTask) -> None:
    """The stacked score of a bank of closed forms is that of each plain connector alone."""
    states = forms(task).states

    def plain(pairs: range) -> list[ConnectorGroup]:
        return [
            ConnectorGroup(torch.tensor([n]), torch.tensor([k]), task.grid.shape(k), connectors.stack([states[k]]))
            for n, k in enumerate(pairs)
        ]

    assert scores(task, states) == task.scores(plain, LINEAR, task.test)["retrieval"]  # type: ignore[arg-type]

"""The benchmark of unseen encoders on the synthetic task: who may see what, what is kept, the lines of its table."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from hyma_mllm.search.methods import Search
from hyma_mllm.search.ranking import interval


@pytest.fixture
def unseen(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("unseen")


@pytest.fixture
def ground(unseen: ModuleType, search: Callable[..., Search]) -> Any:
    """Image encoders 16 and 24 wide, text encoders 20, 20 and 12: of t0 and t1 alone a width is trained elsewhere."""

    def made(changes: dict[str, Any], scale: float | None = None, hypernetwork: dict[str, Any] | None = None) -> Search:
        return search((hypernetwork or {}).get("preset", "default"), **changes)

    return unseen.ground_of(made)


def test_what_is_computed_once_is_of_the_whole_grid(ground: Any) -> None:
    assert [tuple(ground.likeness[side].shape) for side in ("vision", "text")] == [(2, 2), (3, 3)]
    assert len(ground.starts) == 6 and ground.pairs("text", 1) == [1, 4] and ground.pairs("vision", 1) == [3, 4, 5]


def test_samples_are_training_pictures_and_fewer_are_part_of_more(ground: Any) -> None:
    few, more = set(ground.rows(8, 3).tolist()), set(ground.rows(32, 3).tolist())
    assert len(few) == 8 and few < more < set(ground.task.train.tolist())
    assert set(ground.rows(8, 4).tolist()) != few
    assert torch.equal(ground.rows(0, 3), ground.task.train)


@pytest.mark.parametrize("strength", [0.01, 3.0])
def test_leaving_out_by_formula_is_leaving_out(
    unseen: ModuleType, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ridge refitted n times by sklearn, with the penalty that all samples set."""
    rivals = unseen.unseen_rivals
    g = torch.Generator().manual_seed(0)
    text, image = torch.randn(14, 6, generator=g), torch.randn(14, 5, generator=g)
    image = image + text @ torch.randn(6, 5, generator=g) * 0.3
    monkeypatch.setattr(rivals, "STRENGTHS", (strength,))
    t, v = text.double().numpy(), image.double().numpy()
    penalty = strength * ((t - t.mean(0)) ** 2).sum() / 6
    made = []
    for j in range(14):
        rest = np.arange(14) != j
        made.append(Ridge(alpha=penalty).fit(t[rest], v[rest]).predict(t[j : j + 1])[0])
    predictions = np.array(made)
    lifted = np.cov(v.T, bias=True)
    lifted = lifted + strength * np.trace(lifted) / 5 * np.eye(5)
    turned = (predictions - v.mean(0)) @ np.linalg.inv(lifted)
    wanted = {
        "ridge": predictions @ v.T / np.linalg.norm(predictions, axis=1, keepdims=True),
        "whitened": turned @ (v - v.mean(0)).T / np.linalg.norm(turned, axis=1, keepdims=True),
    }
    (found,) = rivals._by_strength(text, image)
    for kind, scores in wanted.items():
        assert found[kind] == pytest.approx(rivals.reciprocal_rank(torch.from_numpy(scores)), abs=1e-6), kind


def test_reciprocal_rank_of_known_ranks(unseen: ModuleType) -> None:
    rank = unseen.unseen_rivals.reciprocal_rank
    assert rank(torch.eye(3)) == 1.0
    assert rank(torch.ones(4, 4)) == 0.25  # ties are lost
    scores = torch.tensor([[2.0, 3.0], [1.0, 4.0]])
    assert rank(scores) == pytest.approx(((1 / 2 + 1) / 2 + 1) / 2)


def test_the_recipe_is_that_of_the_nearest_number(unseen: ModuleType) -> None:
    recipes = {32: unseen.Recipe(1, 1.0), 1000: unseen.Recipe(2, 1.0)}
    assert [unseen.recipe_for(n, recipes).steps for n in (8, 32, 100, 300, 2400)] == [1, 1, 1, 2, 2]


@pytest.mark.slow
def test_a_newcomer_is_left_out_of_the_training_and_scored_with_every_partner(unseen: ModuleType, ground: Any) -> None:
    strengths = {8: {"whitened": 3.0}, 0: {"whitened": 3.0}}
    found = unseen.leave_out(ground, "vision", 1, [8, 0], strengths, 0)
    assert (found["model"], found["trained_width"], found["donor"] == "v0") == ("v1", False, True)
    labels = {(one["method"], one["samples"]) for one in found["cells"]}
    # no other model is 24 wide: nothing predicts it but the closed form of samples, and bridges
    assert labels == {
        (unseen.CLOSED.label, 8), (unseen.CLOSED.label, 0), (unseen.BRIDGED_FORM, "0"), (unseen.SHORT_BRIDGE, 8),
        *((unseen.BRIDGED, samples) for samples in ("0", 8, 0)),
    }  # fmt: skip
    assert all(len(one["scores"]) == 3 and one["flops"] > 0 for one in found["cells"])
    by = {(one["method"], one["samples"]): np.mean(one["scores"]) for one in found["cells"]}
    # all encoders see the same latents: a bridge loses little, and chance is 33
    assert by[unseen.BRIDGED, "0"] > 80

    twin = unseen.leave_out(ground, "text", 0, [8], strengths, 0)
    labels = {(one["method"], one["samples"]) for one in twin["cells"]}
    assert twin["trained_width"] and {(unseen.FEATURES.label, "0"), (unseen.FACTORED.label, 8)} < labels
    assert set(twin["training_flops"]) == {kind.label for kind in (unseen.FEATURES, unseen.FACTORED, unseen.CLOSED)}


def test_the_shelf_never_reads_the_newcomer(unseen: ModuleType, ground: Any) -> None:
    network, flops = unseen.shelf(ground, unseen.FEATURES, "text", 1, 0)
    assert network.grid.text_ids == ("t0", "t2") and flops > 0
    ground.task.texts[1].fill_(float("nan"))
    ground.means["text"][1].fill_(float("nan"))
    again, _ = unseen.shelf(ground, unseen.FEATURES, "text", 1, 0)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)


@pytest.mark.slow
def test_everything_runs_once_and_the_table_is_the_mean_over_models(
    unseen: ModuleType, ground: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is kept and reported does not hang on how well anything is trained, which the tests above look at.
    for module in (unseen, unseen.unseen_rivals):
        monkeypatch.setattr(module, "fit", lambda *_: 1.0)
    result = unseen.run(ground, unseen.fidelity.keeper(tmp_path / "units"), [16, 0], [0, 1])

    def never(*_: object, **__: object) -> None:
        raise AssertionError("ran again")

    unseen.leave_out = never
    again = unseen.run(ground, unseen.fidelity.keeper(tmp_path / "units"), [16, 0], [0, 1])
    assert again == result
    grid = ground.task.grid
    result["about"] = {"vision": grid.vision_ids, "text": grid.text_ids, "splits": {"train": 70}}
    report = unseen.unseen_report
    result["table"] = report.lines(result)
    lines = {(one["trained_width"], one["method"], one["samples"]): one for one in result["table"]}
    ridge = [
        np.reshape(one["scores"], (2, 3))
        for one in result["rivals"]
        if (one["method"], one["samples"]) == ("ridge", 16)
    ]
    assert len(ridge) == 2
    mean = np.mean(ridge, axis=0)
    own = {"t0": mean[:, 0].mean(), "t1": mean[:, 1].mean()}
    line = lines[True, "ridge", 16]
    assert line["models"] == pytest.approx(own)
    assert line["score"].mean == pytest.approx(np.mean(list(own.values()))) and np.isnan(line["score"].low)
    three = lines[False, "ridge", 16]
    assert three["score"] == pytest.approx(interval(list(three["models"].values())))
    assert set(lines[False, "ridge", 16]["models"]) == {"v0", "v1", "t2"}
    assert (False, unseen.FACTORED.label, "0") not in lines
    for group in report.GROUPS:
        assert report.table(result, group).row_count == len({m for g, m, _ in lines if g is group})
    assert report.picture(result, tmp_path / "x.png").stat().st_size > 5000

"""Projectors that begin at the words of the answers: against scikit-learn's ridge, and as starts of a search."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.linear_model import Ridge
from tiny_causal import SPEC, make_task

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.errors import HymaError
from hyma_mllm.hypernetwork.presets import HypernetworkConfig
from hyma_mllm.objectives.causal_lm import CausalConfig, CausalObjective
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.search import word_start
from hyma_mllm.search.closed_form import ClosedFormConfig
from hyma_mllm.search.interrupt import StopRequest
from hyma_mllm.search.method import all_states
from hyma_mllm.search.methods import Method, Search, SearchConfig
from hyma_mllm.search.mllm_task import MLLMTask
from hyma_mllm.search.starts import closed_starts
from hyma_mllm.search.word_start import stretched_ridge, telling_answers, word_starts, word_targets

LINEAR = ConnectorSpec.named("linear", hidden=0, activation="gelu")


def task_with(answers: list[str]) -> MLLMTask:
    """The tiny task, its questions answered in turn by these words."""
    task = make_task(double=False)
    rows = [replace(row, answers=(answers[at % len(answers)],) * 10) for at, row in enumerate(task.rows)]
    return replace(task, rows=rows)


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
def test_the_regression_is_scikit_learns_but_for_its_stretch(strength: float) -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(40, 5, generator=draw, dtype=torch.float64) * torch.tensor([3.0, 1, 1, 0.1, 1]) + 7
    y = x[:, :3] @ torch.randn(3, 4, generator=draw, dtype=torch.float64) - 2
    y = y + torch.randn(40, 4, generator=draw, dtype=torch.float64)
    found = stretched_ridge(x, y, strength)
    lift = strength * float((x - x.mean(0)).square().mean())
    wanted = torch.tensor(Ridge(alpha=lift * len(x)).fit(x.numpy(), y.numpy()).coef_)
    stretch = found["0.weight"] / wanted
    torch.testing.assert_close(stretch, stretch[0, 0].expand_as(stretch))
    assert stretch[0, 0] > 1
    said = x @ found["0.weight"].T + found["0.bias"]
    torch.testing.assert_close(said.mean(0), y.mean(0))
    torch.testing.assert_close(said.var(0, correction=0).sum(), y.var(0, correction=0).sum())


def test_towers_or_words_that_do_not_vary_are_met_by_the_bias() -> None:
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.full((9, 2), 0.5, dtype=torch.float64)
    for rows, words in ((torch.ones_like(x), torch.randn(9, 2, dtype=torch.float64)), (x, y)):
        found = stretched_ridge(rows, words, 1.0)
        assert not found["0.weight"].any()
        torch.testing.assert_close(found["0.bias"], words.mean(0))


def test_yes_and_no_say_nothing_and_an_answer_counts_once() -> None:
    task = task_with(["red", "Yes", "blue", "no", "red"])
    found = telling_answers(task)
    wanted: dict[int, list[str]] = {}
    for row in task.train.tolist():
        word = task.rows[row].answers[0]
        if word in ("red", "blue") and word not in wanted.setdefault(int(task.picture[row]), []):
            wanted[int(task.picture[row])].append(word)
    assert found == {picture: words for picture, words in wanted.items() if words}
    assert list(found) == sorted(found)
    conversation = replace(task.rows[0], turns=(("what colour ?", "blue"), ("is it red ?", "no")))
    task = replace(task, rows=[conversation] * len(task.rows))
    assert set(map(tuple, telling_answers(task).values())) == {("blue",)}


def test_nothing_but_yes_and_no_is_refused() -> None:
    with pytest.raises(HymaError, match="No training question has an answer other than yes and no"):
        word_starts(task_with(["yes", "No "]), SPEC, 1.0)


def test_targets_are_means_of_input_embeddings() -> None:
    reader = make_task(double=False).readers[0]
    table = reader.model.model.get_input_embeddings().weight.detach()
    red, blue, kite = (reader.model.tokenizer.convert_tokens_to_ids(word) for word in ("red", "blue", "kite"))
    found = word_targets(reader, [["red"], ["blue kite", "red"]])
    torch.testing.assert_close(found[0], table[red].float())
    torch.testing.assert_close(found[1], ((table[blue] + table[kite]) / 2 + table[red]).float() / 2)


@pytest.mark.parametrize("spec", [LINEAR, SPEC, ConnectorSpec.named("mlp2", hidden=24, activation="relu")])
def test_a_start_says_the_word_at_the_size_of_the_llms_embeddings(spec: ConnectorSpec) -> None:
    """The colour is a channel of every token, so each token's output lies nearer to its own colour's word."""
    task = make_task(double=False)
    found = word_starts(task, spec, 1.0)
    assert found.pictures == len(set(task.picture[task.train].tolist()))
    pictures = task.picture[task.train[:12]]
    words = [task.rows[row].answers[0] for row in task.train[:12].tolist()]
    for pair in task.grid.pairs():
        state = found.states[pair.index]
        connectors.check_state(spec, task.grid.shape(pair.index), state)
        tokens = task.towers[pair.vision].read(pictures)
        stacked = {name: value[None] for name, value in state.items()}
        seen = task.scales(spec)[pair.index] * connectors.apply(spec, stacked, tokens[None])[0]
        rms = task.facts[pair.text].embedding_rms
        few = task.towers[pair.vision].read(task.picture[task.train[:64]])
        whole = task.scales(spec)[pair.index] * connectors.apply(spec, stacked, few[None])
        assert float(whole.square().mean().sqrt()) == pytest.approx(rms, rel=1e-4)
        targets = word_targets(task.readers[pair.text], [["red"], ["blue"]])
        between = targets[0] - targets[1]
        leaning = (seen.mean(1) - seen.mean((0, 1))) @ between
        signs = torch.tensor([1.0 if word == "red" else -1.0 for word in words])
        assert bool((leaning * signs > 0).all()), pair


def test_more_pictures_than_are_read_are_drawn_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_start, "MOST_PICTURES", 5)
    task = make_task(double=False)
    read: list[int] = []
    plain = word_start.Tower.read
    monkeypatch.setattr(word_start.Tower, "read", lambda tower, rows: read.extend(rows.tolist()) or plain(tower, rows))
    found = word_starts(task, LINEAR, 1.0)
    assert found.pictures == 4
    assert read[:4] == [0, 3, 6, 9]


def test_the_bill_has_the_regressions_and_the_pictures(accelerator: Accelerator) -> None:
    task = make_task(double=False)
    cost = closed_starts(task, LINEAR, "words", 1.0, accelerator).cost
    covariances = sum(2 * 12 * width**2 + width**3 / 3 for width in (6, 6, 8))
    pairs = sum(2 * 12 * d_in * d_out + 2 * d_in**2 * d_out for d_in in (6, 6, 8) for d_out in (12, 16))
    assert cost.flops == pytest.approx(covariances + pairs)
    assert cost.samples_per_pair == 12
    deep = closed_starts(task, SPEC, "words", 1.0, accelerator).cost
    assert deep.flops > cost.flops
    with pytest.raises(HymaError, match="The closed form ridge needs stored features of both sides"):
        closed_starts(task, SPEC, "ridge", 1.0, accelerator)


def test_a_search_starts_from_the_words_and_keeps_what_it_learns(tmp_path: Path, accelerator: Accelerator) -> None:
    task = make_task(double=False)
    config = SearchConfig(
        methods=["hyma", "grid", "words"], connectors=["mlp1"], hidden=0, activation="gelu", seeds=[0], steps=8,
        grid_steps=8, batch=8, warm_start="words", closed_form=ClosedFormConfig("words", 1.0), evaluate_every=0,
        checkpoint_every=0,
    )  # fmt: skip
    run = RunDirectory(tmp_path / "run", {})
    search = Search(
        config, HypernetworkConfig(preset="closed-form", trunk=[16, 16]), lambda: CausalObjective(CausalConfig()), task,
        *task.means(), accelerator, run, StopRequest(),
    )  # fmt: skip
    starts = closed_starts(task, SPEC, "words", 1.0, accelerator)
    methods: tuple[Method, ...] = ("hyma", "grid")
    for method in methods:
        fresh = all_states(search.network(method, SPEC, 0), len(task.grid))
        for one, other in zip(fresh, starts.states, strict=True):
            for name, value in one.items():
                torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6)
    untrained = search.run_method("words", "mlp1", 0, None)
    assert untrained.ledger.phases["training"].flops == starts.cost.flops
    losses = np.array(untrained.ranking.details["validation loss"])
    for method in methods:
        found = search.run_method(method, "mlp1", 0, untrained.ledger)
        assert (np.array(found.ranking.details["validation loss"]) < losses).mean() > 0.8, method
        assert found.ledger.phases["training"].flops > starts.cost.flops
    run.close()

"""The causal task on tiny random LLMs: stacked against plain transformers one by one, values and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny_causal import SPEC, make_task
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hyma_mllm import connectors
from hyma_mllm.data.prompts import IGNORE
from hyma_mllm.data.rows import Row
from hyma_mllm.hypernetwork.presets import HypernetworkConfig
from hyma_mllm.objectives.causal_lm import CausalConfig, CausalObjective
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.search import mllm_task
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.interrupt import StopRequest
from hyma_mllm.search.methods import Search, SearchConfig
from hyma_mllm.search.mllm_parts import Tower, facts_of
from hyma_mllm.search.mllm_prepare import encode_rows
from hyma_mllm.search.mllm_task import MLLMTask
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.zoo.llm import LanguageModel


def bank(task: MLLMTask) -> ConnectorBank:
    return ConnectorBank(task.grid, SPEC, 3).double()


def plain_loss(task: MLLMTask, index: int, params: dict[str, Tensor], questions: list[int]) -> Tensor:
    """transformers' own loss over right-padded whole sequences, no prefix kept, no stacking."""
    pair = task.grid.pair(index)
    reader, tower = task.readers[pair.text], task.towers[pair.vision]
    scale = task.scales(SPEC)[index]
    sequences, labels = [], []
    for row in questions:
        tokens = tower.read(task.picture[torch.tensor([row])])
        image = scale * connectors.apply(SPEC, params, tokens[None])[0, 0]
        encoded = reader.encoded[row]
        before = reader.model.embed(torch.tensor(reader.prompter.before))
        sequences.append(torch.cat([before, image, reader.model.embed(torch.tensor(encoded.after))]))
        labels.append(torch.tensor([IGNORE] * (len(before) + len(image)) + list(encoded.labels)))
    embeddings = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(s)) for s in sequences], batch_first=True).long()
    # transformers takes the cross-entropy in float32, so here it is taken from the logits.
    logits = reader.model.model(inputs_embeds=embeddings, attention_mask=mask).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), padded[:, 1:].flatten())


@pytest.mark.parametrize("members", [[0, 2, 4], [5, 1], [3]])
def test_stacked_losses_are_those_of_plain_models_one_by_one(members: list[int]) -> None:
    task = make_task()
    source, plain = bank(task), bank(task)
    questions = [1, 0, 14, 9]
    batch = task.batch(torch.tensor(questions), 0, 0)
    losses = task.losses(source(members), SPEC, CausalObjective(CausalConfig(vocabulary_chunk=7)), batch)
    wanted = []
    for index in members:
        (group,) = plain([index])
        wanted.append(plain_loss(task, index, group.params, questions))
    torch.testing.assert_close(losses.double(), torch.stack(wanted), rtol=1e-6, atol=1e-6)
    weights = torch.arange(1.0, 1 + len(members)).double()
    (losses.double() * weights).sum().backward()
    (torch.stack(wanted) * weights).sum().backward()
    for one, other in zip(source.parameters(), plain.parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None
        else:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_passes_by_length_change_neither_losses_nor_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task()
    batch = task.batch(torch.arange(9), 0, 0)
    passes: list[int] = []
    plain = LanguageModel.hidden

    def counted(model: LanguageModel, embeddings: Tensor, *rest: Any) -> Tensor:
        passes.append(len(embeddings))
        return plain(model, embeddings, *rest)

    monkeypatch.setattr(LanguageModel, "hidden", counted)
    found = []
    for tokens in (10_000, 0):
        monkeypatch.setattr(mllm_task, "PASS_TOKENS", tokens)
        source = bank(task)
        losses = task.losses(source([0, 2, 4]), SPEC, CausalObjective(), batch)
        losses.sum().backward()
        found.append([losses.detach(), *(value.grad for value in source.parameters() if value.grad is not None)])
    assert passes[0] == 27
    assert len(passes) > 2
    assert sum(passes) == 54
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_the_shares_of_two_processes_mean_the_loss_of_the_whole_batch() -> None:
    task = make_task()
    groups, objective = bank(task)([0, 2]), CausalObjective(CausalConfig())
    rows = list(task.rows)
    rows[2] = Row("q2", Path("x.png"), (), "c", question="what ?", answers=("red round square",) * 10)
    task.readers[0].encoded = encode_rows(task.readers[0].prompter, rows, "a")
    batch = task.batch(torch.tensor([0, 1, 2, 3]), 0, 0)
    whole = task.losses(groups, SPEC, objective, batch)
    parts = [task.losses(groups, SPEC, objective, task.share(batch, part)) for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-6, atol=1e-6)


def test_a_visit_of_two_llms_is_refused() -> None:
    task = make_task()
    with pytest.raises(ValueError, match="share one LLM"):
        task.losses(bank(task)([0, 1]), SPEC, CausalObjective(CausalConfig()), task.batch(torch.tensor([0]), 0, 0))


def test_a_match_is_what_greedy_decoding_writes() -> None:
    task = make_task()
    source = bank(task)
    questions = task.validation
    for llm_number in (0, 1):
        members = [pair.index for pair in task.grid.pairs() if pair.text == llm_number]
        said = task.answers(source(members), SPEC, questions)
        found = task._matches(source(members), SPEC, questions)
        for answers, (match, _) in zip(said, found, strict=True):
            right = [
                answer == task.rows[row].answers[0] for answer, row in zip(answers, questions.tolist(), strict=True)
            ]
            assert match == pytest.approx(sum(right) / len(right))


def test_answers_do_not_depend_on_who_shares_the_batch() -> None:
    task = make_task()
    source = bank(task)
    together = task.answers(source([1, 3, 5]), SPEC, task.tests["held out"])
    task.chunk = 1
    alone = [task.answers(source([index]), SPEC, task.tests["held out"])[0] for index in (1, 3, 5)]
    assert together == alone


def test_evaluation_names_every_set_and_its_blind_baseline() -> None:
    task = make_task()
    found = task.evaluate(bank(task), SPEC)
    assert list(found.scores) == ["held out"]
    assert {"validation held out", "validation loss", "blind validation loss", "blind held out"} <= set(found.details)
    assert all(len(values) == 6 for values in (found.scores | found.details).values())
    assert found.details["blind held out"][0::2] == [found.details["blind held out"][0]] * 3
    assert found.flops > 0


def test_scaled_outputs_are_as_long_as_the_llms_own_embeddings() -> None:
    task = make_task()
    for pair in task.grid.pairs():
        fresh = connectors.initial(SPEC, task.grid.shape(pair.index), 1, torch.Generator().manual_seed(99))
        params = {name: value.double() for name, value in fresh.items()}
        tokens = task.towers[pair.vision].read(task.picture[task.train])
        rms = task.scales(SPEC)[pair.index] * connectors.apply(SPEC, params, tokens[None]).square().mean().sqrt()
        assert float(rms) == pytest.approx(task.facts[pair.text].embedding_rms, rel=0.5)


def test_counted_flops_are_torchs() -> None:
    task = make_task(double=False)
    rows = [row for row in task.train.tolist() if row % 3]  # of one length, so that nothing is padded
    task.train = torch.tensor(rows)
    task.facts = [facts_of(task.readers[number], rows) for number in (0, 1)]
    members = [0, 2, 4]
    task.towers = [task.towers[0], task.towers[0], Tower(*_as_long(task))]
    source = ConnectorBank(task.grid, SPEC, 3)
    task.scales(SPEC)
    batch = task.batch(task.train[:6], 0, 0)
    with FlopCounterMode(display=False) as counter:
        task.losses(source(members), SPEC, CausalObjective(CausalConfig()), batch).sum().backward()
    assert task.visit_flops(SPEC, members, 6) == pytest.approx(counter.get_total_flops(), rel=0.1)


def _as_long(task: MLLMTask) -> tuple[Tensor, int, Tensor, Tensor]:
    tower = task.towers[2]
    return torch.cat([tower.tokens[torch.arange(12)]] * 2, 1)[:, :4], 4, tower.mean, tower.spread


def test_a_search_learns_to_tell_the_colours(tmp_path: Path, accelerator: Accelerator) -> None:
    task = make_task(double=False)
    fast = OptimiserConfig(lr=2e-2)
    config = SearchConfig(
        methods=["hyma", "grid", "constrained-grid", "random"], connectors=["mlp1"], hidden=0, activation="gelu",
        seeds=[0], steps=30, grid_steps=30, batch=8, optimiser=fast, rival_optimiser=fast, evaluate_every=10,
        checkpoint_every=10,
    )  # fmt: skip
    run = RunDirectory(tmp_path / "run", {})
    search = Search(
        config, HypernetworkConfig(trunk=[16, 16]), lambda: CausalObjective(CausalConfig()), task, *task.means(),
        accelerator, run, StopRequest(),
    )  # fmt: skip
    before = task.validate(search.network("hyma", SPEC, 0), SPEC).details["validation loss"]
    found = search.run_method("hyma", "mlp1", 0, None)
    after = found.ranking.details["validation loss"]
    assert all(late < early - 0.3 for late, early in zip(after, before, strict=True))
    assert all(0 <= score <= 100 for score in found.ranking.scores["held out"])
    grid = search.run_method("grid", "mlp1", 0, found.ledger)
    assert grid.ledger.phases["training"].flops > found.ledger.phases["training"].flops * 0.5
    run.close()

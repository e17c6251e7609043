"""The task's losses and scores against the plain definition: one nn.Sequential a pair, one sentence at a time."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.objectives.contrastive import ContrastiveConfig, ContrastiveObjective
from hyma_mllm.search import task as task_module
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.pair_loss import PairLoss
from hyma_mllm.search.task import Batch, VLMTask


def modules(bank: ConnectorBank, spec: ConnectorSpec, task: VLMTask) -> list[nn.Sequential]:
    """Every pair's connector as a plain module."""
    found: dict[int, nn.Sequential] = {}
    for group in bank(range(len(task.grid))):
        for row, index in enumerate(group.pairs.tolist()):
            found[index] = connectors.module(spec, task.grid.shape(index))
            found[index].load_state_dict(connectors.select(group.params, row))
    return [found[index] for index in range(len(task.grid))]


@pytest.fixture(params=["linear", "mlp1", "mlp2"])
def spec(request: pytest.FixtureRequest) -> ConnectorSpec:
    return ConnectorSpec.named(request.param, hidden=10)


@pytest.fixture
def bank(task: VLMTask, spec: ConnectorSpec) -> ConnectorBank:
    return ConnectorBank(task.grid, spec, 3)


@torch.no_grad()
def brute_force_retrieval(task: VLMTask, module: nn.Sequential, index: int, pictures: list[int]) -> dict[str, float]:
    """Recall both ways, query by query; the synthetic scores have no ties."""
    pair = task.grid.pair(index)
    captions = [
        (place, row)
        for place, picture in enumerate(pictures)
        for row in range(int(task.first_caption[picture]), int(task.first_caption[picture + 1]))
    ]
    image = [F.normalize(task.images[pair.vision][picture], dim=0) for picture in pictures]
    text = [F.normalize(module(task.texts[pair.text][row]), dim=0) for _, row in captions]
    result = {}
    for k in (1, 5, 10):
        hits = 0
        for (place, _), mapped in zip(captions, text, strict=True):
            order = sorted(range(len(image)), key=lambda i: -float(mapped @ image[i]))
            hits += place in order[:k]
        result[f"text_to_image R@{k}"] = 100 * hits / len(captions)
        hits = 0
        for place, picture in enumerate(image):
            order = sorted(range(len(text)), key=lambda c: -float(text[c] @ picture))
            hits += any(captions[c][0] == place for c in order[:k])
        result[f"image_to_text R@{k}"] = 100 * hits / len(image)
    result["retrieval"] = (result["text_to_image R@10"] + result["image_to_text R@10"]) / 2
    return result


@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_scores_are_those_of_each_pair_alone(
    task: VLMTask, bank: ConnectorBank, spec: ConnectorSpec, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_module, "EVALUATION_PAIRS", chunk)
    found = task.scores(bank, spec, task.test)
    for index, module in enumerate(modules(bank, spec, task)):
        for name, value in brute_force_retrieval(task, module, index, task.test.tolist()).items():
            assert found[name][index] == pytest.approx(value, abs=1e-4), (index, name)
    assert len(set(found["retrieval"])) > 1


def test_equal_captions_count_for_each_other(task: VLMTask) -> None:
    """All captions say the same: whatever is found is right."""
    spec = ConnectorSpec.named("linear")
    task.caption_group = torch.zeros_like(task.caption_group)
    found = task.scores(ConnectorBank(task.grid, spec, 0), spec, task.test)
    assert found["image_to_text R@1"] == [100.0] * len(task.grid)


def test_classes_are_those_of_each_pair_alone(task: VLMTask, bank: ConnectorBank, spec: ConnectorSpec) -> None:
    sets = task.zero_shot[0]
    g = torch.Generator().manual_seed(1)
    sets.templates = 2  # every class under two prompts
    sets.prompts = [
        torch.stack([p, p + 0.3 * torch.randn(p.shape, generator=g)], 1).flatten(0, 1) for p in sets.prompts
    ]
    found = task.classify(bank, spec)["zero-shot/latent"]
    for index, module in enumerate(modules(bank, spec, task)):
        pair = task.grid.pair(index)
        with torch.no_grad():
            classes = []
            for number in range(len(sets.prompts[pair.text]) // 2):
                both = [F.normalize(module(p), dim=0) for p in sets.prompts[pair.text][2 * number : 2 * number + 2]]
                classes.append(F.normalize(both[0] + both[1], dim=0))
            right = [
                max(range(len(classes)), key=lambda c: float(task.images[pair.vision][picture] @ classes[c])) == label
                for picture, label in zip(sets.pictures.tolist(), sets.labels.tolist(), strict=True)
            ]
        assert found[index] == pytest.approx(100 * sum(right) / len(right), abs=1e-4)


def test_losses_are_infonce_of_each_pair_alone(task: VLMTask, bank: ConnectorBank, spec: ConnectorSpec) -> None:
    batch = task.batch(task.train[:20], 0, 3)
    model = PairLoss(bank, ContrastiveObjective(ContrastiveConfig(scale=7.0)), task, spec)
    wanted_order = [5, 0, 4, 2, 1, 3]
    found = model(wanted_order, batch)
    plain = modules(bank, spec, task)
    for position, index in enumerate(wanted_order):
        pair = task.grid.pair(index)
        mapped = F.normalize(plain[index](task.texts[pair.text][batch.captions]), dim=1)
        logits = 7.0 * mapped @ task.images[pair.vision][batch.pictures].T
        right = torch.arange(20)
        wanted = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
        torch.testing.assert_close(found[position], wanted)


def test_the_same_picture_twice_is_no_negative(task: VLMTask) -> None:
    spec = ConnectorSpec.named("linear")
    model = PairLoss(ConnectorBank(task.grid, spec, 0), ContrastiveObjective(ContrastiveConfig(scale=7.0)), task, spec)
    picture = int(task.train[0])
    first = int(task.first_caption[picture])
    alone = model([0, 5], Batch(torch.tensor([picture, picture]), torch.tensor([first, first])))
    assert torch.equal(alone, torch.zeros(2))


def test_every_caption_is_drawn(task: VLMTask) -> None:
    """Each of a picture's captions about equally often, and the same ones for the same number."""
    pictures = torch.full((3000,), 2)  # it has three
    drawn = task.batch(pictures, 0, 0).captions - task.first_caption[2]
    counts = torch.bincount(drawn, minlength=3)
    assert counts.tolist() == pytest.approx([1000] * 3, abs=120)
    assert torch.equal(task.batch(pictures, 0, 0).captions, task.batch(pictures, 0, 0).captions)
    assert not torch.equal(task.batch(pictures, 0, 0).captions, task.batch(pictures, 0, 1).captions)


def test_flops_add_up_over_pairs(task: VLMTask, spec: ConnectorSpec) -> None:
    everything = list(range(len(task.grid)))
    assert task.visit_flops(spec, everything, 8) == sum(task.visit_flops(spec, [k], 8) for k in everything)
    captions = sum(int(task.first_caption[p + 1] - task.first_caption[p]) for p in task.test.tolist())
    wanted = sum(
        2 * captions * spec.parameters(*task.grid.shape(k)) + 2 * captions * len(task.test) * task.grid.shape(k)[1]
        for k in everything
    )
    assert task.scoring_flops(spec, task.test) == wanted


def test_one_pair_and_one_picture_are_a_task(small_task: VLMTask) -> None:
    spec = ConnectorSpec.named("linear")
    found = small_task.scores(ConnectorBank(small_task.grid, spec, 0), spec, small_task.test[:1])
    assert found["retrieval"] == [100.0]

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.data import resident
from hyma_mllm.data.class_sets import PLAIN_TEMPLATES
from hyma_mllm.data.collection import Part
from hyma_mllm.data.library import Library
from hyma_mllm.data.resident import MappedFeatures
from hyma_mllm.data.rows import Row
from hyma_mllm.data.sharded_rows import ShardedRows
from hyma_mllm.data.splits import Split
from hyma_mllm.data.standardise import StandardiseConfig
from hyma_mllm.errors import HymaError
from hyma_mllm.objectives.contrastive import ContrastiveConfig, ContrastiveObjective
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.prepare import FEWEST_TO_CLASSIFY, Prepared, prepare, split_rows
from hyma_mllm.zoo.cards import ModelCard

WIDTHS = {"v0": 6, "v1": 8, "t0": 5, "t1": 8}
COLOURS = ("red", "green", "blue")


def card(name: str) -> ModelCard:
    return ModelCard(
        id=name,
        kind="image" if name.startswith("v") else "text",
        source="test",
        revision="1",
        width=WIDTHS[name],
        tokens=None,
        resolution=None,
        parameters=1,
        licence="MIT",
    )


VISION, TEXT = [card("v0"), card("v1")], [card("t0"), card("t1")]


@dataclass
class Given:
    """A source that is a list."""

    items: list[Row]
    name: str = "given"
    licence: str = "MIT"
    fingerprint: str = "f" * 64

    def rows(self) -> Iterator[Row]:
        return iter(self.items)


@dataclass
class FakeLibrary:
    """Features that are a function of the model's id and the key or text alone."""

    asked: list[str] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def images(self, cards: Sequence[ModelCard], parts: Sequence[Part]) -> list[ShardedRows]:
        return [pieces([self.feature(c, row.key) for part in parts for row in part.rows]) for c in cards]

    def texts(
        self, cards: Sequence[ModelCard], items: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    ) -> list[ShardedRows]:
        self.asked += [text for _, texts in items for _, text in texts]
        return [pieces([self.feature(c, text) for _, texts in items for _, text in texts]) for c in cards]

    @staticmethod
    def feature(c: ModelCard, word: str) -> Tensor:
        seed = sum(ord(letter) * 31**place for place, letter in enumerate(c.id + word)) % 2**31
        return torch.randn(c.width, generator=torch.Generator().manual_seed(seed)) + 3


def pieces(rows: list[Tensor]) -> ShardedRows:
    """The rows as a store of shards would give them."""
    return ShardedRows(torch.stack(rows).split(17))


def rows_of(count: int, prefix: str = "a") -> list[Row]:
    """Rows of one to three captions; every third has no label."""
    return [
        Row(
            key=f"{prefix}{n}",
            image=Path(f"{n}.png"),
            texts=tuple(f"{prefix} thing {n} seen {k}" for k in range(n % 3 + 1)),
            concept=f"{prefix}{n}",
            label=None if n % 3 == 2 else COLOURS[n // 3 % 3],
            class_set="colours",
        )
        for n in range(count)
    ]


def run(parts: list[Part], split: Split, config: StandardiseConfig | None = None) -> tuple[Prepared, FakeLibrary]:
    library = FakeLibrary()
    config = config or StandardiseConfig()
    return prepare(VISION, TEXT, parts, split, cast(Library, library), config), library


def parts_of(*sizes: int) -> list[Part]:
    return [
        Part(Given(rows), str(number), rows)
        for number, rows in enumerate(rows_of(size, "abc"[k]) for k, size in enumerate(sizes))
    ]


SPLIT = Split(list(range(40)), list(range(40, 50)), list(range(50, 110)))


def test_standardisers_see_the_training_split_only() -> None:
    """Other pictures and captions outside the training split change no standardiser."""
    prepared, _ = run(parts_of(70, 40), SPLIT)
    fewer, _ = run(parts_of(60), Split(SPLIT.train, SPLIT.validation, list(range(50, 60))))
    for one, other in zip(
        prepared.image_standardisers + prepared.text_standardisers,
        fewer.image_standardisers + fewer.text_standardisers,
        strict=True,
    ):
        assert torch.equal(one.mean, other.mean) and torch.equal(one.scale, other.scale)


def test_training_features_are_centred_and_on_the_sphere() -> None:
    prepared, _ = run(parts_of(110), SPLIT, StandardiseConfig(image_power="none"))
    task = prepared.task
    for number, (features, model) in enumerate(zip(task.images, VISION, strict=True)):
        raw = F.normalize(torch.stack([FakeLibrary.feature(model, f"a{n}") for n in range(110)]), dim=1)
        wanted = F.normalize(raw - raw[:40].mean(0), dim=1)
        torch.testing.assert_close(features[:], wanted, atol=1e-5, rtol=1e-4)
        assert prepared.image_standardisers[number].unit
    captions = int(task.first_caption[40])
    for features, width in zip(task.texts, task.grid.text_widths, strict=True):
        torch.testing.assert_close(features[:captions].mean(0), torch.zeros(width), atol=1e-5, rtol=0)
        assert float(features[:captions].square().mean()) == pytest.approx(1.0, abs=1e-3)


def test_features_on_disk_give_the_losses_and_scores_of_features_in_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit for bit, and only what is asked for is read."""
    with caplog.at_level(logging.INFO, logger="hyma_mllm"):
        loaded, _ = run(parts_of(110), SPLIT)
        monkeypatch.setattr(resident, "free_memory", lambda device: 0)
        mapped, _ = run(parts_of(110), SPLIT)
    assert "they are loaded there" in caplog.messages[0] and "stay memory-mapped on disk" in caplog.messages[1]
    assert all(isinstance(rows, Tensor) for rows in [*loaded.task.images, *loaded.task.texts])
    assert all(isinstance(rows, MappedFeatures) for rows in [*mapped.task.images, *mapped.task.texts])
    for one, other in zip(
        loaded.vision_means + loaded.text_means, mapped.vision_means + mapped.text_means, strict=True
    ):
        assert torch.equal(one, other)
    spec = ConnectorSpec.named("linear", hidden=10)
    bank = ConnectorBank(loaded.task.grid, spec, 0)
    objective = ContrastiveObjective(ContrastiveConfig(scale=10.0))
    outcomes = []
    for task in (loaded.task, mapped.task):
        batch = task.batch(task.train[:32], seed=0, number=0)
        losses = task.losses(bank(range(4)), spec, objective, batch)
        outcomes.append((losses.tolist(), task.scores(bank, spec, task.test), task.classify(bank, spec)))
    assert outcomes[0] == outcomes[1]


def test_captions_of_a_row_stand_together() -> None:
    parts = parts_of(30, 80)
    prepared, _ = run(parts, SPLIT)
    task = prepared.task
    texts = [text for row in prepared.rows for text in row.texts]
    assert [row.key for row in prepared.rows] == [row.key for part in parts for row in part.rows]
    for number, row in enumerate(prepared.rows):
        first, last = int(task.first_caption[number]), int(task.first_caption[number + 1])
        assert tuple(texts[first:last]) == row.texts
    assert len(task.texts[0]) == len(texts) == int(task.first_caption[-1])
    assert (task.train.tolist(), task.validation.tolist(), task.test.tolist()) == (
        SPLIT.train,
        SPLIT.validation,
        SPLIT.test,
    )
    assert task.grid.vision_widths == (6, 8) and task.grid.text_widths == (5, 8)


def test_captions_that_say_the_same_share_a_group() -> None:
    parts = parts_of(110)
    rows = parts[0].rows
    rows[3] = Row("x", Path("x.png"), ("Same Words", "other"), "x")
    rows[60] = Row("y", Path("y.png"), (" same words", "more"), "y")
    prepared, _ = run(parts, SPLIT)
    first, groups = prepared.task.first_caption, prepared.task.caption_group
    assert groups[first[3]] == groups[first[60]]
    assert len(set(groups.tolist())) == len(groups) - 1


def test_zero_shot_sets_hold_labelled_test_pictures_and_the_classes_prompts() -> None:
    prepared, library = run(parts_of(110), SPLIT)
    (task,) = prepared.task.zero_shot
    rows = prepared.rows
    classes = sorted(COLOURS)
    assert task.name == "colours" and task.templates == len(PLAIN_TEMPLATES)
    assert task.pictures.tolist() == [n for n in SPLIT.test if rows[n].label is not None]
    assert [classes[label] for label in task.labels.tolist()] == [rows[n].label for n in task.pictures.tolist()]
    prompts = library.asked[-len(classes) * len(PLAIN_TEMPLATES) :]
    for number, name in enumerate(classes):
        assert all(name in prompt for prompt in prompts[number * task.templates : (number + 1) * task.templates])
    for text, (model, features) in enumerate(zip(TEXT, task.prompts, strict=True)):
        raw = torch.stack([FakeLibrary.feature(model, prompt) for prompt in prompts])
        torch.testing.assert_close(features, prepared.text_standardisers[text](raw))


def test_too_few_pictures_or_classes_make_no_zero_shot_set() -> None:
    few = Split(list(range(90)), list(range(90, 100)), list(range(100, 110)))
    assert len(few.test) < FEWEST_TO_CLASSIFY
    assert run(parts_of(110), few)[0].task.zero_shot == []
    parts = parts_of(110)
    parts[0].rows[:] = [
        Row(row.key, row.image, row.texts, row.concept, "red", "colours") if row.label else row for row in parts[0].rows
    ]
    assert run(parts, SPLIT)[0].task.zero_shot == []


def test_rows_are_split_by_concept_over_all_parts() -> None:
    parts = parts_of(200, 200)
    split = split_rows(parts, 0.1, 0.2, 0)
    assert sorted(split.train + split.validation + split.test) == list(range(400))
    assert split == split_rows(parts, 0.1, 0.2, 0)
    assert len(split.test) == pytest.approx(80, abs=25)


def test_a_split_without_rows_is_refused() -> None:
    parts = [Part(Given([]), "0", [Row("a", Path("a.png"), ("one",), "one")])]
    with pytest.raises(HymaError, match="rows"):
        split_rows(parts, 0.1, 0.1, 0)

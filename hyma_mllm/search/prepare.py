"""From stored features to the search's task: split by concept, standardised on the training split."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyma_mllm.data.class_sets import class_sets
from hyma_mllm.data.collection import Part
from hyma_mllm.data.library import Library
from hyma_mllm.data.resident import fit_memory, standardised, standardised_models
from hyma_mllm.data.rows import Row
from hyma_mllm.data.sharded_rows import ShardedRows
from hyma_mllm.data.splits import Split, split_by_concept
from hyma_mllm.data.standardise import StandardiseConfig, Standardiser
from hyma_mllm.errors import HymaError
from hyma_mllm.pairs import PairGrid
from hyma_mllm.search.task import VLMTask, ZeroShotSet, captions_of
from hyma_mllm.zoo.cards import ModelCard

FEWEST_TO_CLASSIFY = 20
"""A class set with fewer held-out pictures than this makes no score."""


@dataclass
class Prepared:
    """The task of a search, with what its report and its export need.

    Attributes:
        task: what the search reads.
        rows: all pictures, in the order of the features.
        split: of the rows.
        image_standardisers, text_standardisers: per encoder, fitted on the training split.
        vision_means, text_means: per encoder, mean L2-normalised feature [width] of the training split, before any
            centring (what the condition `features` reads; held-out features would leak into it).
    """

    task: VLMTask
    rows: list[Row]
    split: Split
    image_standardisers: list[Standardiser]
    text_standardisers: list[Standardiser]
    vision_means: list[Tensor]
    text_means: list[Tensor]


def prepare(
    vision: Sequence[ModelCard],
    text: Sequence[ModelCard],
    parts: Sequence[Part],
    split: Split,
    library: Library,
    standardise: StandardiseConfig,
) -> Prepared:
    """Embed what is missing and build the task.

    Args:
        vision: the N image encoders.
        text: the M text encoders.
        parts: good rows, source by source.
        split: of all rows, parts one after another.
        library: reads and writes feature stores.
        standardise: how features are standardised.

    Raises:
        HymaError: a split is empty, or a store is damaged.
    """
    rows = [row for part in parts for row in part.rows]
    images = library.images(vision, parts)
    texts = library.texts(text, [(part.fingerprint, part.captions) for part in parts])
    first_caption = torch.tensor([0, *(len(row.texts) for row in rows)]).cumsum(0)
    prepared = assemble(
        vision, text, images, texts, rows, split, first_caption, _caption_groups(rows), standardise, library.device
    )
    prepared.task.zero_shot = _zero_shot(rows, split.test, text, library, prepared.text_standardisers)
    return prepared


def assemble(
    vision: Sequence[ModelCard],
    text: Sequence[ModelCard],
    images: Sequence[ShardedRows],
    texts: Sequence[ShardedRows],
    rows: list[Row],
    split: Split,
    first_caption: Tensor,
    caption_group: Tensor,
    standardise: StandardiseConfig,
    device: torch.device,
) -> Prepared:
    """Standardise features on the training split and build the task, without zero-shot sets.

    Args:
        vision: the N image encoders.
        text: the M text encoders.
        images: per image encoder, raw features [pictures, width].
        texts: per text encoder, raw features [captions, width].
        rows: the pictures, where they are known.
        split: of the pictures.
        first_caption: [pictures + 1] int64, see `VLMTask`.
        caption_group: [captions] int64, see `VLMTask`.
        standardise: how features are standardised.
        device: the training device; features are loaded there when all fit, else read from disk batch by batch.
    """
    train = torch.tensor(split.train)
    captions, _ = captions_of(first_caption, train)
    resident = fit_memory([*images, *texts], device)
    power, centre = standardise.image_power, standardise.centre
    seen = standardised_models(images, train, device, resident, power, centre, True, standardise.image_scale)
    said = standardised_models(texts, captions, device, resident, "none", centre, False, standardise.text_scale)
    task = VLMTask(
        grid=PairGrid(
            tuple(card.id for card in vision),
            tuple(card.width for card in vision),
            tuple(card.id for card in text),
            tuple(card.width for card in text),
        ),
        images=[model.rows for model in seen],
        texts=[model.rows for model in said],
        first_caption=first_caption,
        train=train,
        validation=torch.tensor(split.validation),
        test=torch.tensor(split.test),
        caption_group=caption_group,
    )
    return Prepared(
        task,
        rows,
        split,
        [model.standardiser for model in seen],
        [model.standardiser for model in said],
        [model.mean for model in seen],
        [model.mean for model in said],
    )


def split_rows(parts: Sequence[Part], validation: float, test: float, seed: int) -> Split:
    """Split all rows by concept.

    Raises:
        HymaError: a split came out empty.
    """
    rows = [row for part in parts for row in part.rows]
    split = split_by_concept(rows, seed, validation, test)
    for name, members in (("training", split.train), ("validation", split.validation), ("test", split.test)):
        if not members:
            raise HymaError(f"The {name} split of {len(rows)} rows is empty; add rows, or raise data.{name}.")
    return split


def _caption_groups(rows: Sequence[Row]) -> Tensor:
    """[captions] int64: equal captions, whatever their case, share a number."""
    numbers: dict[str, int] = {}
    return torch.tensor(
        [numbers.setdefault(text.casefold().strip(), len(numbers)) for row in rows for text in row.texts]
    )


def _zero_shot(
    rows: Sequence[Row],
    test: Sequence[int],
    text: Sequence[ModelCard],
    library: Library,
    standardisers: Sequence[Standardiser],
) -> list[ZeroShotSet]:
    """A classification task for each class set that has enough held-out pictures."""
    tasks = []
    for name, classes in sorted(class_sets(rows).items()):
        members = [index for index in test if rows[index].class_set == name and rows[index].label is not None]
        if len(members) < FEWEST_TO_CLASSIFY or len(classes.classes) < 2:
            continue
        prompts = [prompt for group in classes.prompts() for prompt in group]
        digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
        keyed = [(f"prompt {number}", prompt) for number, prompt in enumerate(prompts)]
        features = library.texts(text, [(f"prompts-{digest}", keyed)])
        number_of = {label: number for number, label in enumerate(classes.classes)}
        tasks.append(
            ZeroShotSet(
                name=name,
                pictures=torch.tensor(members),
                labels=torch.tensor([number_of[rows[index].label or ""] for index in members]),
                templates=len(classes.templates),
                prompts=[
                    standardised(raw[:], standardiser, library.device)
                    for standardiser, raw in zip(standardisers, features, strict=True)
                ],
            )
        )
    return tasks

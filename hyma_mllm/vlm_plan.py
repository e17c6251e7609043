"""What a VLM search needs of disk, memory and GPU, and which settings would need less."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from hyma_mllm.data.manifest import DTYPES
from hyma_mllm.data.resident import MEMORY_SHARE
from hyma_mllm.planning.machine import room_of
from hyma_mllm.planning.needs import Change, Need, Place, Plan, Room, halves, setting
from hyma_mllm.planning.search import LIBRARIES, predicted_need, sampler_of, trained_needs, visit_shapes
from hyma_mllm.planning.training import FLOAT, contrastive_visit, embedding_pass, retrieval_scores
from hyma_mllm.plans import tell_or_refuse
from hyma_mllm.zoo.cards import ModelCard, base_id
from hyma_mllm.zoo.text import text_on_disk
from hyma_mllm.zoo.vision import image_on_disk

if TYPE_CHECKING:
    from hyma_mllm.vlm import VLMConfig

CAPTIONS = 3
"""Captions of a picture in the built-in corpora; other sources seldom have more."""

ROW = 1500
"""Bytes of a row's key, captions and concept in memory."""

TEXT_LENGTH = 128
"""Tokens of a text, for the memory of a pass through a text encoder."""


def print_plan(config: "VLMConfig", rows: int, accelerator: Accelerator) -> None:
    """Say what the run needs beside what there is.

    Args:
        config: the run.
        rows: pictures, 0 where their number is not known before reading; features are then left out.
        accelerator: processes and device.

    Raises:
        HymaError: it does not fit; it names settings that would.
    """
    room, processes = room_of(config.run, accelerator.device), accelerator.num_processes

    def plan(changed: "VLMConfig") -> Plan:
        return Plan(tuple(needs(changed, rows, processes, room)), room)

    per_million = 1e6 * bytes_of_a_row(config) / 1e9
    remark = f"The number of pictures is not known yet: features take {per_million:.1f} GB a million."
    tell_or_refuse(config, plan, changes(config, processes), accelerator, "" if rows else remark)


def bytes_of_a_row(config: "VLMConfig") -> float:
    """Bytes of disk that the features of one picture and its captions take."""
    widths = _widths(config.image_cards()) + CAPTIONS * _widths(config.text_cards())
    return float(DTYPES[config.embedding.storage_dtype].itemsize * widths)


def needs(config: "VLMConfig", rows: int, processes: int, room: Room) -> Iterator[Need]:
    """Everything that takes room.

    Args:
        config: the run.
        rows: pictures, 0 where unknown.
        processes: that share the work.
        room: what there is, for features are held in memory only where they take little of it.
    """
    compute: Place = "gpu" if "gpu" in room.free else "memory"
    image, text, grid = config.image_cards(), config.text_cards(), config.grid()
    yield Need("Python and its libraries", "memory", LIBRARIES)
    if rows:
        yield Need(f"{rows:,} rows of words and keys", "memory", float(ROW * rows))
        resident = FLOAT * rows * (_widths(image) + CAPTIONS * _widths(text))
        if resident <= MEMORY_SHARE * room.free[compute]:
            yield Need("standardised features of all models", compute, float(resident))
    if config.data.stores is None:
        yield from _embedding_needs(config, rows, compute)
    visits = sampler_of(grid, config.search).visits_per_step
    yield from trained_needs(grid, config.search, config.hypernetwork, compute, visits)
    shapes = visit_shapes(grid, config.search)
    batch = config.search.batch
    spec = max(map(config.search.spec, config.search.connectors), key=lambda spec: spec.parameters(*shapes[0]))
    yield predicted_need(spec, shapes, config.search, compute)
    size = contrastive_visit(spec, shapes, batch // processes, batch, config.objective.tile)
    yield Need(f"activations of a visit, batch {batch}", compute, size, "training")
    tested = int(rows * config.data.test)
    if tested:
        width = max(grid.vision_widths) + max(grid.text_widths)
        size = retrieval_scores(tested, CAPTIONS * tested, width)
        yield Need(f"scores of {tested:,} test pictures", compute, size, "scoring")


def changes(config: "VLMConfig", processes: int) -> list[Change[Any]]:
    """Settings that need less room, those that change the result least first."""
    search, embedding = config.search, config.embedding
    found = [setting("embedding.storage_dtype", "fp16")] if embedding.storage_dtype == "fp32" else []
    found += [setting("objective.tile", 256)] if config.objective.tile == 0 else []
    found += [setting("embedding.batch_size", size) for size in halves(embedding.batch_size, 1)]
    found += [setting("search.pairs_per_visit", size) for size in halves(len(visit_shapes(config.grid(), search)), 1)]
    if "hyma" in search.methods and len(search.methods) > 1:
        found.append(setting("search.methods", ["hyma"]))
    return found + [
        setting("search.batch", size) for size in halves(search.batch, 2 * processes) if size % processes == 0
    ]


def _embedding_needs(config: "VLMConfig", rows: int, compute: Place) -> Iterator[Need]:
    image, text = config.image_cards(), config.text_cards()
    absent = [card for card in image if not image_on_disk(card)] + [card for card in text if not text_on_disk(card)]
    if absent:
        yield Need(f"{len(absent)} models to be fetched", "cache", sum(map(downloaded, absent)))
    if rows:
        yield Need(f"features of {rows:,} pictures", "cache", rows * bytes_of_a_row(config))
    largest = max([*image, *text], key=lambda card: card.parameters)
    yield Need(f"weights of {largest.id}", compute, float(FLOAT * largest.parameters), "embedding")
    batch = config.embedding.batch_size
    passes = [embedding_pass(batch, card.resolution or 224) for card in image]
    passes += [batch * TEXT_LENGTH * card.width * 16.0 * FLOAT for card in text]
    yield Need(f"a pass of {batch} items through it", compute, max(passes), "embedding")


def downloaded(card: ModelCard) -> float:
    """Bytes that a fetched model takes: float32 weights, and what a package is converted from beside them."""
    packaged = ":" not in card.id
    return float(FLOAT * card.parameters * (2 if packaged else 1))


def _widths(cards: list[ModelCard]) -> int:
    """Widths of all models together; a control shares its model's features."""
    return sum({base_id(card.id): card.width for card in cards}.values())

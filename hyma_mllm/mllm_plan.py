"""What an MLLM search needs of disk, memory and GPU, and which settings would need less."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from hyma_mllm.data.token_codes import row_bytes
from hyma_mllm.mllm_placement import ELEMENT, loaded_bytes, loads
from hyma_mllm.planning.machine import room_of
from hyma_mllm.planning.needs import Change, Need, Place, Plan, Room, halves, setting
from hyma_mllm.planning.search import LIBRARIES, predicted_need, sampler_of, trained_needs, visit_shapes
from hyma_mllm.planning.training import (
    FLOAT,
    answering,
    causal_loss,
    causal_visit,
    embedding_pass,
    projector_visit,
)
from hyma_mllm.plans import tell_or_refuse
from hyma_mllm.search.placement import place
from hyma_mllm.zoo.cards import ModelCard, base_id
from hyma_mllm.zoo.llm import llm_on_disk
from hyma_mllm.zoo.llm_shape import llm_shape
from hyma_mllm.zoo.vision_tokens import tower_on_disk

if TYPE_CHECKING:
    from hyma_mllm.mllm import Counts, MLLMConfig

BEFORE = 30
"""Tokens that a chat template puts in front of the picture."""

ANSWER = 4
"""Supervised tokens of a short answer."""

WORD = 48
"""Bytes of a token of a question in memory: its id and its place in two lists."""

QUESTION = 1500
"""Bytes of a question's row: key, words, picture's path."""


def print_plan(config: "MLLMConfig", counts: "Counts", accelerator: Accelerator) -> None:
    """Say what the run needs beside what there is.

    Args:
        config: the run.
        counts: questions and pictures, as far as they are known.
        accelerator: processes and device.

    Raises:
        HymaError: it does not fit; it names settings that would.
    """
    room, processes = room_of(config.run, accelerator.device), accelerator.num_processes

    def plan(changed: "MLLMConfig") -> Plan:
        return Plan(tuple(needs(changed, counts, processes, room)), room)

    computed = [card.id for card, stored in tokens_stored(config, counts.pictures) if not stored]
    remark = f"over tokens.disk_gb, so run again for every batch: {', '.join(computed)}" if computed else ""
    tell_or_refuse(config, plan, changes(config, processes), accelerator, remark)


def needs(config: "MLLMConfig", counts: "Counts", processes: int, room: Room) -> Iterator[Need]:
    """Everything that takes room.

    Args:
        config: the run.
        counts: questions and pictures, as far as they are known.
        processes: that share the work.
        room: what there is; on a GPU the models are there.
    """
    compute: Place = "gpu" if "gpu" in room.free else "memory"
    llms = config.llm_cards()
    own = _own_llms(config, processes)
    yield Need("Python and its libraries", "memory", LIBRARIES)
    if counts.questions:
        size = float(counts.questions * (QUESTION + WORD * counts.text * len(own)))
        yield Need(f"{counts.questions:,} questions in the words of {len(own)} LLMs", "memory", size)
    absent = [card for card in llms if not llm_on_disk(card)]
    if absent:
        yield Need(f"{len(absent)} LLMs to be fetched", "cache", sum(2.6 * card.parameters for card in absent))
    for number in own:
        yield Need(f"weights of {llms[number].id}", compute, loaded_bytes(config, llm_shape(llms[number])))
    if config.llm.quantisation == "bf16":
        # It is loaded in the dtype that it computes in, and narrowed then.
        largest = max((llm_shape(llms[number]) for number in own), key=lambda shape: shape.parameters)
        wide = ELEMENT[config.llm.precision()] * largest.parameters - loaded_bytes(config, largest)
        yield Need("the largest LLM while it is narrowed", compute, max(wide, 0.0), "loading")
    yield from _token_needs(config, counts, compute)
    grid = config.grid()
    visits = sampler_of(grid, config.search, [pair.text for pair in grid.pairs()]).visits_per_step
    yield from trained_needs(grid, config.search, config.hypernetwork, compute, visits)
    yield from _visit_needs(config, counts, processes, compute)


def tokens_stored(config: "MLLMConfig", pictures: int) -> list[tuple[ModelCard, bool]]:
    """The distinct towers, and whether their tokens are stored, as `TokenLibrary.plan` will decide."""
    left, found = config.tokens.disk_gb * 1e9, []
    for card in {base_id(card.id): card for card in config.tower_cards()}.values():
        size = pictures * row_bytes(config.tokens.storage_dtype, card.tokens or 0, card.width)
        found.append((card, size <= left))
        left -= size if size <= left else 0
    return found


def changes(config: "MLLMConfig", processes: int) -> list[Change[Any]]:
    """Settings that need less room, those that change the result least first."""
    search, tokens = config.search, config.tokens
    found = [setting("answer_batch", size) for size in halves(config.answer_batch, 1)]
    found += [] if config.llm.checkpointing else [setting("llm.checkpointing", True)]
    groups = [pair.text for pair in config.grid().pairs()]
    found += [
        setting("search.pairs_per_visit", size) for size in halves(len(visit_shapes(config.grid(), search, groups)), 1)
    ]
    found += [setting("tokens.batch_size", size) for size in halves(tokens.batch_size, 1)]
    found += [] if tokens.storage_dtype in ("int8", "fp8") else [setting("tokens.storage_dtype", "int8")]
    found.append(setting("tokens.disk_gb", 0.0))
    if processes > 1 and search.parallel == "data" and processes <= len(config.llm_cards()):
        found.append(setting("search.parallel", "pairs"))
    if config.llm.quantisation == "none" and config.llm.precision() == "fp32":
        found.append(setting("llm.quantisation", "bf16"))
    if config.llm.quantisation != "nf4":
        found.append(setting("llm.quantisation", "nf4"))
    if "hyma" in search.methods and len(search.methods) > 1:
        found.append(setting("search.methods", ["hyma"]))
    return found + [setting("search.batch", size) for size in halves(search.batch, processes) if size % processes == 0]


def _own_llms(config: "MLLMConfig", processes: int) -> list[int]:
    """The LLMs of the process that holds most; HymaError where there are more processes than they can be shared by."""
    wanted, search = loads(config), config.search
    shares = []
    for process in range(processes):
        placement = place(search.parallel, wanted, processes, process, search.groups)
        shares.append([number for number in range(len(wanted)) if placement.here(number)])
    return max(shares, key=lambda share: sum(wanted[number].bytes for number in share))


def _token_needs(config: "MLLMConfig", counts: "Counts", compute: Place) -> Iterator[Need]:
    """Stored tokens, towers that run for every batch, and the pass that makes tokens."""
    towers = config.tower_cards()
    absent = [card for card in towers if not tower_on_disk(card)]
    if absent:
        yield Need(
            f"{len(absent)} towers to be fetched", "cache", sum(2.0 * FLOAT * card.parameters for card in absent)
        )
    form = config.tokens.storage_dtype
    for card, stored in tokens_stored(config, counts.pictures):
        size = counts.pictures * row_bytes(form, card.tokens or 0, card.width)
        if stored and size:
            yield Need(f"tokens of {card.id} in {form}, {counts.pictures:,} pictures", "cache", float(size))
        elif not stored:
            yield Need(f"weights of {card.id}", compute, float(FLOAT * card.parameters))
            yield Need(f"last tokens of {card.id} (tokens.memory_mb)", "memory", config.tokens.memory_mb * 1e6)
    largest = max(towers, key=lambda card: card.parameters)
    yield Need(f"weights of {largest.id}", compute, float(FLOAT * largest.parameters), "embedding")
    batch = config.tokens.batch_size
    passes = max(embedding_pass(batch, card.resolution or 224) for card in towers)
    yield Need(f"a pass of {batch} pictures through it", compute, passes, "embedding")


def _visit_needs(config: "MLLMConfig", counts: "Counts", processes: int, compute: Place) -> Iterator[Need]:
    """What the largest LLM keeps of a visit, and of answering."""
    grid, search = config.grid(), config.search
    groups = [pair.text for pair in grid.pairs()]
    shapes = visit_shapes(grid, search, groups)
    batch = search.batch if search.parallel == "pairs" else search.batch // processes
    spec = max(map(search.spec, search.connectors), key=lambda spec: spec.parameters(*shapes[0]))
    longest = max(card.tokens or 0 for card in config.tower_cards())
    length, rows = longest + counts.text, len(shapes) * batch
    element = ELEMENT[config.llm.precision()]
    attention = FLOAT if compute == "memory" else element
    llms = [llm_shape(card) for card in config.llm_cards()]
    kept = [causal_visit(llm, rows, length, BEFORE, element, attention, config.llm.checkpointing) for llm in llms]
    words = f"{rows} rows of {length} tokens in an LLM"
    yield Need(f"activations of a visit, {words}", compute, max(kept), "training")
    yield predicted_need(spec, shapes, search, compute)
    width = max(llm.width for llm in llms)
    projected = projector_visit(spec, shapes, batch * longest, width)
    loss = causal_loss(rows * ANSWER, width, config.objective.vocabulary_chunk)
    yield Need("activations of projectors and loss", compute, projected + loss, "training")
    answers = len(grid.vision_ids) * config.answer_batch
    said = max(answering(llm, answers, length, BEFORE, config.llm.longest_answer, element) for llm in llms)
    yield Need(f"{answers} rows that are answered at once", compute, said, "scoring")

"""Where the LLMs of an MLLM search go: what each asks for, which process holds it, and whether that fits."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil
import torch
from accelerate import Accelerator

from hyma_mllm.errors import HymaError
from hyma_mllm.planning.training import llm_weights
from hyma_mllm.search import flops
from hyma_mllm.search.placement import Load, Placement, held_bytes, place, plan_lines
from hyma_mllm.zoo.llm_shape import LLMShape, llm_shape

if TYPE_CHECKING:
    from hyma_mllm.mllm import MLLMConfig

TYPICAL_TEXT = 30
"""Tokens of a short question behind the picture: what the bill reckons with before any question was read."""

LAYER_BYTES = {"int8": 1.02, "nf4": 0.53, "bf16": 2.0}
"""Of a quantised weight, its scale included; otherwise the dtype's."""

ELEMENT = {"bf16": 2, "fp32": 4}


def loaded_bytes(config: "MLLMConfig", shape: LLMShape) -> float:
    """Bytes of an LLM's weights as this run loads them."""
    plain = float(ELEMENT[config.llm.precision()])
    if config.llm.quantisation == "none":
        return llm_weights(shape, plain, plain)
    words = 2.0 if config.llm.quantisation == "bf16" else plain
    return llm_weights(shape, LAYER_BYTES[config.llm.quantisation], words)


def pair_flops(config: "MLLMConfig", connector: str) -> list[float]:
    """FLOPs of each pair in one step with the whole batch, [pairs], without the hypernetwork's own; from the cards."""
    towers, llms, grid, batch = config.tower_cards(), config.llm_cards(), config.grid(), config.search.batch
    found = []
    for pair in grid.pairs():
        seen = batch * (towers[pair.vision].tokens or 0)
        through = 4.0 * llms[pair.text].parameters * (seen + batch * TYPICAL_TEXT)
        found.append(through + flops.connector_step_flops(config.search.spec(connector), grid.shape(pair.index), seen))
    return found


def loads(config: "MLLMConfig") -> list[Load]:
    """What each LLM asks of the processes that hold it, with the first family of connectors; from the cards."""
    per_pair = pair_flops(config, config.search.connectors[0])
    per_llm = [0.0] * len(config.llm_cards())
    for pair in config.grid().pairs():
        per_llm[pair.text] += per_pair[pair.index]
    return [
        Load(card.id, loaded_bytes(config, llm_shape(card)), work)
        for card, work in zip(config.llm_cards(), per_llm, strict=True)
    ]


def placed(config: "MLLMConfig", accelerator: Accelerator) -> Placement:
    """Which process holds which LLMs.

    Raises:
        HymaError: LLMs and processes do not divide as `search.parallel` and `search.groups` want, or the processes of
            a group cannot share a batch evenly.
    """
    search = config.search
    found = place(search.parallel, loads(config), accelerator.num_processes, accelerator.process_index, search.groups)
    if search.batch % found.shares:
        raise HymaError(
            f"search.batch is {search.batch}, which the {found.shares} processes of a group cannot share evenly; make "
            "it a multiple."
        )
    return found


def print_placement(config: "MLLMConfig", accelerator: Accelerator, say: Callable[[str], None]) -> None:
    """Say which process holds which LLMs, and whether there is memory for them.

    Raises:
        HymaError: there is not, or they cannot be divided.
    """
    wanted, placement = loads(config), placed(config, accelerator)
    if placement.processes > 1:
        for line in plan_lines(placement, wanted):
            say(line)
    if accelerator.device.type == "cuda":
        needed, where = held_bytes(placement, wanted, 1), "of a GPU"
        free = torch.cuda.mem_get_info(accelerator.device)[0]
    else:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", str(placement.processes)))
        needed, free, where = held_bytes(placement, wanted, local), psutil.virtual_memory().available, "of memory"
    say(f"LLMs take {needed / 1e9:.1f} GB {where}, {free / 1e9:.1f} GB are free")
    if needed > free:
        spread = "" if placement.owners else ", search.parallel to pairs with several processes"
        raise HymaError(
            f"The LLMs need {needed / 1e9:.1f} GB but {free / 1e9:.1f} GB {where} are free; set llm.quantisation to "
            f"nf4, llm.dtype to bf16{spread}, or list fewer LLMs."
        )

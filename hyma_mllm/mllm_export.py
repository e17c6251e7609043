"""From a run directory to a stitched MLLM: one pair's projector with everything that was kept outside it folded in."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.data.prompts import Prompter
from hyma_mllm.errors import HymaError
from hyma_mllm.export import check_revision, chosen_unit, data_credits, grid_of
from hyma_mllm.pairs import PairGrid
from hyma_mllm.paths import atomic_path
from hyma_mllm.search.mllm_task import MLLMTask
from hyma_mllm.search.ranking import Ranking, SearchResult
from hyma_mllm.search.stored import StoredConnectors
from hyma_mllm.zoo.llm import LanguageModel, llm_card, load_llm
from hyma_mllm.zoo.vision_tokens import load_tower, tower_card

if TYPE_CHECKING:  # as in export.py
    from hyma_mllm.stitched.mllm import StitchedMLLM

FOLDING = "folding.safetensors"
"""What stands between a stored projector and raw tokens: mean and spread of each tower, output scale of each pair."""


def save_folding(run: Path, task: MLLMTask, specs: Sequence[ConnectorSpec]) -> None:
    """Keep what `stitch` folds into a projector."""
    tensors = {f"scale.{spec.name}": torch.tensor(task.scales(spec), dtype=torch.float64) for spec in specs}
    for number, tower in enumerate(task.towers):
        tensors |= {f"{number}.mean": tower.mean, f"{number}.spread": tower.spread}
    with atomic_path(run / FOLDING) as temporary:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, temporary)


def stitch(
    run: Path,
    pair: str | None = None,
    connector: str | None = None,
    method: str = "hyma",
    models: Sequence[LanguageModel] = (),
) -> "StitchedMLLM":
    """The stitched MLLM of one pair of a finished run.

    Args:
        run: the run directory.
        pair: `tower id,LLM id`; None takes the best on validation.
        connector: family; None takes the family in which the pair does best on validation.
        method: whose projectors: `hyma`, `grid` or another whose connectors the run keeps.
        models: LLMs that are loaded already; others, and those of a quantised run, are loaded in the run's precision.

    Raises:
        HymaError: no such run, pair, family or method.
    """
    result = SearchResult.load(run / "ranking.json")
    if result.case != "mllm":
        raise HymaError(f"{run} is a run of recipes/vlm.py and holds no MLLM; take the pair with `hyma export`.")
    grid = grid_of(result)
    ranking, index = chosen_unit(run, result, grid, pair, connector, method, "projectors")
    return _assemble(run, result, grid, ranking, index, models)


def _assemble(
    run: Path, result: SearchResult, grid: PairGrid, ranking: Ranking, index: int, models: Sequence[LanguageModel]
) -> "StitchedMLLM":
    from hyma_mllm.stitched.mllm import StitchedMLLM
    from hyma_mllm.stitched.mllm_config import MLLMConfig

    pair = grid.pair(index)
    vision, llm = tower_card(grid.vision_ids[pair.vision]), llm_card(grid.text_ids[pair.text])
    check_revision(vision, result.vision[pair.vision], run)
    check_revision(llm, result.text[pair.text], run)
    search, options = result.config["search"], result.config["llm"]
    spec = ConnectorSpec.named(ranking.connector, hidden=search["hidden"] or llm.width, activation=search["activation"])
    whole = models if options["quantisation"] == "none" else ()  # a quantised LLM cannot be written down again
    model = next((loaded for loaded in whole if loaded.card.id == grid.text_ids[pair.text]), None)
    if model is None:
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options["dtype"]]
        model = load_llm(llm, dtype=dtype, accepted_terms=options["accept_terms"])
    folding = load_file(run / FOLDING)
    state = StoredConnectors(run, f"{ranking.method}-{ranking.connector}-{ranking.seed}", grid).state(index)
    projector = connectors.folded(
        state,
        folding[f"{pair.vision}.mean"],
        folding[f"{pair.vision}.spread"],
        float(folding[f"scale.{ranking.connector}"][index]),
    )
    scores = {task: values[index] for task, values in ranking.scores.items()}
    blind = {task: ranking.details[f"blind {task}"][index] for task in result.tasks}
    return StitchedMLLM.from_parts(
        load_tower(vision),
        model,
        Prompter(model.tokenizer, llm.id, options["max_length"], vision.tokens or 0),
        projector,
        MLLMConfig(vision, llm, spec, scores=scores, blind=blind, data=data_credits(result)),
    )

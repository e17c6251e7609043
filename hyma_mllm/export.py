"""From a run directory to a stitched model: one pair's connector, its standardisers, its scores."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.data.standardise import Standardiser
from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.foreign import reason
from hyma_mllm.pairs import PairGrid
from hyma_mllm.paths import atomic_path
from hyma_mllm.search.imported import FILE_REVISION
from hyma_mllm.search.ranking import Ranking, SearchResult
from hyma_mllm.stitched.config import DataCredit, StitchedConfig
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.text import load_text_encoder, text_card
from hyma_mllm.zoo.vision import image_card, load_image_encoder

logger = logging.getLogger("hyma_mllm")

if TYPE_CHECKING:  # it imports sentence-transformers, which takes seconds that --help and --dry-run need not wait for
    from hyma_mllm.stitched.vlm import StitchedVLM

STANDARDISERS = "standardisers.safetensors"


def save_standardisers(run: Path, image: Sequence[Standardiser], text: Sequence[Standardiser]) -> None:
    """Keep every encoder's standardiser in the run directory."""
    tensors = {}
    for side, standardisers in (("image", image), ("text", text)):
        for number, standardiser in enumerate(standardisers):
            for name, value in standardiser.state_dict().items():
                # A control shares its encoder's standardiser, and a file holds no tensor twice.
                tensors[f"{side}.{number}.{name}"] = value.cpu().contiguous().clone()
    with atomic_path(run / STANDARDISERS) as temporary:
        save_file(tensors, temporary)


def best_unit(result: SearchResult, method: str = "hyma") -> tuple[Ranking, int]:
    """The ranking and the pair to hand over, chosen on the validation split; of the seed whose connectors are kept.

    Raises:
        HymaError: the run has no ranking by this method, or the method makes no connectors.
    """
    mine = [ranking for ranking in result.rankings if ranking.method == method]
    if not mine:
        raise HymaError(f"The run has no ranking by {method}; {near_names(method, result.methods)}")
    first = [ranking for ranking in mine if ranking.seed == mine[0].seed]
    scored = [
        (value, ranking, pair) for ranking in first for pair, value in enumerate(ranking.hand_over_by(result.tasks[0]))
    ]
    _, ranking, pair = max(scored, key=lambda entry: entry[0])
    return ranking, pair


def stitch(run: Path, pair: str | None = None, connector: str | None = None, method: str = "hyma") -> "StitchedVLM":
    """The stitched model of one pair of a finished run.

    Args:
        run: the run directory.
        pair: `image id,text id`; None takes the best on validation.
        connector: family; None takes the family in which the pair does best on validation.
        method: whose connectors: `hyma`, `grid` or another whose connectors the run keeps.

    Raises:
        HymaError: no such run, pair, family or method.
    """
    result = SearchResult.load(run / "ranking.json")
    grid = grid_of(result)
    ranking, index = chosen_unit(run, result, grid, pair, connector, method, "connectors")
    return _assemble(run, result, grid, ranking, index)


def chosen_unit(
    run: Path, result: SearchResult, grid: PairGrid, pair: str | None, connector: str | None, method: str, what: str
) -> tuple[Ranking, int]:
    """The ranking and the pair that `stitch` is asked for, chosen on validation where it names none.

    Args:
        run: the run directory, for messages.
        result: of the run.
        grid: of the result.
        pair: as of `stitch`.
        connector: likewise.
        method: likewise.
        what: how a message calls the connectors.

    Raises:
        HymaError: no such pair, family or method.
    """
    ranking, index = best_unit(result, method)
    if pair is not None:
        names = [grid.name(number) for number in range(len(grid))]
        if pair not in names:
            raise HymaError(f"The run {run} has no pair {pair}; {near_names(pair, names)}")
        index = names.index(pair)
    candidates = [r for r in result.rankings if r.method == method and r.seed == ranking.seed]
    if connector is not None:
        candidates = [r for r in candidates if r.connector == connector]
        if not candidates:
            raise HymaError(f"The run {run} has no {connector} {what}; {near_names(connector, result.connectors)}")
    return max(candidates, key=lambda r: r.hand_over_by(result.tasks[0])[index]), index


def grid_of(result: SearchResult) -> PairGrid:
    """The grid that a result scores."""
    return PairGrid(
        tuple(entry["id"] for entry in result.vision),
        tuple(entry["width"] for entry in result.vision),
        tuple(entry["id"] for entry in result.text),
        tuple(entry["width"] for entry in result.text),
        "vision_to_text" if result.case == "mllm" else "text_to_vision",
    )


def _assemble(run: Path, result: SearchResult, grid: PairGrid, ranking: Ranking, index: int) -> "StitchedVLM":
    from hyma_mllm.stitched.vlm import StitchedVLM

    pair = grid.pair(index)
    vision, text_model = image_card(grid.vision_ids[pair.vision]), text_card(grid.text_ids[pair.text])
    check_revision(vision, result.vision[pair.vision], run)
    check_revision(text_model, result.text[pair.text], run)
    search = result.config["search"]
    spec = ConnectorSpec.named(ranking.connector, hidden=search["hidden"], activation=search["activation"])
    path = run / "connectors" / f"{ranking.method}-{ranking.connector}-{ranking.seed}.safetensors"
    if not path.exists():
        raise HymaError(f"{path} is missing; run the search again to make the connectors of {ranking.method}.")
    module = connectors.module(spec, grid.shape(index))
    try:
        with safe_open(path, framework="pt") as stored:
            state = {name: stored.get_tensor(f"{index}.{name}") for name in module.state_dict()}
        standardisers = load_file(run / STANDARDISERS)
        text = _standardiser(standardisers, f"text.{pair.text}.", grid.text_widths[pair.text])
        image = _standardiser(standardisers, f"image.{pair.vision}.", grid.vision_widths[pair.vision])
        state["0.weight"], state["0.bias"] = text.folded(state["0.weight"], state["0.bias"])
        module.load_state_dict(state)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise HymaError(
            f"{path} or {run / STANDARDISERS} is damaged ({reason(error)}); run the search again."
        ) from error
    scores = {task: values[index] for task, values in ranking.scores.items()}
    scores |= {name: values[index] for name, values in ranking.details.items()}
    config = StitchedConfig(
        vision=vision,
        text=text_model,
        connector=spec,
        scores=scores,
        data=data_credits(result),
    )
    return StitchedVLM.from_parts(
        load_image_encoder(config.vision_id),
        load_text_encoder(config.text_id),
        module,
        image,
        config,
    )


def data_credits(result: SearchResult) -> tuple[DataCredit, ...]:
    """Whom the run's pictures and words are owed to; a source whose credit is just a sentence keeps its name."""
    known = {entry["name"]: entry for entry in result.data.get("attribution", []) if isinstance(entry, dict)}
    return tuple(
        DataCredit(name, known.get(name, {}).get("licence", ""), fingerprint, known.get(name, {}).get("origin", ""))
        for name, fingerprint in result.data.get("fingerprints", {}).items()
    )


def check_revision(card: ModelCard, searched: Mapping[str, Any], run: Path) -> None:
    """Connectors fit the weights that they were trained on, and no others of the same name.

    Imported features name the file that they were read from, not the weights that made it; only the width tells.
    """
    if searched["revision"].startswith(FILE_REVISION):
        if card.width != searched["width"]:
            raise HymaError(
                f"{run} was searched with imported features of {searched['id']} of width {searched['width']}, but "
                f"{card.id} gives {card.width}; import the features under the id of the model that made them."
            )
        logger.warning("%s: features were imported, so its weights are taken on trust", card.id)
    elif card.revision != searched["revision"]:
        raise HymaError(
            f"{run} was searched with {searched['id']} at revision {searched['revision']}, but {card.id} is now at "
            f"revision {card.revision}; bring the old weights back or run the search again in a new directory."
        )


def _standardiser(tensors: dict[str, torch.Tensor], prefix: str, width: int) -> Standardiser:
    standardiser = Standardiser(width)
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    standardiser.load_state_dict(state)
    return standardiser

"""The VLM search's configuration and its bill: what a run will do, checked and priced before a byte is embedded."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator

from hyma_mllm import vlm_plan
from hyma_mllm.data.collection import DataConfig
from hyma_mllm.data.corpora import CORPORA
from hyma_mllm.data.embedding import EmbeddingConfig
from hyma_mllm.data.sources import open_source
from hyma_mllm.data.standardise import StandardiseConfig
from hyma_mllm.data.store_directory import count_rows, store_cards
from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.hypernetwork.presets import HypernetworkConfig, parts
from hyma_mllm.hypernetwork.sizes import size_line
from hyma_mllm.objectives.contrastive import ContrastiveConfig, ContrastiveObjective
from hyma_mllm.pairs import PairGrid
from hyma_mllm.search import flops
from hyma_mllm.search.methods import SearchConfig
from hyma_mllm.search.samplers import PairSampler
from hyma_mllm.search.starts import start_flops
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.text import TEXT_CARDS, text_card, text_on_disk
from hyma_mllm.zoo.vision import DEFAULT_IMAGE_IDS, image_card, image_on_disk

logger = logging.getLogger("hyma_mllm")

CORPUS = "corpus:"


@dataclass
class VLMConfig:
    """A search over pairs of image encoders and text encoders.

    Attributes:
        run: run directory; a rerun of the same command goes on there.
        image_encoders: ids of image encoders: packaged, `timm:NAME`, `hf:ID or directory`; empty takes the default zoo.
        text_encoders: ids of text encoders: packaged, `st:ID or directory`, `hf:ID or directory`; empty takes the
            default zoo.
        processes: processes that the launcher must have started; 0 accepts any number.
        threads: CPU threads of a process; 0 shares the machine's cores evenly between its processes.
        mixed_precision: of training, `no`, `bf16` or `fp16`; null takes the launcher's.
        tracker: also log to `tensorboard`, `wandb` or `trackio`; null for none.
        data: pictures, words, splits.
        embedding: how features are computed and stored.
        standardise: what features go through before they meet a connector.
        hypernetwork: what predicts the connectors.
        objective: the contrastive loss.
        search: methods, budgets, optimisers.
    """

    run: Path = Path("runs/vlm")
    image_encoders: list[str] = field(default_factory=list)
    text_encoders: list[str] = field(default_factory=list)
    processes: int = 0
    threads: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    data: DataConfig = field(default_factory=DataConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    standardise: StandardiseConfig = field(default_factory=StandardiseConfig)
    hypernetwork: HypernetworkConfig = field(default_factory=HypernetworkConfig)
    objective: ContrastiveConfig = field(default_factory=lambda: ContrastiveConfig(scale=30.0))
    search: SearchConfig = field(default_factory=SearchConfig)

    def resolved(self) -> dict[str, Any]:
        """Plain values for config.yaml and ranking.json: everything that decides the result."""
        plain = asdict(self)
        plain.pop("run")
        plain["image_encoders"] = [card.id for card in self.image_cards()]
        plain["text_encoders"] = [card.id for card in self.text_cards()]
        plain["data"]["sources"] = self.data.specs()
        plain["data"]["stores"] = None if self.data.stores is None else str(self.data.stores)
        return plain

    def image_cards(self) -> list[ModelCard]:
        """Cards of the image encoders; HymaError with near names for an unknown one."""
        if self.data.stores is not None:
            return store_cards(self.data.stores, "image", self.image_encoders)
        return [image_card(name) for name in self.image_encoders or DEFAULT_IMAGE_IDS]

    def text_cards(self) -> list[ModelCard]:
        """Cards of the text encoders; HymaError with near names for an unknown one."""
        if self.data.stores is not None:
            return store_cards(self.data.stores, "text", self.text_encoders)
        default = [name for name, card in TEXT_CARDS.items() if not card.opt_in]
        return [text_card(name) for name in self.text_encoders or default]

    def grid(self) -> PairGrid:
        """The pairs."""
        image, text = self.image_cards(), self.text_cards()
        return PairGrid(
            tuple(card.id for card in image),
            tuple(card.width for card in image),
            tuple(card.id for card in text),
            tuple(card.width for card in text),
        )


def check(config: VLMConfig) -> int:
    """Everything that can be wrong before a byte is fetched or embedded.

    Returns:
        The number of pictures, as far as it is known without reading them; 0 where it is not.

    Raises:
        HymaError: the first thing that is wrong.
    """
    grid = config.grid()
    PairSampler(tuple(range(len(grid))), config.search.pairs_per_visit, config.search.sampler, 0)
    ContrastiveObjective(config.objective)
    for connector in config.search.connectors:
        config.search.check_contrastive(parts(config.hypernetwork, config.search.spec(connector).depth).base)
    if config.search.parallel != "data":
        raise HymaError(
            "search.parallel is pairs, which spreads LLMs over processes (recipes/mllm.py), and here are none; set it "
            "to data."
        )
    if config.objective.learn_scale and set(config.search.methods) != {"hyma"}:
        raise HymaError(
            "objective.learn_scale shares one scale between all pairs, which would tie the rivals' independent pairs "
            "together; set search.methods to [hyma], or objective.learn_scale to false."
        )
    rows, known = 0, True
    if config.data.stores is not None:
        rows = count_rows(config.data.stores)
        rows = min(rows, config.data.limit or rows)
    for spec in config.data.specs():
        if spec.startswith(CORPUS):
            name = spec.removeprefix(CORPUS)
            if name not in CORPORA:
                raise HymaError(f"There is no built-in corpus {name}; {near_names(name, CORPORA)}")
            rows += min(CORPORA[name].pairs, config.data.limit or CORPORA[name].pairs)
        else:
            open_source(spec, config.data.image_column, config.data.caption_column)
            known = False
    training = int(rows * (1 - config.data.validation - config.data.test))
    if known and config.search.batch > training:
        raise HymaError(
            f"search.batch is {config.search.batch} but about {training} of {rows} pictures are left for training; "
            "set search.batch below that."
        )
    return rows if known else 0


def print_bill(config: VLMConfig, rows: int, accelerator: Accelerator, say: Callable[[str], None]) -> None:
    """Say what the run reads, stores, trains and computes.

    Args:
        config: the run.
        rows: pictures, 0 where their number is not known before reading.
        accelerator: processes and precision.
        say: prints a line.

    Raises:
        HymaError: the run does not fit disk, memory or GPU.
    """
    image, text, grid, search = config.image_cards(), config.text_cards(), config.grid(), config.search
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    say(f"{accelerator.num_processes} process(es) on {device}, mixed precision {accelerator.mixed_precision}")
    if config.data.stores is not None:
        for card in [*image, *text]:
            say(f"  {card.kind:5} {card.id}: width {card.width}, {card.source}")
        say(f"{len(image)} image x {len(text)} text encoders = {len(grid)} pairs; {rows} imported rows")
    else:
        _say_encoders(config, image, text, rows, say)
    vlm_plan.print_plan(config, rows, accelerator)
    for connector in search.connectors:
        _price(config, grid, connector, rows, say)


def _say_encoders(
    config: VLMConfig, image: list[ModelCard], text: list[ModelCard], rows: int, say: Callable[[str], None]
) -> None:
    for card, present in [(c, image_on_disk(c)) for c in image] + [(c, text_on_disk(c)) for c in text]:
        where = "on disk" if present else f"to be fetched from {card.source}"
        say(f"  {card.kind:5} {card.id}: width {card.width}, {card.parameters / 1e6:.1f} M parameters, {where}")
    pairs, sources = len(image) * len(text), ", ".join(config.data.specs())
    say(f"{len(image)} image x {len(text)} text encoders = {pairs} pairs; sources: {sources}")
    if rows:
        say(f"about {rows} pictures")


def _price(config: VLMConfig, grid: PairGrid, connector: str, rows: int, say: Callable[[str], None]) -> None:
    search, spec = config.search, config.search.spec(connector)
    visits = [
        flops.connector_step_flops(spec, grid.shape(k), search.batch)
        + flops.similarity_step_flops(search.batch, grid.shape(k)[1], tiled=config.objective.tile > 0)
        for k in range(len(grid))
    ]
    loss = sum(visits)
    own = flops.hypernetwork_step_flops(grid, spec, config.hypernetwork, range(len(grid)))
    say(f"{connector}: {size_line(grid, spec, config.hypernetwork, 'connectors')}")
    if search.budget.given:
        step = (loss + own) / 1e9
        say(
            f"  every method: batch {search.batch}, {search.budget} a seed; a fair step of hyma is {step:.2f} GFLOP, "
            f"one of the grid {loss / 1e9:.2f}; seeds {search.seeds}"
        )
        return
    sampler = PairSampler(tuple(range(len(grid))), search.pairs_per_visit, search.sampler, 0)
    share = 1.0 if search.sampler == "fair" else sampler.size / len(grid)
    bill = {"steps": search.steps * share * (loss + own)}
    if parts(config.hypernetwork, spec.depth).base == "closed_form" and rows:
        trained = round(rows * (1 - config.data.validation - config.data.test))
        bill["closed forms"] = start_flops(grid, spec, search.closed_form.kind, vlm_plan.CAPTIONS * trained, trained)
    if search.polish.top:
        bill["polishing"] = search.polish.price(visits)
    hyma, grid_cost = sum(bill.values()), search.grid_steps * loss
    seen = search.steps * share * search.batch
    shares = ", ".join(f"{name} {cost / 1e12:.2f}" for name, cost in bill.items())
    say(
        f"  hyma: batch {search.batch}, {search.steps} steps, {seen:.0f} samples per pair, about {hyma / 1e12:.2f} "
        f"TFLOP a seed ({shares}); grid: batch {search.batch}, {search.grid_steps} steps, "
        f"{search.grid_steps * search.batch} samples per pair, {grid_cost / 1e12:.2f} TFLOP a seed "
        f"({grid_cost / hyma:.1f} x); seeds {search.seeds}"
    )

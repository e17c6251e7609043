"""The MLLM search's configuration and its bill: what a run will do, checked and priced before a byte is embedded."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator

from hyma_mllm import mllm_plan
from hyma_mllm.data.prompts import Prompter
from hyma_mllm.data.question_sets import QuestionConfig
from hyma_mllm.data.questions import BUILT_IN, QuestionSource, open_questions
from hyma_mllm.data.rows import Row
from hyma_mllm.data.token_codes import row_bytes
from hyma_mllm.data.token_library import TokenConfig
from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.hypernetwork.presets import HypernetworkConfig, parts
from hyma_mllm.hypernetwork.sizes import size_line
from hyma_mllm.mllm_placement import TYPICAL_TEXT, loaded_bytes, pair_flops, print_placement
from hyma_mllm.objectives.causal_lm import CausalConfig
from hyma_mllm.pairs import PairGrid
from hyma_mllm.search import flops
from hyma_mllm.search.closed_form import ClosedFormConfig
from hyma_mllm.search.methods import SearchConfig
from hyma_mllm.search.samplers import PairSampler
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.llm import (
    DEFAULT_LLM_IDS,
    LLM_CARDS,
    LanguageModel,
    Quantisation,
    check_terms,
    llm_card,
    llm_on_disk,
    load_llm,
    load_tokenizer,
)
from hyma_mllm.zoo.llm_shape import llm_shape
from hyma_mllm.zoo.vision_tokens import DEFAULT_TOWER_IDS, tower_card, tower_on_disk

logger = logging.getLogger("hyma_mllm")

WHEN_FULL = (
    "checkpoints and finished trainings are kept: set llm.checkpointing to true or lower answer_batch and run the same "
    "command again to go on, or lower search.batch or search.pairs_per_visit in a new --run"
)
"""What to do when memory is full."""

SHORTCUTS = {"accept-terms": "llm.accept_terms"}
"""Options of the command line with a longer name in the configuration."""

LETTERS = 4
"""Of a token of usual text."""


class Counts(NamedTuple):
    """What is known of the questions before the run: no more than limits and the words of files.

    Attributes:
        training: questions to train on, 0 where their number is not known.
        questions: of training, validation and tests together, 0 where not known.
        pictures: distinct ones at most, 0 where not known.
        text: tokens behind a picture, on average.
    """

    training: int
    questions: int
    pictures: int
    text: int


@dataclass
class LLMConfig:
    """How the LLMs are loaded.

    Attributes:
        dtype: precision of their weights and of the pass through them, `bf16` or `fp32`; `auto` takes bf16 on a GPU and
            on CPUs that multiply it, fp32 on others, which are three times slower in bf16.
        quantisation: `none`; `int8` or `nf4` (bitsandbytes); `bf16` keeps weights in 16 bits and widens each to `dtype`
            where it is used: half the memory of fp32 and a tenth slower.
        checkpointing: recompute the layers in the backward pass: less memory, a third more time.
        accept_terms: terms of use that you accept, `gemma` for one; packaged LLMs under them join the default zoo.
        max_length: tokens of a conversation at most, picture included; longer rows lose the end of their question.
        longest_answer: tokens after which a generated answer is cut.
    """

    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    quantisation: Quantisation = "none"
    checkpointing: bool = False
    accept_terms: list[str] = field(default_factory=list)
    max_length: int = 512
    longest_answer: int = 8

    def precision(self) -> Literal["bf16", "fp32"]:
        """`dtype`, decided for this machine."""
        if self.dtype != "auto":
            return self.dtype
        # torch 2.11 cannot tell; fp32 is never wrong.
        capable: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = torch.cuda.is_available() or capable.get("avx512_bf16") or capable.get("amx_bf16")
        return "bf16" if fast else "fp32"

    def torch_dtype(self) -> torch.dtype:
        """`precision` for torch."""
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.precision()]

    def load(self, card: ModelCard, device: torch.device | str = "cpu") -> LanguageModel:
        """Open an LLM as configured."""
        return load_llm(card, device, self.torch_dtype(), self.quantisation, self.accept_terms, self.checkpointing)


@dataclass
class MLLMConfig:
    """A search over pairs of vision towers and LLMs.

    Attributes:
        run: run directory; a rerun of the same command goes on there.
        towers: vision towers, `NAME[@block][:112px][:pool2]`; names as of image encoders; empty takes the default zoo.
        llms: LLMs: packaged, `hf:ID or directory`, `gguf:FILE`; empty takes the default zoo.
        processes: processes that the launcher must have started; 0 accepts any number.
        threads: CPU threads of a process; 0 shares the machine's cores evenly between its processes.
        mixed_precision: of the connectors while training, `no`, `bf16` or `fp16`; null takes the launcher's.
        tracker: also log to `tensorboard`, `wandb` or `trackio`; null for none.
        llm: how the LLMs are loaded.
        data: questions and answers.
        tokens: how vision tokens are computed and stored.
        hypernetwork: what predicts the projectors.
        objective: the causal loss.
        search: methods, budgets, optimisers.
        answer_batch: questions that each pair answers at once while scoring.
    """

    run: Path = Path("runs/mllm")
    towers: list[str] = field(default_factory=list)
    llms: list[str] = field(default_factory=list)
    processes: int = 0
    threads: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    llm: LLMConfig = field(default_factory=LLMConfig)
    data: QuestionConfig = field(default_factory=QuestionConfig)
    tokens: TokenConfig = field(default_factory=TokenConfig)
    hypernetwork: HypernetworkConfig = field(default_factory=HypernetworkConfig)
    objective: CausalConfig = field(default_factory=CausalConfig)
    search: SearchConfig = field(
        default_factory=lambda: SearchConfig(
            methods=["hyma"],
            connectors=["mlp1"],
            hidden=0,
            activation="gelu",
            closed_form=ClosedFormConfig(kind="words", strength=1.0),
            blend=[1.0],  # no untrained projector was ever the better one
        )
    )
    answer_batch: int = 32

    def resolved(self) -> dict[str, Any]:
        """Plain values for config.yaml and ranking.json: everything that decides the result.

        What only decides how much memory is needed may change between a run and its rerun, and is left out.
        """
        plain = asdict(self)
        plain.pop("run")
        plain.pop("answer_batch")
        plain["llm"].pop("checkpointing")
        plain["towers"] = [card.id for card in self.tower_cards()]
        plain["llms"] = [card.id for card in self.llm_cards()]
        plain["llm"]["dtype"] = self.llm.precision()
        plain["data"] |= {"train": self.data.train_limits(), "tests": self.data.test_limits()}
        return plain

    def tower_cards(self) -> list[ModelCard]:
        """Cards of the vision towers; HymaError with near names for an unknown one."""
        return [tower_card(name) for name in self.towers or DEFAULT_TOWER_IDS]

    def llm_cards(self) -> list[ModelCard]:
        """Cards of the LLMs; HymaError for an unknown one, or for terms that are not accepted."""
        joined = [card.id for card in LLM_CARDS.values() if card.terms in self.llm.accept_terms]
        cards = [llm_card(name) for name in self.llms or [*DEFAULT_LLM_IDS, *joined]]
        for card in cards:
            check_terms(card, self.llm.accept_terms)
        return cards

    def grid(self) -> PairGrid:
        """The pairs."""
        towers, llms = self.tower_cards(), self.llm_cards()
        return PairGrid(
            tuple(card.id for card in towers),
            tuple(card.width for card in towers),
            tuple(card.id for card in llms),
            tuple(card.width for card in llms),
            "vision_to_text",
        )


def check(config: MLLMConfig) -> Counts:
    """Everything that can be wrong before a byte is fetched or embedded.

    Returns:
        What is known of the questions without fetching them.

    Raises:
        HymaError: the first thing that is wrong.
    """
    grid = config.grid()
    PairSampler(tuple(range(len(grid))), config.search.pairs_per_visit, config.search.sampler, 0)
    for connector in config.search.connectors:
        config.search.check_causal(parts(config.hypernetwork, config.search.spec(connector).depth).base)
    for name, value in (("answer_batch", config.answer_batch), ("llm.longest_answer", config.llm.longest_answer)):
        if value < 1:
            raise HymaError(f"{name} is {value}; it takes at least 1.")
    _check_templates(config)
    counts = _counted(config.data)
    if counts.training and config.search.batch > counts.training:
        raise HymaError(
            f"search.batch is {config.search.batch} but there are {counts.training} training questions; "
            "set search.batch below that."
        )
    return counts


def _check_templates(config: MLLMConfig) -> None:
    """Chat templates of the LLMs that are here, each on a small conversation; others are checked once fetched."""
    longest = max(card.tokens or 0 for card in config.tower_cards())
    for card in config.llm_cards():
        if not card.id.startswith("gguf:") and llm_on_disk(card):  # a GGUF's tokenizer comes with its weights
            Prompter(load_tokenizer(card), card.id, config.llm.max_length, longest)


def _counted(data: QuestionConfig) -> Counts:
    """The questions, as far as limits tell; user's files are opened, which checks and counts every row's words."""
    found = dict.fromkeys(("train", "test"), 0)
    unknown, pictures, lengths = set[str](), 0, []
    sources: dict[str, QuestionSource] = {}
    for part, limits in (("train", data.train_limits()), ("test", data.test_limits())):
        for spec, limit in limits.items():
            if not spec.startswith("questions:"):
                sources[spec] = sources.get(spec) or open_questions(spec, data.shares())
                rows = sources[spec].parts[part]  # type: ignore[index]
                taken = min(limit, len(rows)) if limit else len(rows)
                found[part] += taken
                pictures += min(taken, len({row.image for row in rows}))
                lengths += [_letters(row) / LETTERS for row in rows[:1000]]
                continue
            name = spec.removeprefix("questions:").split("/")[0].split("+")[0]
            if name not in BUILT_IN:
                raise HymaError(f"There are no built-in questions {name}; {near_names(name, BUILT_IN)}")
            found[part] += limit
            pictures += limit
            unknown |= set() if limit else {part}
    text = max(TYPICAL_TEXT, round(fmean(lengths))) if lengths else TYPICAL_TEXT
    training = 0 if "train" in unknown else found["train"]
    if unknown:
        return Counts(training, 0, 0, text)
    return Counts(training, sum(found.values()) + data.validation_limit, pictures + data.validation_limit, text)


def _letters(row: Row) -> int:
    """Letters of a row's conversation."""
    if row.turns:
        return sum(len(question) + len(answer) for question, answer in row.turns)
    return len(row.question or "") + len(row.answers[0] if row.answers else "")


def print_bill(config: MLLMConfig, counts: Counts, accelerator: Accelerator, say: Callable[[str], None]) -> None:
    """Say what the run loads, stores, trains and computes.

    Args:
        config: the run.
        counts: questions and pictures, as far as they are known before reading.
        accelerator: processes and precision.
        say: prints a line.

    Raises:
        HymaError: the run does not fit disk, memory or GPU, or the LLMs not the processes.
    """
    towers, llms, grid, search = config.tower_cards(), config.llm_cards(), config.grid(), config.search
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    say(f"{accelerator.num_processes} process(es) on {device}, mixed precision {accelerator.mixed_precision}")
    for card in towers:
        where = "on disk" if tower_on_disk(card) else f"to be fetched from {card.source}"
        size = row_bytes(config.tokens.storage_dtype, card.tokens or 0, card.width) / 1e3
        say(f"  tower {card.id}: {card.tokens} tokens of width {card.width}, {size:.0f} kB a picture, {where}")
    for card in llms:
        where = "on disk" if llm_on_disk(card) else f"to be fetched from {card.source}"
        size = loaded_bytes(config, llm_shape(card)) / 1e9
        say(f"  LLM   {card.id}: width {card.width}, {card.parameters / 1e6:.0f} M parameters, {size:.1f} GB, {where}")
    say(
        f"{len(towers)} towers x {len(llms)} LLMs = {len(grid)} pairs; "
        f"training: {', '.join(config.data.train_limits())}; tests: {', '.join(config.data.test_limits())}"
    )
    mllm_plan.print_plan(config, counts, accelerator)
    print_placement(config, accelerator, say)
    for connector in search.connectors:
        _price(config, grid, connector, counts.training, say)


def _price(config: MLLMConfig, grid: PairGrid, connector: str, training: int, say: Callable[[str], None]) -> None:
    search, spec = config.search, config.search.spec(connector)
    visits = pair_flops(config, connector)
    loss = sum(visits)
    say(f"{connector}: {size_line(grid, spec, config.hypernetwork, 'projectors')}")
    if search.budget.given:
        say(
            f"  every method: batch {search.batch}, {search.budget} a seed; a fair step of a grid takes about "
            f"{loss / 1e12:.2f} TFLOP; seeds {search.seeds}; methods {', '.join(search.methods)}"
        )
        return
    sampler = PairSampler(
        tuple(range(len(grid))), search.pairs_per_visit, search.sampler, 0, [pair.text for pair in grid.pairs()]
    )
    share = 1.0 if search.sampler == "fair" else 1 / sampler.visits_per_round
    own = flops.hypernetwork_step_flops(grid, spec, config.hypernetwork, range(len(grid)))
    hyma = search.steps * share * (loss + own) + search.polish.price(visits)
    seen_rows = search.steps * share * search.batch
    epochs = f" ({seen_rows / training:.1f} epochs)" if training else ""
    say(
        f"  hyma: batch {search.batch}, {search.steps} steps, {seen_rows:.0f} samples per pair{epochs}, about "
        f"{hyma / 1e12:.0f} TFLOP a seed; grid: {search.grid_steps} steps, about {search.grid_steps * loss / 1e12:.0f} "
        f"TFLOP a seed; seeds {search.seeds}; methods {', '.join(search.methods)}"
    )

"""What one step of the causal search costs, against the loop that trains a plain LLaVA for one pair after the other.

    python benchmarks/causal_step.py --out causal_step.json

For each packaged LLM and 3 vision towers, one fixed batch of easy-VQA questions in float32: forward, backward to the
connectors, AdamW.

- `search`: `MLLMTask.losses` over a `ConnectorBank`, as a search and its grid run it: vision tokens from the
  store, the prefix from its cache, the 3 towers stacked, logits in chunks and of answer tokens only.
- `search, small`: the same with one pair a visit (`search.pairs_per_visit 1`), which holds one pair's activations at a
  time, and with weights kept in 16 bits (`llm.quantisation bf16`, exact): what a user with little memory sets, and what
  the memory target is judged on.
- `llava`: the exported model of each pair (`LlavaForConditionalGeneration`, or `FastVlmForConditionalGeneration` for
  CNN towers) from pixels through tower, projector and LLM to full logits. The 3 models share one LLM in memory, and
  nothing is charged for decoding pictures.
- `llava, no tower`: the same, but the towers' outputs are given: what is left of the ratio is not due to the store.

All have the same connectors and must agree in the loss of each pair to 1e-3. Every contestant runs in fresh processes;
rivals alternate, and the best time of all rounds counts; `measure.py` says how times and peaks are taken. The peak has
all that a process loads and makes, frozen weights included; `above weights` is what the steps add to what was there.
"""

import argparse
import gc
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.data.pictures import open_picture
from hyma_mllm.data.prompts import IGNORE, SHORT_ANSWER
from hyma_mllm.data.question_sets import QuestionSets
from hyma_mllm.data.questions import open_questions
from hyma_mllm.data.questions_balance import balanced
from hyma_mllm.data.token_library import TokenConfig, TokenLibrary
from hyma_mllm.errors import HymaError
from hyma_mllm.objectives.causal_lm import CausalObjective
from hyma_mllm.paths import write_text
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.mllm_prepare import prepare_mllm
from hyma_mllm.search.mllm_score import score_answers
from hyma_mllm.search.mllm_task import MLLMTask
from hyma_mllm.search.placement import Placement
from hyma_mllm.stitched.mllm import StitchedMLLM
from hyma_mllm.stitched.mllm_config import MLLMConfig
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.llm import LLM_CARDS, LanguageModel, Quantisation, check_terms, llm_card, llm_on_disk, load_llm
from hyma_mllm.zoo.vision_tokens import DEFAULT_TOWER_IDS, VisionTower, load_tower, tower_card

if TYPE_CHECKING:  # mypy takes the folder for a package; a script that is run finds what stands beside it
    from benchmarks import measure
else:
    import measure

QUESTIONS = 64
LEAST_SPEEDUP = 3.0
LARGE_VOCABULARY = 262_144
LEAST_MEMORY_RATIO = 2.0
"""For LLMs of the large vocabulary."""
SAME_LOSS = 1e-3
SMALL = "search, small"
VARIANTS = ("search", SMALL, "llava", "llava, no tower")
Step = Callable[[], list[float]]
"""One optimiser step of all pairs; gives their losses before it."""


@dataclass(frozen=True)
class Case:
    """One contestant.

    Attributes:
        llm: a packaged LLM.
        variant: one of `VARIANTS`.
        batch: questions of a step.
    """

    llm: str
    variant: str
    batch: int


def loaded(card: ModelCard, quantisation: Quantisation) -> LanguageModel:
    """The LLM, computing in float32; terms were checked before any case began."""
    terms = [card.terms] if card.terms else []
    return load_llm(card, dtype=torch.float32, quantisation=quantisation, accepted_terms=terms)


def task_of(llm: str, quantisation: Quantisation = "none") -> MLLMTask:
    """The search's task: balanced training questions of easy-VQA, the default towers, one LLM."""
    rows = balanced(open_questions("questions:easy-vqa").parts["train"], QUESTIONS)
    # Nothing is scored here, but a task has questions to score.
    questions = QuestionSets(rows, rows[:1], {"easy-vqa": rows[:1]}, SHORT_ANSWER)
    towers = [tower_card(name) for name in DEFAULT_TOWER_IDS]
    # In float32, so that tower and store say the same; 16 bits, the default, move the losses by 5e-4.
    library = TokenLibrary(TokenConfig(storage_dtype="fp32"))
    return prepare_mllm(
        towers,
        [llm_card(llm)],
        partial(loaded, quantisation=quantisation),
        Placement(),
        questions,
        library,
        score_answers,
        512,
        chunk=32,
        longest_answer=8,
    )


def spec_of(task: MLLMTask) -> ConnectorSpec:
    """LLaVA's projector: one hidden layer as wide as the LLM, GELU."""
    return ConnectorSpec(depth=1, hidden=task.readers[0].model.width, activation="gelu")


def search_step(task: MLLMTask, batch: int, per_visit: int) -> Step:
    """`per_visit` pairs at once, as a search trains them."""
    spec, objective = spec_of(task), CausalObjective()
    bank = ConnectorBank(task.grid, spec, seed=0)
    optimiser = torch.optim.AdamW(bank.parameters(), fused=True)
    questions = task.batch(torch.arange(batch), 0, 0)
    task.scales(spec)  # a run takes them once
    pairs = range(len(task.grid))
    visits = [pairs[start : start + per_visit] for start in pairs[::per_visit]]

    def step() -> list[float]:
        found: list[float] = []
        for visit in visits:
            losses = task.losses(bank(visit), spec, objective, questions)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            found += losses.tolist()
        optimiser.step()
        optimiser.zero_grad()
        return found

    return step


@dataclass
class PlainPair:
    """What plain training of one pair takes.

    Attributes:
        model: the exported transformers model; its projector trains.
        inputs: of its forward: ids, mask, labels, pixels.
        optimiser: of the projector.
    """

    model: Any
    inputs: dict[str, Tensor]
    optimiser: torch.optim.AdamW


def llava_step(task: MLLMTask, batch: int, with_tower: bool) -> Step:
    """One pair after the other, each as transformers trains it."""
    pairs: list[PlainPair] = []
    bank = ConnectorBank(task.grid, spec_of(task), seed=0)
    for number in range(len(task.grid)):
        pairs.append(plain_pair(task, bank, number, batch))
        if number:
            # Three runs of one pair each would hold one LLM each.
            pairs[-1].model.model.language_model = pairs[0].model.model.language_model
            pairs[-1].model.lm_head = pairs[0].model.lm_head
        if not with_tower:
            give_tokens(pairs[-1])

    def step() -> list[float]:
        losses = []
        for pair in pairs:
            loss = pair.model(**pair.inputs, use_cache=False).loss
            loss.backward()
            pair.optimiser.step()
            pair.optimiser.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    return step


def plain_pair(task: MLLMTask, bank: ConnectorBank, number: int, batch: int) -> PlainPair:
    """The model that an export would make of the bank's pair, and the batch as it reads it."""
    pair, spec, reader = task.grid.pair(number), spec_of(task), task.readers[0]
    tower, read = load_tower(task.grid.vision_ids[pair.vision]), task.towers[pair.vision]
    state = connectors.select(bank([number])[0].params, 0)
    projector = connectors.folded(state, read.mean, read.spread, task.scales(spec)[number])
    config = MLLMConfig(tower.card, reader.model.card, spec)
    model = StitchedMLLM.from_parts(tower, reader.model, reader.prompter, projector, config).model
    weights = model.model.multi_modal_projector.requires_grad_(True).parameters()
    inputs = plain_inputs(task, tower, model.config.image_token_id, batch)
    return PlainPair(model, inputs, torch.optim.AdamW(weights, fused=True))


def plain_inputs(task: MLLMTask, tower: VisionTower, image_token: int, batch: int) -> dict[str, Tensor]:
    """The first questions as ids `[before][picture][after]` with their labels, and the pixels of their pictures."""
    reader = task.readers[0]
    text = reader.texts(range(batch))
    front = torch.tensor([*reader.prompter.before, *[image_token] * (tower.card.tokens or 0)]).expand(batch, -1)
    pictures = [open_picture(row.image) for row in task.rows[:batch]]
    return {
        "input_ids": torch.cat([front, text.after], 1),
        "attention_mask": torch.cat([torch.ones_like(front), text.mask.long()], 1),
        "labels": torch.cat([torch.full_like(front, IGNORE), text.labels], 1),
        "pixel_values": torch.stack([tower.preprocess(picture) for picture in pictures]),
    }


def give_tokens(pair: PlainPair) -> None:
    """Put what the pair's tower says of the batch in the tower's place."""
    outputs: list[Any] = []
    inner = pair.model.model
    handle = inner.vision_tower.register_forward_hook(lambda module, pixels, output: outputs.append(output))
    with torch.no_grad():
        inner.get_image_features(pair.inputs["pixel_values"], return_dict=True)
    handle.remove()
    last, states = outputs[0].last_hidden_state, outputs[0].hidden_states

    def given(*pixels: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=last, hidden_states=states)

    inner.vision_tower = nn.Identity()
    inner.vision_tower.forward = given


def step_of(case: Case, task: MLLMTask) -> Step:
    """The contestant's step."""
    if case.variant.startswith("search"):
        return search_step(task, case.batch, len(task.grid) if case.variant == "search" else 1)
    return llava_step(task, case.batch, with_tower=case.variant == "llava")


def measured(case: Case, seconds: float) -> dict[str, Any]:
    """Best step time, peak bytes in all and above what was there before a step, first losses; in this process."""
    torch.manual_seed(0)
    before = measure.start_of_peak("cpu")
    task = task_of(case.llm, "bf16" if case.variant == SMALL else "none")
    vocabulary = task.readers[0].model.vocabulary
    step = step_of(case, task)
    del task  # the plain loop needs it no more
    gc.collect()
    # Building passes through a second copy of the LLM, which is no part of a step.
    held = measure.start_of_peak("cpu")
    losses = step()
    best = measure.fastest(step, seconds, "cpu")
    highest = measure.peak("cpu")
    return {
        "seconds": best,
        "peak_bytes": highest - before,
        "step_bytes": highest - held,
        "losses": losses,
        "vocabulary": vocabulary,
    }


def compare(llm: str, batch: int, rounds: int, seconds: float, bar: "tqdm[NoReturn]") -> list[dict[str, Any]]:
    """The contestants of one LLM in turn; the search against each of the others."""
    cases = {variant: Case(llm, variant, batch) for variant in VARIANTS}
    best = dict.fromkeys(VARIANTS, math.inf)
    for _ in range(rounds):
        for name, case in cases.items():
            best[name] = min(best[name], measure.for_time(__file__, asdict(case), seconds)["seconds"])
            bar.update()
    found = {}
    for name, case in cases.items():
        found[name] = measure.for_peak(__file__, asdict(case)) | {"seconds": best[name]}
        bar.update()
    whole = compared(cases["search"], cases["llava"], found)
    whole["least_speedup"] = LEAST_SPEEDUP
    whole["met"] = whole["same_loss"] and whole["speedup"] >= LEAST_SPEEDUP
    slim = compared(cases[SMALL], cases["llava"], found)
    if found["search"]["vocabulary"] >= LARGE_VOCABULARY:
        slim["least_memory_ratio"] = LEAST_MEMORY_RATIO
        slim["met"] = slim["same_loss"] and slim["memory_ratio"] >= LEAST_MEMORY_RATIO
    return [whole, slim, compared(cases["search"], cases["llava, no tower"], found)]


def compared(ours: Case, other: Case, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A line of the table, without targets."""
    mine, theirs = found[ours.variant], found[other.variant]
    gap = max(abs(a - b) for a, b in zip(mine["losses"], theirs["losses"], strict=True))
    return {
        "text": f"{ours.llm} x {len(DEFAULT_TOWER_IDS)} towers, batch {ours.batch}: {ours.variant} | {other.variant}",
        "ours": asdict(ours),
        "other": asdict(other),
        "least_speedup": None,
        "least_memory_ratio": None,
        "ours_found": mine,
        "other_found": theirs,
        "speedup": theirs["seconds"] / mine["seconds"],
        "memory_ratio": theirs["peak_bytes"] / mine["peak_bytes"],
        "step_memory_ratio": theirs["step_bytes"] / mine["step_bytes"],
        "loss_difference": gap,
        "same_loss": gap <= SAME_LOSS,
        "met": gap <= SAME_LOSS,
    }


def table(rows: list[dict[str, Any]], where: dict[str, Any]) -> Table:
    """All ratios; ours before the bar, the other behind it."""
    title = f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}, load {where['load_average']:.1f}"
    lines = Table(title=title)
    names = ("ours | other", "s a step", "speed-up", "peak MB", "ratio", "above weights", "ratio", "loss gap", "target")
    for name in names:
        lines.add_column(name, justify="left" if name in ("ours | other", "target") else "right")
    for row in rows:
        ours, other = row["ours_found"], row["other_found"]
        limits = (("speed-up", "speedup"), ("peak ratio", "memory_ratio"))
        targets = [
            f"{name} {row[f'least_{key}']:g}: {'met' if row[key] >= row[f'least_{key}'] else 'NOT met'}"
            for name, key in limits
            if row[f"least_{key}"] is not None
        ]
        targets.append(f"same loss to {SAME_LOSS:g}: {'met' if row['same_loss'] else 'NOT met'}")
        lines.add_row(
            row["text"],
            f"{ours['seconds']:.2f} | {other['seconds']:.2f}",
            f"{row['speedup']:.2f}",
            f"{ours['peak_bytes'] / 1e6:.0f} | {other['peak_bytes'] / 1e6:.0f}",
            f"{row['memory_ratio']:.2f}",
            f"{ours['step_bytes'] / 1e6:.0f} | {other['step_bytes'] / 1e6:.0f}",
            f"{row['step_memory_ratio']:.2f}",
            f"{row['loss_difference']:.0e}",
            "\n".join(targets),
        )
    return lines


def chosen(names: list[str], accepted_terms: list[str], console: Console) -> list[str]:
    """The LLMs to measure: those named, or all packaged ones whose terms were accepted, now or when they were fetched.

    Raises:
        HymaError: an unknown LLM, or a named one whose terms are not accepted.
    """
    cards = [llm_card(name) for name in names or LLM_CARDS]
    found = []
    for card in cards:
        try:
            if not llm_on_disk(card):
                check_terms(card, accepted_terms)
            found.append(card.id)
        except HymaError as error:
            if names:
                raise
            console.print(f"left out: {error}")
    return found


def main() -> None:
    """Measure one case (in a child process) or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers and the machine")
    parser.add_argument("--llms", nargs="+", default=[], help="LLMs; by default all packaged ones")
    parser.add_argument("--accept-terms", nargs="+", default=[], help="terms of use that you accept, e.g. gemma")
    parser.add_argument("--batch", type=int, default=8, help=f"questions of a step, at most {QUESTIONS}")
    parser.add_argument("--rounds", type=int, default=2, help="fresh processes per contestant")
    parser.add_argument("--seconds", type=float, default=3.0, help="least time measured per process")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measured(Case(**json.loads(arguments.case)), arguments.seconds)))
        return
    if not 1 <= arguments.batch <= QUESTIONS:
        parser.error(f"--batch is {arguments.batch}; give 1 to {QUESTIONS} questions")
    console = Console(width=200)
    try:
        llms = chosen(arguments.llms, arguments.accept_terms, console)
    except HymaError as error:
        sys.exit(str(error))
    where = measure.machine("cpu")
    rows = []
    with tqdm(total=len(llms) * len(VARIANTS) * (arguments.rounds + 1), desc="contestants", unit="process") as bar:
        for llm in llms:
            rows += compare(llm, arguments.batch, arguments.rounds, arguments.seconds, bar)
    if arguments.out:
        write_text(arguments.out, json.dumps({"machine": where, "claims": rows}, indent=2) + "\n")
    console.print(table(rows, where))


if __name__ == "__main__":
    main()

"""What one step of the causal search costs, against the loop that trains a plain LLaVA for one pair after the other.

    python benchmarks/causal_step.py --out causal_step.json

For each packaged LLM and the 3 vision towers of `recipes/mllm.yaml`, one fixed batch of easy-VQA questions, as many and
prompted as the recipe's steps have them: forward, backward to the connectors, AdamW. Once in the precision that the
recipe takes on this machine, and once in float32, where both must agree in the loss of each pair to 1e-3.

- `search`: `MLLMTask.losses` over a `ConnectorBank`, as a search and its grid run it: vision tokens from the
  store, the prefix from its cache, the 3 towers stacked, logits in chunks and of answer tokens only.
- `search, small`: the same with one pair a visit (`search.pairs_per_visit 1`), which holds one pair's activations at a
  time, and with weights kept in 16 bits (in float32 `llm.quantisation bf16`, exact): what a user with little memory
  sets, and what the memory target is judged on.
- `llava`: the exported model of each pair (`LlavaForConditionalGeneration`, or `FastVlmForConditionalGeneration` for
  CNN towers) from pixels through tower, projector and LLM to full logits. The 3 models share one LLM in memory, and
  nothing is charged for decoding pictures.
- `llava, no tower`: the same, but the towers' outputs are given: what is left of the ratio is not due to the store.

All have the same connectors. Every contestant runs in fresh processes; rivals alternate, and the best time of all
rounds counts; `measure.py` says how times and peaks are taken. The peak has all that a process loads and makes, frozen
weights included; `above weights` is what the steps add to what was there.
"""

import argparse
import gc
import json
import math
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from hyma_mllm import launch
from hyma_mllm.errors import HymaError
from hyma_mllm.mllm import MLLMConfig
from hyma_mllm.paths import write_text
from hyma_mllm.search.mllm_task import MLLMTask
from hyma_mllm.zoo.llm import LLM_CARDS, Quantisation, check_terms, llm_card, llm_on_disk

if TYPE_CHECKING:  # mypy takes the folder for a package; a script that is run finds what stands beside it
    from benchmarks import measure
    from benchmarks.causal_ground import QUESTIONS, Precision, Step, llava_step, search_step, task_of
else:
    import measure
    from causal_ground import QUESTIONS, Precision, Step, llava_step, search_step, task_of

LEAST_SPEEDUP = 3.0
LARGE_VOCABULARY = 262_144
LEAST_MEMORY_RATIO = 2.0
"""For LLMs of the large vocabulary."""
SAME_LOSS = 1e-3
SMALL = "search, small"
RIVAL = "llava"
NO_TOWER = "llava, no tower"
VARIANTS = {"recipe": ("search", SMALL, RIVAL, NO_TOWER), "exact": ("search", RIVAL)}
"""What is measured in the recipe's precision, and in float32 where that is another."""
RECIPE = Path(__file__).parents[1] / "recipes" / "mllm.yaml"


@dataclass(frozen=True)
class Case:
    """One contestant.

    Attributes:
        llm: a packaged LLM.
        variant: one of `VARIANTS`.
        batch: questions of a step.
        precision: of the LLM's weights and of the pass through it.
    """

    llm: str
    variant: str
    batch: int
    precision: Precision


@cache
def recipe() -> MLLMConfig:
    """The built-in default."""
    return launch.parse(MLLMConfig, RECIPE, arguments=[])[0]


def step_of(case: Case, task: MLLMTask) -> Step:
    """The contestant's step."""
    if case.variant.startswith("search"):
        return search_step(task, case.batch, len(task.grid) if case.variant == "search" else 1)
    return llava_step(task, case.batch, with_tower=case.variant == "llava")


def measured(case: Case, seconds: float) -> dict[str, Any]:
    """Best step time, peak bytes in all and above what was there before a step, first losses; in this process."""
    torch.manual_seed(0)
    before = measure.start_of_peak("cpu")
    config = recipe()
    narrow: Quantisation = "bf16" if case.variant == SMALL and case.precision == "fp32" else "none"
    task = task_of(case.llm, case.precision, narrow, config.towers, config.data.suffix)
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


def cases(llm: str, batch: int) -> list[list[Case]]:
    """The contestants of one LLM: in the recipe's precision, and in float32."""
    own = recipe().llm.precision()
    found = [[Case(llm, variant, batch, own) for variant in VARIANTS["recipe"]]]
    if own != "fp32":
        found.append([Case(llm, variant, batch, "fp32") for variant in VARIANTS["exact"]])
    return found


def compare(rivals: list[Case], rounds: int, seconds: float, bar: "tqdm[NoReturn]") -> list[dict[str, Any]]:
    """The contestants of one LLM and precision in turn; the search against the others."""
    best = dict.fromkeys(rivals, math.inf)
    for _ in range(rounds):
        for case in rivals:
            best[case] = min(best[case], measure.for_time(__file__, asdict(case), seconds)["seconds"])
            bar.update()
    found: dict[str, dict[str, Any]] = {}
    for case in rivals:
        found[case.variant] = measure.for_peak(__file__, asdict(case)) | {"seconds": best[case]}
        bar.update()
    by_name = {case.variant: case for case in rivals}
    rows = [compared(by_name["search"], by_name[RIVAL], found) | {"least_speedup": LEAST_SPEEDUP}]
    if SMALL in by_name:
        large = found["search"]["vocabulary"] >= LARGE_VOCABULARY
        slim = compared(by_name[SMALL], by_name[RIVAL], found)
        rows.append(slim | {"least_memory_ratio": LEAST_MEMORY_RATIO if large else None})
    if NO_TOWER in by_name:
        rows.append(compared(by_name["search"], by_name[NO_TOWER], found))
    for row in rows:
        row["met"] = all(met for _, met in verdicts(row))
    return rows


def compared(ours: Case, other: Case, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A line of the table, without targets of time and memory."""
    mine, theirs = found[ours.variant], found[other.variant]
    gap = max(abs(a - b) for a, b in zip(mine["losses"], theirs["losses"], strict=True))
    return {
        "text": f"{ours.llm} x {len(mine['losses'])} towers, {ours.precision}: {ours.variant} | {other.variant}",
        "ours": asdict(ours),
        "other": asdict(other),
        "least_speedup": None,
        "least_memory_ratio": None,
        # 16 bits round two orders of the same sums apart.
        "largest_loss_difference": SAME_LOSS if ours.precision == "fp32" else None,
        "ours_found": mine,
        "other_found": theirs,
        "speedup": theirs["seconds"] / mine["seconds"],
        "memory_ratio": theirs["peak_bytes"] / mine["peak_bytes"],
        "step_memory_ratio": theirs["step_bytes"] / mine["step_bytes"],
        "loss_difference": gap,
    }


def verdicts(row: dict[str, Any]) -> list[tuple[str, bool]]:
    """The targets of a line and whether they are met."""
    found = []
    for name, key in (("speed-up", "speedup"), ("peak ratio", "memory_ratio")):
        least = row[f"least_{key}"]
        if least is not None:
            found.append((f"{name} {least:g}", row[key] >= least))
    largest = row["largest_loss_difference"]
    if largest is not None:
        found.append((f"same loss to {largest:g}", row["loss_difference"] <= largest))
    return found


def table(rows: list[dict[str, Any]], where: dict[str, Any]) -> Table:
    """All ratios; ours before the bar, the other behind it."""
    title = f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}, load {where['load_average']:.1f}"
    title += f"; batch {rows[0]['ours']['batch']}"
    lines = Table(title=title)
    names = ("ours | other", "s a step", "speed-up", "peak MB", "ratio", "above weights", "ratio", "loss gap", "target")
    for name in names:
        lines.add_column(name, justify="left" if name in ("ours | other", "target") else "right")
    for row in rows:
        ours, other = row["ours_found"], row["other_found"]
        targets = [f"{name}: {'met' if met else 'NOT met'}" for name, met in verdicts(row)]
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
    parser.add_argument("--batch", type=int, default=recipe().search.batch, help=f"questions, at most {QUESTIONS}")
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
    rivals = [each for llm in llms for each in cases(llm, arguments.batch)]
    with tqdm(total=sum(map(len, rivals)) * (arguments.rounds + 1), desc="contestants", unit="process") as bar:
        for each in rivals:
            rows += compare(each, arguments.rounds, arguments.seconds, bar)
    if arguments.out:
        write_text(arguments.out, json.dumps({"machine": where, "claims": rows}, indent=2) + "\n")
    console.print(table(rows, where))


if __name__ == "__main__":
    main()

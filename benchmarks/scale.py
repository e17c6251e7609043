"""What larger runs cost: measured time and memory beside what the cost model and the memory planner say beforehand.

    python benchmarks/scale.py --out benchmarks/results/scale.json

Two sizes of each: an optimiser step of a contrastive search (synthetic features), one of a causal search (SmolLM2 and
the default towers), and a pass of an image encoder (DINOv2-small). Time is predicted by `hyma_mllm.planning.cost`
from FLOPs, bytes moved, and rates of this machine that are measured on single operations. Memory is
predicted by the planner that `--dry-run` prints. Every size is measured in fresh processes; `measure.py` says how
times and peaks are taken. A prediction is right within 25 %.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.data.library import measured_flops
from hyma_mllm.hypernetwork.network import Hypernetwork
from hyma_mllm.hypernetwork.presets import HypernetworkConfig
from hyma_mllm.hypernetwork.sizes import all_weights, hypernetwork_weights
from hyma_mllm.objectives.causal_lm import CHUNK
from hyma_mllm.objectives.contrastive import DEFAULT_TILE, ContrastiveConfig, ContrastiveObjective
from hyma_mllm.pairs import PairGrid
from hyma_mllm.paths import write_text
from hyma_mllm.planning import cost, training
from hyma_mllm.search import flops
from hyma_mllm.search.mllm_task import MLLMTask
from hyma_mllm.search.pair_loss import PairLoss
from hyma_mllm.search.task import VLMTask
from hyma_mllm.zoo.llm import llm_card
from hyma_mllm.zoo.llm_shape import LLMShape, llm_shape
from hyma_mllm.zoo.vision_tokens import load_tower, tower_card

if TYPE_CHECKING:  # mypy takes the folder for a package; a script that is run finds what stands beside it
    from benchmarks import causal_ground, measure
else:
    import causal_ground
    import measure

LLM = "smollm2-135m"
TOWER = "dinov2-small@8"
WITHIN = 0.25
"""A prediction is right when it is off by no more."""

LEAST_STEPS = 3
"""That are timed in a process."""


@dataclass(frozen=True)
class Case:
    """One size.

    Attributes:
        kind: `contrastive`, `causal` or `embedding`.
        batch: samples of a step, questions, or pictures of a pass.
        vision: widths of the vision models of a contrastive search.
        text: widths of its text models.
        hidden: width of its connectors' hidden layer.
        per_visit: pairs that ride through the LLM together.
        side: of a picture, pixels.
    """

    kind: str
    batch: int
    vision: tuple[int, ...] = ()
    text: tuple[int, ...] = ()
    hidden: int = 0
    per_visit: int = 0
    side: int = 0

    def __str__(self) -> str:
        if self.kind == "contrastive":
            return f"contrastive step, {len(self.vision)} x {len(self.text)}, batch {self.batch}, hidden {self.hidden}"
        if self.kind == "causal":
            return f"causal step of {LLM}, 3 towers, batch {self.batch}, {self.per_visit} a visit"
        return f"{TOWER} at {self.side} pixels, {self.batch} pictures"


CASES = (
    Case("contrastive", 256, vision=(384, 768, 1024), text=(384, 768, 768, 1024), hidden=1024),
    Case("contrastive", 1024, vision=(768, 512), text=(384, 768), hidden=512),
    Case("causal", 8, per_visit=1),
    Case("causal", 16, per_visit=3),
    Case("embedding", 8, side=112),
    Case("embedding", 8, side=224),
)


@dataclass
class Planned:
    """A step to be measured, and what is predicted of it.

    Attributes:
        step: takes it once.
        work: what it does.
        bytes: that it needs at its peak, beyond what was there before it was built; 0 where that is not predicted.
        layers: the transformer and the tokens that pass together, if the plain products are those of its layers.
    """

    step: Callable[[], object]
    work: cost.Work
    bytes: float
    layers: tuple[LLMShape, int] | None = None


def contrastive(case: Case) -> Planned:
    """A fair step of the default hypernetwork over all pairs in one visit, as `Trainer` takes it."""
    grid = PairGrid(
        tuple(f"v{n}" for n in range(len(case.vision))),
        case.vision,
        tuple(f"t{n}" for n in range(len(case.text))),
        case.text,
    )
    spec, config = ConnectorSpec(depth=1, hidden=case.hidden), HypernetworkConfig()
    rows = torch.arange(case.batch)
    images, texts = (
        [F.normalize(torch.randn(case.batch, w), dim=1) for w in side] for side in (case.vision, case.text)
    )
    task = VLMTask(grid, images, texts, torch.arange(case.batch + 1), rows, rows[:1], rows[:1], rows)
    network = Hypernetwork(grid, spec, config)
    model = PairLoss(network, ContrastiveObjective(ContrastiveConfig()), task, spec)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    pairs = list(range(len(grid)))

    def step() -> None:
        model(pairs, task.batch(rows, 0, 0)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    shapes = [grid.shape(pair) for pair in pairs]
    trained = hypernetwork_weights(grid, spec, config)
    products = task.visit_flops(spec, pairs, case.batch), flops.hypernetwork_step_flops(grid, spec, config, pairs)
    visit = float(training.PREDICTED_COPIES * training.FLOAT * all_weights(grid, spec))
    visit += training.contrastive_visit(spec, shapes, case.batch, case.batch, DEFAULT_TILE)
    needed = training.STATE * trained + max(training.GRADIENT * trained, visit)
    return Planned(step, cost.contrastive_work(spec, shapes, case.batch, trained, products), needed)


def causal(case: Case) -> Planned:
    """A step of all pairs' own projectors, as a search trains them; questions of easy-VQA."""
    task: MLLMTask = causal_ground.task_of(LLM)
    spec, shape, facts = causal_ground.spec_of(task), llm_shape(llm_card(LLM)), task.facts[0]
    longest = max(tower.count for tower in task.towers)
    length = longest + round(facts.text)
    pairs = list(range(len(task.grid)))
    shapes = [task.grid.shape(pair) for pair in pairs]
    own_weights = all_weights(task.grid, spec)
    moved = float(cost.GRADIENT_PASSES * training.FLOAT * own_weights)
    for start in range(0, len(pairs), case.per_visit):
        visit = pairs[start : start + case.per_visit]
        own = max(task.towers[task.grid.pair(pair).vision].count for pair in visit) + round(facts.text)
        moved += cost.causal_moved(shape, len(visit) * case.batch, own, facts.before, training.FLOAT)
    rows = case.per_visit * case.batch
    needed = training.llm_weights(shape, training.FLOAT, training.FLOAT)
    needed += (training.STATE + training.GRADIENT) * own_weights
    needed += training.causal_visit(shape, rows, length, facts.before, training.FLOAT, training.FLOAT, False)
    needed += training.projector_visit(spec, shapes[: case.per_visit], case.batch * longest, shape.width)
    needed += training.causal_loss(round(rows * facts.supervised), shape.width, CHUNK)
    step = causal_ground.search_step(task, case.batch, case.per_visit)
    updates = float((cost.UPDATE_PASSES - 3) * training.FLOAT * own_weights)  # nothing is clipped here
    work = cost.Work(task.visit_flops(spec, pairs, case.batch), 0.0, updates, moved)
    return Planned(step, work, needed, (shape, rows * length))


def embedding(case: Case) -> Planned:
    """A forward pass over random pictures."""
    tower = load_tower(tower_card(f"{TOWER}:{case.side}px"))
    pixels = torch.randn(case.batch, 3, case.side, case.side)
    card = tower.card
    # Eight blocks are read, and each has the class token, too.
    moved = cost.transformer_moved(case.batch, 1 + (card.tokens or 0), card.width, 8)
    one = measured_flops(lambda: tower.tokens(pixels[:1]))
    width, rows = card.width, case.batch * (1 + (card.tokens or 0))
    block = LLMShape(8, width, 4 * width, width, width, vocabulary=0, parameters=0, embeddings=0)
    step = torch.inference_mode()(lambda: tower.tokens(pixels))
    return Planned(step, cost.Work(one * case.batch, bytes=moved), 0.0, (block, rows))


BUILD = {"contrastive": contrastive, "causal": causal, "embedding": embedding}


def measured(case: Case, seconds: float) -> dict[str, Any]:
    """Median time of a step, and the peak, in this process; and the median rates, taken between one step and the next.

    In turn, and medians of both, because a shared machine is slower at times.
    """
    torch.manual_seed(0)
    before = measure.start_of_peak("cpu")
    planned = BUILD[case.kind](case)
    for _ in range(2):  # the first step is never the fastest, and the second one has the optimiser's moments
        planned.step()
    peak = measure.peak("cpu") - before
    times, rates = list[float](), list[cost.Rates]()
    while not times or (seconds and (sum(times) < seconds or len(times) < LEAST_STEPS)):
        rates.append(rates_for(planned))
        times.append(measure.fastest(planned.step, 0.0, "cpu"))
    usual = cost.Rates(*map(median, zip(*map(astuple, rates), strict=True)))
    return {
        "seconds": median(times),
        "predicted_seconds": planned.work.seconds(usual),
        "peak_bytes": peak,
        "predicted_bytes": planned.bytes,
        "work": asdict(planned.work),
        "rates": asdict(usual),
    }


def rates_for(planned: Planned) -> cost.Rates:
    """The machine's rates at this moment."""
    rates = cost.measured_rates(rounds=1)
    return replace(rates, flops=cost.frozen_rate(*planned.layers, rounds=1)) if planned.layers else rates


def checked(case: Case, rounds: int, seconds: float) -> dict[str, Any]:
    """The fastest of all rounds beside its own prediction, and the peak of another process."""
    found = min(
        (measure.for_time(__file__, asdict(case), seconds) for _ in range(rounds)), key=lambda one: one["seconds"]
    )
    peak = measure.for_peak(__file__, asdict(case)) if found["predicted_bytes"] else None
    row = {"case": str(case), **found, "time_ratio": found["predicted_seconds"] / found["seconds"]}
    row["peak_bytes"] = peak["peak_bytes"] if peak else None
    row["memory_ratio"] = found["predicted_bytes"] / peak["peak_bytes"] if peak else None
    ratios = [ratio for ratio in (row["time_ratio"], row["memory_ratio"]) if ratio is not None]
    return row | {"met": all(abs(ratio - 1) <= WITHIN for ratio in ratios)}


def table(rows: list[dict[str, Any]], where: dict[str, Any]) -> Table:
    """Measured and predicted, side by side."""
    lines = Table(title=f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}")
    for name in ("size", "s", "predicted", "ratio", "peak MB", "predicted", "ratio", "within 25 %"):
        lines.add_column(name, justify="left" if name == "size" else "right")
    for row in rows:
        peak = row["peak_bytes"]
        lines.add_row(
            row["case"],
            f"{row['seconds']:.3f}",
            f"{row['predicted_seconds']:.3f}",
            f"{row['time_ratio']:.2f}",
            f"{peak / 1e6:.0f}" if peak else "-",
            f"{row['predicted_bytes'] / 1e6:.0f}" if peak else "-",
            f"{row['memory_ratio']:.2f}" if peak else "-",
            "yes" if row["met"] else "NO",
        )
    return lines


def main() -> None:
    """Measure one size (in a child process) or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers and the machine")
    parser.add_argument("--only", choices=sorted(BUILD), help="sizes of one kind; by default all")
    parser.add_argument("--rounds", type=int, default=2, help="fresh processes per size")
    parser.add_argument("--seconds", type=float, default=4.0, help="least time measured per process")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measured(Case(**json.loads(arguments.case)), arguments.seconds)))
        return
    where = measure.machine("cpu")
    wanted = [case for case in CASES if arguments.only in (None, case.kind)]
    rows = [checked(case, arguments.rounds, arguments.seconds) for case in wanted]
    if arguments.out:
        write_text(arguments.out, json.dumps({"machine": where, "sizes": rows}, indent=2) + "\n")
    Console(width=150).print(table(rows, where))


if __name__ == "__main__":
    main()

"""Which searches collapse: a stress set of bad features, the published recipe (before) against ours (after).

    python benchmarks/stability.py --out benchmarks/results/stability.json

Matched features are drawn from a shared latent: one sound and one faulty image encoder, one sound and one faulty text
encoder, so that a grid of four pairs holds every mix of a fault. A run collapses when the final R@10 (mean of both
directions on a held-out gallery) of a pair is at most three times chance, or the run ends with an error; pairs of a
constant encoder can only be at chance and are not judged. A third arm is ours without the closed form that our recipe
starts from. A step takes one pair, and all arms take the same number of steps; large batches take fewer, as the table's
head says. Every finished run is on disk at once, and the same command goes on where it was.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cache, partial
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hyma_mllm import launch
from hyma_mllm.data.sharded_rows import ShardedRows
from hyma_mllm.data.splits import Split
from hyma_mllm.data.standardise import StandardiseConfig
from hyma_mllm.errors import HymaError
from hyma_mllm.hypernetwork.presets import HypernetworkConfig
from hyma_mllm.objectives.contrastive import ContrastiveConfig, ContrastiveObjective
from hyma_mllm.paths import write_text
from hyma_mllm.run_directory import RunDirectory, versions
from hyma_mllm.search.guard import GuardConfig
from hyma_mllm.search.interrupt import StopRequest
from hyma_mllm.search.methods import Search, SearchConfig
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.search.prepare import Prepared, assemble
from hyma_mllm.search.samplers import PairSampling
from hyma_mllm.vlm import VLMConfig
from hyma_mllm.zoo.cards import Kind, ModelCard

if TYPE_CHECKING:  # mypy takes the folder for a package; a script that is run finds what stands beside it
    from benchmarks import measure
    from benchmarks.stress_set import FAULTS, STEPS, Setting, encoders
else:
    import measure
    from stress_set import FAULTS, STEPS, Setting, encoders

TIMES_CHANCE = 3.0
"""A score up to so many times chance is a collapse."""

ArmName = Literal["before", "no closed form", "after"]

RECIPE = Path(__file__).parents[1] / "recipes" / "vlm.yaml"


@dataclass(frozen=True)
class Arm:
    """A recipe: all that a search takes besides its data.

    Attributes:
        unit_texts: give connectors L2-normalised text features, as the published features are.
    """

    hypernetwork: HypernetworkConfig
    standardise: StandardiseConfig
    unit_texts: bool
    objective: ContrastiveConfig
    sampler: PairSampling
    optimiser: OptimiserConfig
    guard: GuardConfig


@cache
def arms() -> dict[ArmName, Arm]:
    """The published recipe (arXiv 2507.10015 and its authors' code: a constant rate, no clipping) and our own."""
    ours, recipe = VLMConfig(), launch.parse(VLMConfig, RECIPE, arguments=[])[0]
    published = OptimiserConfig(lr=1e-2, beta2=0.999, weight_decay=0.0, warmup=0.0, final=1.0, clip=1e9)
    return {
        "before": Arm(
            HypernetworkConfig(preset="hyma", initialisation="torch"),
            StandardiseConfig(image_power="none", centre=False, text_scale="one"),
            unit_texts=True,
            objective=ContrastiveConfig(scale=100.0),
            sampler="cyclic",
            optimiser=published,
            guard=GuardConfig(rollbacks=0),
        ),
        "no closed form": _ours(ours),
        "after": _ours(recipe),
    }


def _ours(config: VLMConfig) -> Arm:
    return Arm(
        config.hypernetwork,
        config.standardise,
        unit_texts=False,
        objective=config.objective,
        sampler="round",
        optimiser=config.search.optimiser,
        guard=config.search.guard,
    )


@dataclass(frozen=True)
class Case:
    """One training."""

    fault: str
    batch: int
    arm: ArmName
    seed: int

    @property
    def key(self) -> str:
        """Its name in the JSON file."""
        return f"{self.fault}|{self.batch}|{self.arm}|{self.seed}"


@dataclass(frozen=True)
class Result:
    """What a training came to.

    Attributes:
        scores: final R@10 of each pair, percent, in the order of `MIXES`; empty when the run ended with an error.
        collapsed: whether a pair that could learn did not.
        non_finite: losses that were not finite, over pairs and steps.
        skipped: steps that the guard left out.
        escaped: optimiser steps taken on a non-finite loss, and one more if weights are not finite at the end.
        error: with which the run ended; empty for none.
        seconds: of data, training and scoring.
    """

    scores: list[float]
    collapsed: bool
    non_finite: int
    skipped: int
    escaped: int
    error: str
    seconds: float


MIXES = ("both sound", "text faulty", "image faulty", "both faulty")
"""The four pairs in grid order."""


def stress_task(case: Case, setting: Setting, arm: Arm, device: torch.device) -> Prepared:
    """The task of one training, standardised as the arm does it."""
    images, texts = encoders(case.fault, setting, case.seed)
    starts = (0, setting.train, setting.train + setting.validation, len(images[0]))
    split = Split(*(list(range(a, b)) for a, b in pairwise(starts)))
    prepared = assemble(
        [_card("image", name, x) for name, x in zip(("sound", "faulty"), images, strict=True)],
        [_card("text", name, x) for name, x in zip(("sound", "faulty"), texts, strict=True)],
        [ShardedRows([x]) for x in images],
        [ShardedRows([x]) for x in texts],
        [],
        split,
        torch.arange(len(images[0]) + 1),
        torch.arange(len(images[0])),
        arm.standardise,
        device,
    )
    if arm.unit_texts:
        every = torch.arange(len(images[0]))
        prepared.task.texts = [F.normalize(text[every], dim=-1) for text in prepared.task.texts]
    return prepared


def _card(kind: Kind, name: str, features: Tensor) -> ModelCard:
    return ModelCard(f"{name} {kind}", kind, "drawn", "0", features.shape[1], 0, "none")


class Watched(ContrastiveObjective):
    """The objective, which also counts the losses that are not finite.

    Args:
        config: of the objective.
        counts: `non_finite` is added to.
    """

    def __init__(self, config: ContrastiveConfig, counts: Counter[str]) -> None:
        super().__init__(config)
        self.counts = counts

    def forward(self, images: Tensor, texts: Tensor, groups: Tensor | None = None) -> Tensor:
        """The loss of each pair [pairs]."""
        losses = super().forward(images, texts, groups)
        self.counts["non_finite"] += int((~losses.isfinite()).sum())
        return losses


def run_once(case: Case, setting: Setting, device: str) -> Result:
    """One training and its judgement."""
    arm, began = arms()[case.arm], time.perf_counter()
    # Accelerate keeps the precision in a state that all accelerators of a process share.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if case.fault == "bf16" else "no")
    prepared = stress_task(case, setting, arm, accelerator.device)
    config = SearchConfig(
        methods=["hyma"],
        connectors=["mlp1"],
        hidden=setting.hidden,
        seeds=[case.seed],
        steps=setting.steps[case.batch],
        batch=case.batch,
        pairs_per_visit=1,
        sampler=arm.sampler,
        optimiser=arm.optimiser,
        guard=arm.guard,
        evaluate_every=0,
        checkpoint_every=0,
    )
    counts: Counter[str] = Counter()
    scores: list[float] = []
    error = ""
    with _quiet_run() as run:
        search = Search(
            config=config,
            hypernetwork=arm.hypernetwork,
            objective=partial(Watched, arm.objective, counts),
            task=prepared.task,
            vision_means=prepared.vision_means,
            text_means=prepared.text_means,
            accelerator=accelerator,
            run=run,
            stop=StopRequest(),
        )
        try:
            found = search.run_method("hyma", "mlp1", case.seed, None)
            scores = found.ranking.scores["retrieval"]
            assert found.network is not None  # a trained method has one
            counts["escaped"] += any(not bool(p.isfinite().all()) for p in found.network.parameters())
        except (HymaError, ValueError) as problem:  # the guard gives up; scoring refuses features that are not finite
            error = f"{type(problem).__name__}: {problem}"
        counts.update(_logged(run.path / "log.jsonl"))
    return Result(
        scores,
        collapsed(scores, case.fault, setting.chance),
        counts["non_finite"],
        counts["skipped"],
        counts["escaped"],
        error,
        round(time.perf_counter() - began, 3),
    )


@contextmanager
def _quiet_run() -> Iterator[RunDirectory]:
    """A run directory that is gone afterwards; the training's own bar and messages are not shown."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        run = RunDirectory(Path(folder) / "run", {})
        try:
            yield run
        finally:
            run.close()


def _logged(path: Path) -> Counter[str]:
    """`skipped` steps, and steps that were taken on a non-finite loss (`escaped`)."""
    counts: Counter[str] = Counter()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        event = json.loads(line)
        counts["skipped"] += event["event"] == "skipped"
        if event["event"] == "step":
            counts["escaped"] += not all(map(math.isfinite, event["losses"].values()))
    return counts


def collapsed(scores: Sequence[float], fault: str, chance: float) -> bool:
    """Whether a pair that could learn ended near chance (percent), or no score came out."""
    judged = scores[:1] if fault == "constant" else scores
    return not judged or not all(math.isfinite(score) and score > TIMES_CHANCE * chance for score in judged)


def sweep(cases: Sequence[Case], setting: Setting, out: Path, device: str) -> dict[str, Any]:
    """Run the cases that the file does not hold yet, and write it after each.

    Raises:
        HymaError: the file holds runs of another configuration.
    """
    plain = {
        "setting": asdict(setting),
        "arms": {name: asdict(arm) for name, arm in arms().items()},
        "device": device,
        "versions": versions(),
    }
    config = json.loads(json.dumps(plain))
    table: dict[str, Any] = {"machine": measure.machine(device), "config": config, "runs": {}}
    if out.exists():
        table = json.loads(out.read_text(encoding="utf-8"))
        ran = {key.split("|")[2] for key in table["runs"]}
        table["config"]["arms"] = {
            arm: table["config"]["arms"][arm] if arm in ran else now for arm, now in config["arms"].items()
        }
        changed = [key for key in config if table["config"].get(key) != config[key]]
        if changed:
            raise HymaError(f"{out} holds runs with other {', '.join(changed)}; remove it, or set --out to a new file.")
    left = [case for case in cases if case.key not in table["runs"]]
    with tqdm(total=len(cases), initial=len(cases) - len(left), unit="run") as bar:
        for case in left:
            bar.set_description(f"{case.fault}, {case.batch}, {case.arm}")
            table["runs"][case.key] = asdict(run_once(case, setting, device))
            write_text(out, json.dumps(table, indent=1) + "\n")
            bar.update()
    return table


def shown(table: dict[str, Any], cases: Sequence[Case]) -> list[Table]:
    """Collapses of each fault and batch, scores of each fault and mix, and what the guard saw."""
    runs = {case: table["runs"][case.key] for case in cases}
    faults, batches, arms_shown = (
        list(dict.fromkeys(getattr(case, name) for case in cases)) for name in ("fault", "batch", "arm")
    )

    def of(arm: str, **wanted: object) -> list[dict[str, Any]]:
        keep = {"arm": arm, **wanted}
        return [run for case, run in runs.items() if all(getattr(case, name) == keep[name] for name in keep)]

    def collapses(arm: str, fault: str, batch: int) -> str:
        return str(sum(run["collapsed"] for run in of(arm, fault=fault, batch=batch)))

    def mean_score(arm: str, fault: str, mix: int) -> str:
        scores = [run["scores"][mix] for run in of(arm, fault=fault) if run["scores"]]
        return f"{sum(scores) / len(scores):.1f}" if scores else "-"

    seeds = len({case.seed for case in cases})
    steps, ways = table["config"]["setting"]["steps"], " -> ".join(arms_shown)
    first = Table(
        "fault", *(f"{b:,} x {steps[str(b)]} steps" for b in batches), title=f"collapsed runs of {seeds}: {ways}"
    )
    second = Table("fault", *MIXES, title=f"mean final R@10, percent, over seeds and batches: {ways}")
    for fault in faults:
        first.add_row(fault, *(" -> ".join(collapses(arm, fault, b) for arm in arms_shown) for b in batches))
        second.add_row(fault, *(" -> ".join(mean_score(arm, fault, mix) for arm in arms_shown) for mix in range(4)))
    for arm in arms_shown:
        spreads = [max(run["scores"]) - min(run["scores"]) for run in of(arm, fault="duplicate") if run["scores"]]
        if spreads:
            copies = f"{arm}: the four pairs of copies spread over {sum(spreads) / len(spreads):.1f} points in a run"
            second.caption = f"{second.caption}; {copies}" if second.caption else copies
    third = Table("arm", "runs", "collapsed", "non-finite losses", "skipped", "escaped", "errors", "minutes")
    for arm in arms_shown:
        every = of(arm)
        sums = [sum(run[name] for run in every) for name in ("collapsed", "non_finite", "skipped", "escaped")]
        errors, minutes = sum(bool(run["error"]) for run in every), sum(run["seconds"] for run in every) / 60
        third.add_row(arm, *map(str, (len(every), *sums, errors)), f"{minutes:.1f}")
    return [first, second, third]


def main() -> None:
    """Run the stress set, or go on with it, and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("stability.json"), help="JSON file of all runs")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each fault, batch and arm")
    parser.add_argument("--batches", type=int, nargs="+", choices=STEPS, default=list(STEPS), help="samples of a step")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="which part of the set")
    parser.add_argument("--arms", nargs="+", choices=get_args(ArmName), default=list(get_args(ArmName)), help="which")
    parser.add_argument("--quick", action="store_true", help="3 seeds, the two smallest batches")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    seeds, batches = (3, list(STEPS)[:2]) if arguments.quick else (arguments.seeds, arguments.batches)
    cases = [
        Case(fault, batch, arm, seed)
        for batch in batches
        for fault in arguments.faults
        for arm in arguments.arms
        for seed in range(seeds)
    ]
    try:
        table = sweep(cases, Setting(), arguments.out, arguments.device)
    except HymaError as problem:
        sys.exit(str(problem))
    console = Console(width=150)
    for part in shown(table, cases):
        console.print(part)


if __name__ == "__main__":
    main()

"""Does each method find the best pair, and at what price? All methods against one strong oracle, under one protocol.

    python benchmarks/fidelity.py --case vlm --quick        # a quarter of an hour on two cores
    python benchmarks/fidelity.py --case vlm --out fidelity_vlm.json

The oracle (`oracle.py`) is a grid tuned for each pair on validation. A budget is a share of the FLOPs of the plain grid
(one seed, no tuning, `search.grid_steps`); every contestant that trains is held to the same budgets, at the same batch
size. Contestants are tuned on another split by concept (`--split-seed 1`) than the one that is reported (2, the default
here; the README's own run uses 0).

Every training is a file in the run directory; killed and started again, the benchmark goes on where it was. It ends
with tables and a picture of rank correlation and score against cost. Stored features are read, and made if missing.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from tqdm import tqdm

from hyma_mllm import launch, mllm, vlm
from hyma_mllm.command import hide_loading_bars
from hyma_mllm.data.collection import collect, open_sources
from hyma_mllm.data.library import Library
from hyma_mllm.data.question_sets import read_questions
from hyma_mllm.data.token_library import TokenLibrary
from hyma_mllm.errors import HymaError
from hyma_mllm.hypernetwork.presets import HypernetworkConfig
from hyma_mllm.objectives.causal_lm import CausalObjective
from hyma_mllm.objectives.contrastive import ContrastiveObjective
from hyma_mllm.paths import write_text
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.search.budget import Budget
from hyma_mllm.search.config import PolishConfig
from hyma_mllm.search.free import labels_of
from hyma_mllm.search.interrupt import StopRequest
from hyma_mllm.search.ledger import Cost
from hyma_mllm.search.methods import Search
from hyma_mllm.search.mllm_prepare import prepare_mllm
from hyma_mllm.search.mllm_score import score_answers
from hyma_mllm.search.pair_loss import SearchTask
from hyma_mllm.search.placement import Placement
from hyma_mllm.search.prepare import prepare, split_rows

if TYPE_CHECKING:  # mypy takes the folder for a package; a script that is run finds what stands beside it
    from benchmarks import fidelity_report, measure, oracle, orders
    from benchmarks.contestants import ABLATIONS, CONTESTANTS, LANDMARKS, Contestant
else:
    import fidelity_report
    import measure
    import oracle
    import orders
    from contestants import ABLATIONS, CONTESTANTS, LANDMARKS, Contestant

FAMILIES = {
    ("vlm", False): ["linear", "mlp1"],
    ("vlm", True): ["linear"],
    ("mllm", False): ["mlp1"],
    ("mllm", True): ["mlp1"],
}
SHARES = {
    ("vlm", False): [0.0125, 0.025, 0.05, 0.1],
    ("vlm", True): [0.05],
    ("mllm", False): [0.0125, 0.025, 0.05, 0.1],
    ("mllm", True): [0.2],
}
MLLM_SIZES = {"steps": 40, "batch": 8, "validation": 60, "test": 150}
"""Of a quick MLLM case: the plain grid's steps and batch, validation questions, and those of the test that ranks.

Without `--quick` and `--steps` the recipe's own sizes and tests hold.
"""

RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass
class Bench:
    """What the contestants of one case run on.

    Attributes:
        make: (changes of search, scale of the logits, changes of hypernetwork) -> a search.
        unit: keeps what is finished.
        about: of the data, for the result.
        case: `vlm` or `mllm`.
    """

    make: Callable[..., Search]
    unit: oracle.Unit
    about: dict[str, Any]
    case: Literal["vlm", "mllm"] = "vlm"


def vlm_bench(arguments: argparse.Namespace, unit: oracle.Unit) -> Bench:
    """The built-in default's encoders and pictures, split anew."""
    config, _ = launch.parse(vlm.VLMConfig, RECIPES / "vlm.yaml", arguments=[])
    config.data, config.threads = replace(config.data, split_seed=arguments.split_seed), arguments.threads
    accelerator = launch.start(config)
    sources = open_sources(config.data)
    parts = collect(sources, config.data, arguments.run / "bad_rows.jsonl")
    split = split_rows(parts, config.data.validation, config.data.test, config.data.split_seed)
    if arguments.limit:
        split = replace(split, train=split.train[:: max(1, len(split.train) // arguments.limit)][: arguments.limit])
    images, texts = config.image_cards(), config.text_cards()
    prepared = prepare(images, texts, parts, split, Library(config.embedding, accelerator), config.standardise)
    prepared.task.zero_shot = []  # the pairs are ranked by retrieval alone
    run = RunDirectory(arguments.run / "log", {})
    labels = labels_of(prepared.rows)

    def make(changes: dict[str, Any], scale: float | None = None, hypernetwork: dict[str, Any] | None = None) -> Search:
        objective = replace(config.objective, scale=scale or config.objective.scale)
        # Polishing is a contestant of its own, whatever the recipe says.
        values: dict[str, Any] = {"methods": ["hyma"], "polish": PolishConfig(), "evaluate_every": 0} | changes
        searching = replace(config.search, checkpoint_every=0, **values)
        parts = asdict(config.hypernetwork) | (hypernetwork or {})
        return Search(
            searching, HypernetworkConfig(**parts), partial(ContrastiveObjective, objective), prepared.task,
            prepared.vision_means, prepared.text_means, accelerator, run, StopRequest(), labels=labels,
        )  # fmt: skip

    rows = {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)}
    grid = prepared.task.grid
    about = {"pairs": len(grid), "vision": grid.vision_ids, "text": grid.text_ids, "splits": rows}
    return Bench(make, unit, about)


def mllm_bench(arguments: argparse.Namespace, unit: oracle.Unit) -> Bench:
    """The built-in default's towers, LLMs and questions; Gemma joins with its terms accepted."""
    terms = ["--accept-terms", *arguments.accept_terms] if arguments.accept_terms else []
    config, _ = launch.parse(mllm.MLLMConfig, RECIPES / "mllm.yaml", mllm.SHORTCUTS, arguments=terms)
    config.data, config.threads = replace(config.data, split_seed=arguments.split_seed), arguments.threads
    if arguments.steps:
        first = next(iter(config.data.tests))
        config.data = replace(config.data, tests={first: arguments.test}, validation_limit=arguments.validation)
        config.search = replace(config.search, grid_steps=arguments.steps, batch=arguments.batch)
    config.towers, config.llms = arguments.towers or config.towers, arguments.llms or config.llms
    accelerator = launch.start(config)
    questions = read_questions(config.data, arguments.run / "bad_rows.jsonl")
    if arguments.limit:
        questions.train = questions.train[: arguments.limit]
    limits = config.llm.max_length, config.answer_batch, config.llm.longest_answer
    load = partial(config.llm.load, device=accelerator.device)
    library = TokenLibrary(config.tokens, accelerator)
    task = prepare_mllm(
        config.tower_cards(), config.llm_cards(), load, Placement(), questions, library, score_answers, *limits
    )
    run = RunDirectory(arguments.run / "log", {})

    def make(changes: dict[str, Any], scale: float | None = None, hypernetwork: dict[str, Any] | None = None) -> Search:
        values: dict[str, Any] = {"evaluate_every": 0, "checkpoint_every": 0, "methods": ["hyma"]} | changes
        parts = HypernetworkConfig(**asdict(config.hypernetwork) | (hypernetwork or {}))
        objective = partial(CausalObjective, config.objective)
        searching = replace(config.search, **values)
        return Search(searching, parts, objective, task, *task.means(), accelerator, run, StopRequest())

    splits = {"train": len(task.train), "validation": len(task.validation)}
    splits |= {name: len(rows) for name, rows in task.tests.items()}
    about = {
        "pairs": len(task.grid),
        "vision": task.grid.vision_ids,
        "text": task.grid.text_ids,
        "splits": splits,
        "blind": {name: task.blind(name) for name in task.tests},
    }
    return Bench(make, unit, about, "mllm")


def unscaled(task: SearchTask) -> SearchTask:
    """The same causal task, its connectors' outputs handed to every LLM as they are."""
    copied = copy.copy(task)
    copied.scales = lambda spec: [1.0] * len(task.grid)  # type: ignore[attr-defined]
    return copied


def compete(bench: Bench, one: Contestant, connector: str, seed: int, budget: Budget) -> dict[str, Any]:
    """One run of a contestant: its order of the pairs, its scores, its bill; of an MLLM its losses too."""
    changes = dict(one.search) | ({"budget": budget} if one.trains else {})
    search = bench.make(changes, None, one.hypernetwork)
    if one.rows < 1:
        drawn = torch.randperm(len(search.task.train), generator=torch.Generator().manual_seed(seed))
        few = search.task.train[drawn[: round(one.rows * len(drawn))]]
        search.task = replace(search.task, train=few)  # type: ignore[type-var]
    if not one.scaled:
        search.task = unscaled(search.task)
    looks: list[list[float]] = []
    if one.order == "checkpoints":
        search.task, looks = orders.watched(search.task)
    found = search.run_method(one.method, connector, seed, None)
    bill = found.ledger.total()
    training = found.ledger.phases.get("training")
    task, scores = next(iter(found.ranking.scores.items()), ("", None))
    record: dict[str, Any] = {
        "label": one.label,
        "connector": connector,
        "seed": seed,
        "budget_flops": budget.flops,
        "order_by": found.ranking.order_by or scores,
        "test": scores,
        "validation": oracle.validation(found) if scores else None,
        "flops": training.flops if training else bill.flops,
        "seconds": training.seconds if training else bill.seconds,
        "samples_per_pair": training.samples_per_pair if training else 0.0,
        "steps": training.steps if training else 0,
    }
    extra = Cost()
    if one.order == "checkpoints":
        record["order_by"] = orders.averaged(looks)
    elif one.order == "landmarks":
        record["order_by"], extra = orders.by_landmarks(search, connector, seed, found, LANDMARKS[bench.case])
    elif one.order == "prior":
        record["order_by"], extra = orders.with_prior(search, seed, found)
    record |= {"flops": record["flops"] + extra.flops, "seconds": record["seconds"] + extra.seconds}
    details = {"loss": "validation loss", "blind loss": "blind validation loss", "blind": f"blind {task}"}
    return record | {name: found.ranking.details[key] for name, key in details.items() if key in found.ranking.details}


def run_case(bench: Bench, contestants: Sequence[Contestant], arguments: argparse.Namespace) -> dict[str, Any]:
    """The oracle of every connector family, then every contestant at every budget and seed."""
    every = oracle.CANDIDATES[arguments.case, arguments.quick]
    candidates = [one for one in every if not arguments.candidates or one.name in arguments.candidates]
    oracles, runs = {}, []
    for connector in arguments.connectors:
        found = oracle.strong_oracle(bench.make, connector, candidates, range(100, 100 + arguments.seeds), bench.unit)
        oracles[connector] = asdict(found)
        todo = [
            (one, share, seed)
            for one in contestants
            if not one.families or connector in one.families
            for share in (arguments.shares if one.trains else [0.0])
            for seed in range(arguments.seeds if one.trains else 1)
        ]
        for one, share, seed in tqdm(todo, desc=f"{connector}: contestants", unit="run"):
            budget = Budget(flops=share * found.flops if share else None)
            name = f"{one.trained_as or one.label}-{connector}-{share:g}-{seed}"
            result = bench.unit(name, partial(compete, bench, one, connector, seed, budget))
            reading = orders.READINGS.get(one.order)
            order = reading(result) if reading else result["order_by"]
            runs.append(result | {"share": share, "label": one.label, "order_by": order})
    return {"oracle": oracles, "runs": runs}


def keeper(folder: Path) -> oracle.Unit:
    """Work is done once: its result lies in the folder under its name."""

    def unit(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = folder / f"{''.join(letter if letter.isalnum() or letter in '-.' else '_' for letter in name)}.json"
        if not path.exists():
            write_text(path, json.dumps(work()) + "\n")
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept

    return unit


def same_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keep what the finished trainings in the run directory depend on, and return it.

    Raises:
        HymaError: they are there, of other settings.
    """
    path, free = arguments.run / "settings.json", {"run", "out", "only", "ablation", "shares", "connectors", "threads"}
    wanted = {name: value for name, value in vars(arguments).items() if name not in free}
    if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8"))) != wanted:
        differ = ", ".join(sorted(key for key in kept | wanted if kept.get(key) != wanted.get(key)))
        raise HymaError(f"{arguments.run} holds trainings of other settings ({differ}); write another --run.")
    write_text(path, json.dumps(wanted) + "\n")
    return wanted


def main() -> None:
    """Run what has not run yet, and write tables and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["vlm", "mllm"], default="vlm")
    parser.add_argument("--quick", action="store_true", help="linear connectors, a small oracle, one budget")
    parser.add_argument("--run", type=Path, help="directory of finished trainings; default runs/fidelity-CASE")
    parser.add_argument(
        "--out", type=Path, help="JSON file for the numbers and the machine; the picture lies beside it"
    )
    parser.add_argument("--connectors", nargs="+", help="default linear and mlp1, for an MLLM mlp1")
    parser.add_argument("--shares", nargs="+", type=float, help="budgets, as shares of the plain grid's FLOPs")
    parser.add_argument("--ablation", action="store_true", help="HYMA with one thing changed, instead of rivals")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split-seed", type=int, default=2)
    parser.add_argument("--limit", type=int, default=0, help="training pictures; 0 for all")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 for all cores")
    parser.add_argument("--towers", nargs="+", default=[], help="of the MLLM case; the recipe's where left out")
    parser.add_argument("--llms", nargs="+", default=[], help="of the MLLM case; the recipe's where left out")
    parser.add_argument("--accept-terms", nargs="+", default=[], help="terms of use that you accept, e.g. gemma")
    for name in MLLM_SIZES:
        parser.add_argument(f"--{name}", type=int, default=0, help="of the MLLM case, instead of a quick one's")
    parser.add_argument(
        "--candidates", nargs="+", default=[], help="names of the oracle's, say words-lr0.015-wd0.01-x1"
    )
    parser.add_argument("--only", nargs="+", default=[], help="labels of contestants")
    arguments = parser.parse_args()
    arguments.connectors = arguments.connectors or FAMILIES[arguments.case, arguments.quick]
    arguments.shares = arguments.shares or SHARES[arguments.case, arguments.quick]
    sized = [f"--{name}" for name in MLLM_SIZES if getattr(arguments, name)]
    if sized and (arguments.case == "vlm" or not (arguments.quick or arguments.steps)):
        parser.error(f"{', '.join(sized)} would not be read: sizes are of --case mllm, with --quick or --steps")
    known = [one.name for one in oracle.CANDIDATES[arguments.case, arguments.quick]]
    if unknown := set(arguments.candidates) - set(known):
        parser.error(f"the oracle has no candidate {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    if arguments.case == "mllm" and (arguments.quick or arguments.steps):
        for name, size in MLLM_SIZES.items():
            setattr(arguments, name, getattr(arguments, name) or size)
    where = f"{arguments.case}{'-quick' if arguments.quick else ''}-split{arguments.split_seed}-rows{arguments.limit}"
    arguments.run = (arguments.run or Path("runs/fidelity")) / where
    try:
        settings = same_settings(arguments)
    except HymaError as problem:
        sys.exit(str(problem))
    hide_loading_bars()
    machine = measure.machine("cuda" if torch.cuda.is_available() else "cpu")
    bench = BENCHES[arguments.case](arguments, keeper(arguments.run / "units"))
    field = (ABLATIONS if arguments.ablation else CONTESTANTS)[arguments.case]
    chosen = [one for one in field if not arguments.only or one.label in arguments.only]
    found = run_case(bench, chosen, arguments)
    result = {
        "machine": machine,
        "case": arguments.case,
        "about": bench.about,
        "split_seed": arguments.split_seed,
        "settings": settings,
    } | found
    result["table"] = fidelity_report.lines(result)
    out = arguments.out or arguments.run / "fidelity.json"
    write_text(out, json.dumps(result, indent=1) + "\n")
    console = Console(width=200)
    for connector in arguments.connectors:
        console.print(fidelity_report.table(result, connector))
    print(f"Picture: {fidelity_report.picture(result, out.with_suffix('.png'))}")


BENCHES = {"vlm": vlm_bench, "mllm": mllm_bench}

if __name__ == "__main__":
    main()

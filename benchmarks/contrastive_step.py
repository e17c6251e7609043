"""What one contrastive step costs: side-by-side ratios of three claims, in one table from one run.

    python benchmarks/contrastive_step.py --out contrastive_step.json

(a) the `default` hypernetwork against the paper's dense head (`hyma`), a full optimiser step at equal batch;
(b) connectors stacked over pairs against one module after the other;
(c) tiled InfoNCE against full logits, forward and backward.

Every contestant runs in fresh processes; rivals alternate, and the best time of all rounds counts, so that what else
the machine does hits both alike; `measure.py` says how times and peaks are taken. The dense head limits the width of
the code in (a): by default it is the paper's 512, or the widest below it that fits in memory, and the table names it.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.hypernetwork.network import Hypernetwork
from hyma_mllm.hypernetwork.presets import HypernetworkConfig
from hyma_mllm.objectives.contrastive import ContrastiveConfig, ContrastiveObjective, info_nce
from hyma_mllm.pairs import PairGrid
from hyma_mllm.paths import write_text

if TYPE_CHECKING:  # mypy takes the folder for a package; a script that is run finds what stands beside it
    from benchmarks import measure
else:
    import measure

IMAGE_WIDTHS = (384, 768, 1024)
TEXT_WIDTHS = (384, 768, 768, 1024)
SPEC = ConnectorSpec(depth=1, hidden=1024)
SIMILARITY_WIDTH = 768
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One contestant.

    Attributes:
        kind: `hypernetwork`, `connectors` or `infonce`.
        variant: the preset; `stacked` or `single`; `tiled` or `full`.
        batch: samples a pair.
        code: width of the hypernetwork's code.
        device: `cpu` or `cuda`.
    """

    kind: str
    variant: str
    batch: int
    code: int
    device: str


@dataclass(frozen=True)
class Claim:
    """A line of the table: `ours` against `other`, and what the ratios must reach."""

    text: str
    ours: Case
    other: Case
    least_speedup: float | None = None
    least_memory_ratio: float | None = None


def claims(batch: int, code: int, device: str) -> list[Claim]:
    """All that is claimed; a speed-up of 1/1.3 is a time of at most 1.3 times."""

    def case(kind: str, variant: str, size: int = batch) -> Case:
        return Case(kind, variant, size, code, device)

    pairs = len(IMAGE_WIDTHS) * len(TEXT_WIDTHS)
    found = [
        Claim(
            f"(a) default | dense head, {pairs} pairs, batch {batch}, code {code}",
            case("hypernetwork", "default"),
            case("hypernetwork", "hyma"),
            least_speedup=4.0,
        ),
        Claim(
            f"(b) stacked | one by one, {pairs} pairs, batch {batch}",
            case("connectors", "stacked"),
            case("connectors", "single"),
        ),
    ]
    for size in (4096, 16384):
        ours, other = case("infonce", "tiled", size), case("infonce", "full", size)
        found.append(Claim(f"(c) tiled | full logits, batch {size:,}", ours, other, 1 / 1.3, 10.0))
    return found


def unit_rows(*shape: int, device: str) -> Tensor:
    """Random unit vectors, float32."""
    return F.normalize(torch.randn(*shape, device=device), dim=-1)


def hypernetwork_step(case: Case) -> Step:
    """Predict all connectors, map the texts, InfoNCE, backward, AdamW."""
    vision, text = (tuple(f"{kind}{n}" for n in range(len(w))) for kind, w in (("v", IMAGE_WIDTHS), ("t", TEXT_WIDTHS)))
    grid = PairGrid(vision, IMAGE_WIDTHS, text, TEXT_WIDTHS)
    config = HypernetworkConfig(preset="hyma" if case.variant == "hyma" else "default", trunk=[128, case.code])
    network = Hypernetwork(grid, SPEC, config).to(case.device)
    objective = ContrastiveObjective(ContrastiveConfig())
    optimiser = torch.optim.AdamW(network.parameters(), fused=True)
    images = [unit_rows(case.batch, width, device=case.device) for width in IMAGE_WIDTHS]
    texts = [unit_rows(case.batch, width, device=case.device) for width in TEXT_WIDTHS]

    def step() -> None:
        losses = []
        for group in network(range(len(grid))):
            pairs = [grid.pair(int(index)) for index in group.pairs]
            mapped = connectors.apply(SPEC, group.params, torch.stack([texts[pair.text] for pair in pairs]))
            losses.append(objective(torch.stack([images[pair.vision] for pair in pairs]), mapped))
        torch.cat(losses).mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()

    return step


def connectors_step(case: Case) -> Step:
    """Independent MLP_1 connectors of one shape, 768 to 768: forward, backward to the weights, AdamW."""
    count, width = len(IMAGE_WIDTHS) * len(TEXT_WIDTHS), SIMILARITY_WIDTH
    x, pull = (unit_rows(count, case.batch, width, device=case.device) for _ in range(2))
    if case.variant == "stacked":
        params = connectors.initial(SPEC, (width, width), count, torch.Generator(case.device))
        weights = [weight.requires_grad_() for weight in params.values()]
    else:
        modules = [connectors.module(SPEC, (width, width)).to(case.device) for _ in range(count)]
        weights = [weight for module in modules for weight in module.parameters()]
    optimiser = torch.optim.AdamW(weights, fused=True)

    def step() -> None:
        if case.variant == "stacked":
            (connectors.apply(SPEC, params, x) * pull).sum().backward()  # type: ignore[no-untyped-call]
        else:
            for module, own, own_pull in zip(modules, x, pull, strict=True):
                (module(own) * own_pull).sum().backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def infonce_step(case: Case) -> Step:
    """One pair's loss and its gradient to the texts; images are frozen, as in training."""
    images = unit_rows(1, case.batch, SIMILARITY_WIDTH, device=case.device)
    texts = F.normalize(images + unit_rows(1, case.batch, SIMILARITY_WIDTH, device=case.device), dim=-1)
    texts.requires_grad_()
    own = torch.arange(case.batch, device=case.device)

    def tiled() -> None:
        info_nce(images, texts, 100.0).sum().backward()  # type: ignore[no-untyped-call]
        texts.grad = None

    def full() -> None:
        logits = 100.0 * images[0] @ texts[0].T
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        loss.backward()  # type: ignore[no-untyped-call]
        texts.grad = None

    return tiled if case.variant == "tiled" else full


def measured(case: Case, seconds: float) -> dict[str, float]:
    """Best step time and peak bytes of one contestant, in this process."""
    torch.manual_seed(0)
    build = {"hypernetwork": hypernetwork_step, "connectors": connectors_step, "infonce": infonce_step}[case.kind]
    before = measure.start_of_peak(case.device)
    step = build(case)
    if case.kind == "infonce":
        # Its inputs are the same for both and no part of the claim (the others own weights), and neither is the code of
        # the libraries, which is loaded at its first use.
        build(replace(case, batch=64))()
        before = measure.start_of_peak(case.device)
    measure.fastest(step, 0.0, case.device)  # the first step is never the fastest
    best = measure.fastest(step, seconds, case.device)
    return {"seconds": best, "peak_bytes": measure.peak(case.device) - before}


def compare(claim: Claim, rounds: int, seconds: float) -> dict[str, Any]:
    """Both contestants in turn, the best time of all rounds and the peak, and their ratios."""
    sides = {"ours": claim.ours, "other": claim.other}
    times = [
        {side: measure.for_time(__file__, asdict(case), seconds)["seconds"] for side, case in sides.items()}
        for _ in range(rounds)
    ]
    best = {
        side: {
            "seconds": min(found[side] for found in times),
            "peak_bytes": measure.for_peak(__file__, asdict(case))["peak_bytes"],
        }
        for side, case in sides.items()
    }
    speedup = best["other"]["seconds"] / best["ours"]["seconds"]
    memory = best["other"]["peak_bytes"] / best["ours"]["peak_bytes"]
    met = speedup >= (claim.least_speedup or 0) and memory >= (claim.least_memory_ratio or 0)
    return {**asdict(claim), **{f"{side}_found": best[side] for side in best}} | {
        "speedup": speedup,
        "memory_ratio": memory,
        "met": met,
    }


def fitting_code_width(device: str) -> int:
    """The paper's code of 512, or the widest below it whose dense head trains in 85 % of the free memory."""
    layers = {layer for text in TEXT_WIDTHS for image in IMAGE_WIDTHS for layer in SPEC.layers(text, image)}
    weights = sum(layer.fan_out * (layer.fan_in + 1) for layer in layers)
    bytes_per_parameter = 4 * 4  # float32 weight, gradient and two moments
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    return next((code for code in (512, 256, 128) if code * weights * bytes_per_parameter < free * 0.85), 64)


def table(rows: list[dict[str, Any]], where: dict[str, Any]) -> Table:
    """All ratios; ours before the bar, the other behind it."""
    lines = Table(title=f"{where['gpu'] or where['cpu']}, {where['threads']} threads, torch {where['torch']}")
    for name in ("ours | other", "s a step", "peak MB", "speed-up", "memory ratio", "target", "met"):
        lines.add_column(name, justify="left" if name == "ours | other" else "right")
    for row in rows:
        ours, other = row["ours_found"], row["other_found"]
        speed, memory = row["least_speedup"], row["least_memory_ratio"]
        wanted = [f"{name} {limit:.2f}" for name, limit in (("speed", speed), ("memory", memory)) if limit is not None]
        lines.add_row(
            row["text"],
            f"{ours['seconds']:.3f} | {other['seconds']:.3f}",
            f"{ours['peak_bytes'] / 1e6:.0f} | {other['peak_bytes'] / 1e6:.0f}",
            f"{row['speedup']:.2f}",
            f"{row['memory_ratio']:.1f}",
            ", ".join(wanted) or "-",
            ("yes" if row["met"] else "NO") if wanted else "-",
        )
    return lines


def main() -> None:
    """Measure one case (in a child process) or all claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers and the machine")
    parser.add_argument("--batch", type=int, default=256, help="samples a pair in (a) and (b)")
    parser.add_argument("--code", type=int, help="width of the code; by default 512 or what fits in memory")
    parser.add_argument("--rounds", type=int, default=2, help="fresh processes per contestant")
    parser.add_argument("--seconds", type=float, default=3.0, help="least time measured per process")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measured(Case(**json.loads(arguments.case)), arguments.seconds)))
        return
    wanted = claims(arguments.batch, arguments.code or fitting_code_width(arguments.device), arguments.device)
    where = measure.machine(arguments.device)
    rows = [compare(claim, arguments.rounds, arguments.seconds) for claim in wanted]
    if arguments.out:
        write_text(arguments.out, json.dumps({"machine": where, "claims": rows}, indent=2) + "\n")
    Console(width=150).print(table(rows, where))


if __name__ == "__main__":
    main()

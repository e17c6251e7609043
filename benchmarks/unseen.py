"""Connectors of an encoder that was never trained: predicted from nothing, and adapted by a few samples.

    OMP_NUM_THREADS=1 python benchmarks/unseen.py --threads 1 --out unseen.json

The built-in default's 7 image and 4 text encoders. Each is left out in turn; a hypernetwork learns all pairs of the
others, and then meets the newcomer with all of its partners and 0, 32, 1,000 or all samples (pictures with their
captions, of the training split). Linear connectors, score: mean of both directions' R@10 on the test split.

What every column may use besides its samples: the trained hypernetwork, and *unpaired* training features of the
newcomer, pictures without captions or captions without pictures. A mean feature and the standardisation come from
them, and the bridge does (`search.unseen`). Ridge, the whitened form and a connector from scratch use the samples
alone; the strengths of the closed forms are chosen by leave-one-out on them and the rate of a connector from scratch
on a held-out quarter (at 1,000 samples or more both keep what suits 1,000; see `unseen_rivals.py`). These choices are
shared by the whole grid's pairs, which favours the rivals a little, and are not on their bill. How a prediction is
adapted was chosen on another split (`--split-seed 1`) than the reported one (2, the default here).

FLOPs of a cell are what the newcomer's pairs cost beyond the trained hypernetwork, whose own (without the closed forms
it starts from) are in `training_flops`. Every left-out encoder and seed is a file in the run directory; killed and
started again, the benchmark goes on.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from hyma_mllm.command import hide_loading_bars
from hyma_mllm.hypernetwork.network import Hypernetwork
from hyma_mllm.hypernetwork.newcomer import Adapted, Newcomer, Side, adopt
from hyma_mllm.hypernetwork.presets import HypernetworkConfig, parts
from hyma_mllm.paths import write_text
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.closed_form import STRENGTHS, ClosedForm
from hyma_mllm.search.method import all_states, own_flops
from hyma_mllm.search.task import VLMTask, captions_of
from hyma_mllm.search.unseen import Bridge, before, behind, fit_bridge

if TYPE_CHECKING:  # mypy takes the folder for a package; a script that is run finds what stands beside it
    from benchmarks import fidelity, measure, oracle, unseen_report, unseen_rivals
    from benchmarks.unseen_ground import LINEAR, Ground, Recipe, cell, fit, free, ground_of, recipe_for, scored
else:
    import fidelity
    import measure
    import unseen_report
    import unseen_rivals
    from unseen_ground import LINEAR, Ground, Recipe, cell, fit, free, ground_of, recipe_for, scored


@dataclass(frozen=True)
class Kind:
    """A hypernetwork, and how it is trained."""

    label: str
    network: HypernetworkConfig
    recipe: Recipe


def _config(**values: Any) -> HypernetworkConfig:
    return HypernetworkConfig(trunk=[128, 64], **values)


FEATURES = Kind(
    "hypernetwork, features condition",
    _config(condition="features", base="shape"),
    Recipe(24, 5e-3, "round"),
)
FACTORED = Kind("hypernetwork, factored condition", _config(), Recipe(24, 5e-3, "round"))
CLOSED = Kind("hypernetwork on closed forms", _config(preset="closed-form"), Recipe(16, 3e-4, "round"))

ADAPTATION = {
    "code": {32: Recipe(20, 5e-2), 1000: Recipe(10, 1e-1)},
    "bridge": {32: Recipe(10, 3e-3), 1000: Recipe(10, 3e-3)},
}
"""What is adapted (a guessed code with deltas, deltas over a bridge) -> samples -> how; more samples as the most."""

DEFAULT = STRENGTHS["whitened"]
"""Of the package's closed forms: a whitened rival has it, beside the one whose strength its samples choose."""

BRIDGED = "hypernetwork's connectors over a bridge"
BRIDGED_FORM = "whitened forms over a bridge"
SHORT_BRIDGE = "hypernetwork's connectors over a bridge of the samples alone"


def shelf(ground: Ground, kind: Kind, side: Side, number: int, seed: int) -> tuple[Hypernetwork, float]:
    """The hypernetwork of all pairs without this model, and the FLOPs of its training, not of its starts."""
    kept = [model for model in range(ground.models(side)) if model != number]
    task = ground.part(side, kept)
    rest = [pair.index for pair in ground.task.grid.pairs() if pair.index not in ground.pairs(side, number)]
    closed = parts(kind.network, 0).base == "closed_form"
    means = {each: list(found) for each, found in ground.means.items()}
    means[side] = [means[side][model] for model in kept]
    network = Hypernetwork(
        task.grid, LINEAR, kind.network, means["vision"], means["text"], seed,
        starts=[ground.starts[pair] for pair in rest] if closed else None,
    )  # fmt: skip
    return network, fit(ground, task, network, kind.recipe, seed, own_flops(network))


def adapted(
    ground: Ground, source: nn.Module, task: VLMTask, samples: int, seed: int, recipes: Mapping[int, Recipe],
    own: Callable[[Sequence[int]], float],
) -> tuple[nn.Module, float]:  # fmt: skip
    """Code and deltas of a prediction after the samples, and the FLOPs."""
    network = Adapted(source, task.grid, LINEAR, seed=seed)
    fewer = replace(task, train=ground.rows(samples, seed))
    recipe = recipe_for(len(fewer.train), recipes)
    flops = fit(ground, fewer, network, recipe, seed, lambda pairs: own(pairs) + network.step_flops(pairs, task.grid))
    return network, flops


def predicted(
    ground: Ground, kind: Kind, network: Hypernetwork, newcomer: Newcomer, task: VLMTask, columns: Sequence[int],
    seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """The prediction from nothing, and after each number of samples."""
    source = adopt(network, newcomer, seed=seed)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        source(range(len(task.grid)))
    cells = [cell(kind.label, "0", scored(source, task), float(counter.get_total_flops()))]
    for samples in columns:
        source = adopt(network, newcomer, seed=seed)
        found, flops = adapted(ground, source, task, samples, seed, ADAPTATION["code"], own_flops(source))
        cells.append(cell(kind.label, samples, scored(found, task), flops))
    return cells


def bridge_of(ground: Ground, side: Side, number: int, donor: int, pictures: Tensor) -> Bridge:
    """From the left-out model to a trained one, by pictures or by their captions."""
    if side == "vision":
        return fit_bridge(ground.task.images[number][pictures], ground.task.images[donor][pictures])
    captions, _ = captions_of(ground.task.first_caption, pictures)
    return fit_bridge(ground.task.texts[number][captions], ground.task.texts[donor][captions])


def borrowed(states: Sequence[dict[str, Tensor]], bridge: Bridge, side: Side, task: VLMTask) -> tuple[nn.Module, float]:
    """A frozen bank of the donor's connectors as the newcomer's, and the FLOPs."""
    move = behind if side == "vision" else before
    bank = ConnectorBank(task.grid, LINEAR, 0, [move(state, bridge) for state in states]).requires_grad_(False)
    products = sum(2.0 * bridge.weight.numel() * state["0.weight"].shape[1 if side == "vision" else 0]
                   for state in states)  # fmt: skip
    return bank, bridge.flops + products


def over_bridges(
    ground: Ground, network: Hypernetwork, side: Side, number: int, donor: int, task: VLMTask, columns: Sequence[int],
    seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """What the most similar trained model lends, before and after the samples."""
    position = donor - (donor > number)
    rest = network.grid
    lent = all_states(network, len(rest))
    mine = [lent[pair.index] for pair in rest.pairs() if (pair.vision if side == "vision" else pair.text) == position]
    whole = bridge_of(ground, side, number, donor, ground.task.train)
    bank, paid = borrowed(mine, whole, side, task)
    cells = [cell(BRIDGED, "0", scored(bank, task), paid)]
    forms, form_paid = borrowed([ground.starts[pair] for pair in ground.pairs(side, donor)], whole, side, task)
    cells.append(cell(BRIDGED_FORM, "0", scored(forms, task), form_paid))
    for samples in columns:
        found, flops = adapted(ground, bank, task, samples, seed, ADAPTATION["bridge"], free)
        cells.append(cell(BRIDGED, samples, scored(found, task), paid + flops))
        if samples:
            short = bridge_of(ground, side, number, donor, ground.rows(samples, seed))
            lean, short_paid = borrowed(mine, short, side, task)
            cells.append(cell(SHORT_BRIDGE, samples, scored(lean, task), short_paid))
    return cells


def leave_out(
    ground: Ground, side: Side, number: int, columns: Sequence[int], strengths: dict[int, dict[str, float]], seed: int
) -> dict[str, Any]:
    """Everything that is predicted for one left-out model with one seed."""
    grid, task = ground.task.grid, ground.part(side, [number])
    ids, widths = (grid.vision_ids, grid.vision_widths) if side == "vision" else (grid.text_ids, grid.text_widths)
    others = [model for model in range(len(ids)) if model != number]
    donor = max(others, key=lambda model: float(ground.likeness[side][number, model]))
    newcomer = Newcomer(side, ids[number], widths[number], ids[donor], ground.means[side][number])
    known = widths[number] in {widths[model] for model in others}
    cells, paid = [], {}
    for kind in (FEATURES, FACTORED) if known else ():
        network, paid[kind.label] = shelf(ground, kind, side, number, seed)
        cells += predicted(ground, kind, network, newcomer, task, columns, seed)
    network, paid[CLOSED.label] = shelf(ground, CLOSED, side, number, seed)
    for samples in columns:
        states, flops = ground.forms(samples, seed, strengths[samples]["whitened"])
        mine = [states[pair] for pair in ground.pairs(side, number)]
        source = adopt(network, newcomer, mine, seed)
        cells.append(cell(CLOSED.label, samples, scored(source, task), flops * len(mine) / len(states)))
    cells += over_bridges(ground, network, side, number, donor, task, columns, seed)
    return {
        "side": side, "model": ids[number], "donor": ids[donor], "trained_width": known, "seed": seed,
        "cells": cells, "training_flops": paid,
    }  # fmt: skip


def run(ground: Ground, unit: "oracle.Unit", columns: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    """All rivals and all left-out models, seed by seed."""
    grid = ground.task.grid
    looked = [pair.index for pair in grid.pairs() if pair.text == pair.vision % len(grid.text_ids)]
    rivals, newcomers = [], []
    sides: tuple[Side, ...] = ("vision", "text")
    models = [(side, number) for side in sides for number in range(ground.models(side)) if ground.models(side) > 1]
    with tqdm(total=len(seeds) * (len(models) + 4 * len(columns)), desc="unseen", unit="part") as bar:
        for seed in seeds:
            strengths: dict[int, dict[str, float]] = {}
            for samples in columns:
                most = samples or max(columns)
                work = partial(unseen_rivals.choose_strengths, ground.task, ground.rows(most, seed), looked)
                strengths[samples] = unit(f"strengths-{most}-{seed}", work)
                forms: list[tuple[str, ClosedForm, float]] = [
                    ("ridge", "ridge", strengths[samples]["ridge"]),
                    ("whitened", "whitened", strengths[samples]["whitened"]),
                    (f"whitened, strength {DEFAULT:g}", "whitened", DEFAULT),
                ]
                for label, kind, strength in forms:
                    work = partial(unseen_rivals.closed_rival, ground, label, kind, samples, seed, strength)
                    # From all samples no seed draws anything: what is computed once serves all.
                    which = f"{seed}" if samples else f"strength{strength:g}"
                    rivals.append(unit(f"{label}-{samples}-{which}", work) | {"seed": seed})
                    bar.update()
                work = partial(unseen_rivals.from_scratch, ground, samples, seed)
                rivals.append(unit(f"scratch-{samples}-{seed}", work) | {"seed": seed})
                bar.update()
            for side, number in models:
                left = partial(leave_out, ground, side, number, columns, strengths, seed)
                newcomers.append(unit(f"{side}-{number}-{seed}", left))
                bar.update()
    return {"rivals": rivals, "newcomers": newcomers}


def main() -> None:
    """Run what has not run yet, and write table, numbers and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/unseen"), help="directory of finished parts")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers; the picture lies beside it")
    parser.add_argument("--samples", nargs="+", type=int, default=[32, 1000, 0], help="of adaptation; 0 takes all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split-seed", type=int, default=2)
    parser.add_argument("--limit", type=int, default=0, help="training pictures; 0 for all")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 for all cores")
    arguments = parser.parse_args()
    hide_loading_bars()
    arguments.run = arguments.run / f"split{arguments.split_seed}-rows{arguments.limit}"
    bench = fidelity.vlm_bench(arguments, fidelity.keeper(arguments.run / "units"))
    found = run(ground_of(bench.make), bench.unit, arguments.samples, range(arguments.seeds))
    about = bench.about | {"split_seed": arguments.split_seed}
    result = {"machine": measure.machine("cpu"), "about": about, **found}
    result["table"] = unseen_report.lines(result)
    out = arguments.out or arguments.run / "unseen.json"
    write_text(out, json.dumps(result, indent=1) + "\n")
    for group in unseen_report.GROUPS:
        Console(width=150).print(unseen_report.table(result, group))
    print(f"Picture: {unseen_report.picture(result, out.with_suffix('.png'))}")


if __name__ == "__main__":
    main()

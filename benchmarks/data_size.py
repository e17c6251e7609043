"""Where does the hypernetwork win, as a function of data and depth? Every contestant on 500, 1,000 and all pictures.

    python benchmarks/data_size.py --out benchmarks/results/data_size.json

Every size trains on an even subset of the training pictures of one split, and is scored on the whole test part (text to
image R@10). HYMA takes 16 steps, the grid its whole budget, the constrained grid the FLOPs of HYMA. Shown are the mean
score over all pairs, and that of the pair which a contestant's own validation scores hand over. Every training is a
file in the run directory; killed and started again, the benchmark goes on.
"""

import argparse
import json
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from hyma_mllm.command import hide_loading_bars
from hyma_mllm.paths import write_text
from hyma_mllm.search.budget import Budget
from hyma_mllm.search.ranking import interval

if TYPE_CHECKING:  # mypy takes the folder for a package; a script that is run finds what stands beside it
    from benchmarks import fidelity, measure
    from benchmarks.contestants import NO_CLOSED_FORM, Contestant
else:
    import fidelity
    import measure
    from contestants import NO_CLOSED_FORM, Contestant

HYMA = Contestant("hyma", "hyma", {"steps": 16})
CONTESTANTS = (
    HYMA,
    NO_CLOSED_FORM,
    Contestant("grid", "grid"),
    Contestant("constrained grid", "constrained-grid"),
    Contestant("ridge", "ridge", trains=False),
    Contestant("whitened", "whitened", trains=False),
    Contestant("consensus", "consensus", trains=False),
)
SHOWN = (("mean", "mean over all pairs, R@10"), ("handed_over", "the pair handed over, R@10"))


def run_size(limit: int, arguments: Namespace) -> dict[str, Any]:
    """All contestants, families and seeds on this many training pictures (0: all)."""
    folder: Path = arguments.run / f"rows{limit}"
    given = Namespace(split_seed=arguments.split_seed, threads=arguments.threads, run=folder, limit=limit)
    unit = fidelity.keeper(folder / "units")
    bench = fidelity.vlm_bench(given, unit)
    rows = bench.about["splits"]["train"]
    todo = [
        (connector, seed, one)
        for connector in arguments.connectors
        for seed in range(arguments.seeds)
        for one in CONTESTANTS
        if one.trains or not seed
    ]
    runs, paid = [], dict[tuple[str, int], float]()
    for connector, seed, one in tqdm(todo, desc=f"{rows} pictures", unit="run"):
        budget = Budget(flops=paid[connector, seed]) if one.method == "constrained-grid" else Budget()
        work = partial(fidelity.compete, bench, one, connector, seed, budget)
        found = unit(f"{one.label}-{connector}-{seed}", work)
        if one == HYMA:
            paid[connector, seed] = found["flops"]
        runs.append(found)
    return {"pictures": rows, "splits": bench.about["splits"], "runs": runs}


def lines(sizes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each size, family and contestant: scores over seeds with 95 % intervals, and the mean bill."""
    found = []
    for size in sizes:
        for connector, label in dict.fromkeys((run["connector"], run["label"]) for run in size["runs"]):
            same = [run for run in size["runs"] if (run["connector"], run["label"]) == (connector, label)]
            chosen = [run["test"][int(np.argmax(run["validation"]))] for run in same]
            found.append(
                {
                    "pictures": size["pictures"],
                    "connector": connector,
                    "label": label,
                    "mean": interval([float(np.mean(run["test"])) for run in same]),
                    "handed_over": interval(chosen),
                    "flops": float(np.mean([run["flops"] for run in same])),
                }
            )
    return found


def table(found: Sequence[dict[str, Any]]) -> Table:
    """A row for each family and contestant, a column for each size."""
    pictures = list(dict.fromkeys(line["pictures"] for line in found))
    result = Table(title="R@10, mean over all pairs | of the pair handed over")
    for name in ("connector", "method", *(f"{count:,} pictures" for count in pictures)):
        result.add_column(name, justify="left" if name in ("connector", "method") else "right")
    for connector, label in dict.fromkeys((line["connector"], line["label"]) for line in found):
        same = {line["pictures"]: line for line in found if (line["connector"], line["label"]) == (connector, label)}
        cells = [f"{same[count]['mean'][0]:.1f} | {same[count]['handed_over'][0]:.1f}" for count in pictures]
        result.add_row(connector, label, *cells)
    return result


def picture(found: Sequence[dict[str, Any]], path: Path) -> Path:
    """Scores against the number of training pictures, a column for each family."""
    import matplotlib.pyplot as plt

    connectors = list(dict.fromkeys(line["connector"] for line in found))
    size = (5.0 * len(connectors), 7.5)
    figure, axes = plt.subplots(
        2, len(connectors), figsize=size, squeeze=False, sharex=True, sharey="row", layout="constrained"
    )
    for column, connector in enumerate(connectors):
        for row, (key, title) in enumerate(SHOWN):
            axis = axes[row][column]
            for label in dict.fromkeys(line["label"] for line in found):
                same = [line for line in found if (line["connector"], line["label"]) == (connector, label)]
                points = [(line["pictures"], *line[key]) for line in same]
                counts, mean, low, high = map(np.array, zip(*points, strict=True))
                spread = np.nan_to_num(np.stack([mean - low, high - mean]))
                width = 2.5 if label == "hyma" else 1.2
                axis.errorbar(counts, mean, yerr=spread, marker="o", capsize=2, label=label, linewidth=width)
            axis.set_xscale("log")
            sizes = sorted({line["pictures"] for line in found})
            axis.set_xticks(sizes, [f"{count:,}" for count in sizes])
            axis.minorticks_off()
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.set_ylabel(title)
        axes[0][column].set_title(connector)
        axes[1][column].set_xlabel("training pictures")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main() -> None:
    """Run what has not run yet, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/data_size"), help="directory of finished trainings")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers and the machine; the picture beside it")
    parser.add_argument("--limits", nargs="+", type=int, default=[500, 1000, 0], help="training pictures; 0 for all")
    parser.add_argument("--connectors", nargs="+", default=["linear", "mlp1"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--split-seed", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 for all cores")
    arguments = parser.parse_args()
    hide_loading_bars()
    where = measure.machine("cpu")
    sizes = [run_size(limit, arguments) for limit in arguments.limits]
    found = lines(sizes)
    out = arguments.out or arguments.run / "data_size.json"
    result = {"machine": where, "split_seed": arguments.split_seed, "sizes": sizes, "table": found}
    write_text(out, json.dumps(result, indent=1) + "\n")
    Console(width=150).print(table(found))
    print(f"Picture: {picture(found, out.with_suffix('.png'))}")


if __name__ == "__main__":
    main()

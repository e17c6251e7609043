"""Tables and picture of `unseen.py`: score against samples, the mean over left-out models."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from hyma_mllm.search.ranking import Interval, interval

GROUPS = {True: "of a width that other trained models have", False: "of a width that no trained model has"}
"""Whether a left-out model's width was trained -> in words."""

MARKS = "os^vDP*Xhd"


def cells(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every score with its left-out model: that of a rival's pair counts for both of its models."""
    about = result["about"]
    found = []
    for one in result["newcomers"]:
        own = {key: one[key] for key in ("side", "model", "trained_width", "seed")}
        found += [own | cell for cell in one["cells"]]
        columns = len(about["text"])
        names = about["vision"] if one["side"] == "vision" else about["text"]
        number = names.index(one["model"])
        for rival in result["rivals"]:
            if rival["seed"] != one["seed"]:
                continue
            table = np.reshape(rival["scores"], (-1, columns))
            scores = table[number] if one["side"] == "vision" else table[:, number]
            share = len(scores) / len(rival["scores"])
            found.append(own | rival | {"scores": scores.tolist(), "flops": share * rival["flops"]})
    return found


def lines(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line for each group of models, method and number of samples.

    `score` is the mean over the left-out models, each model's being the mean over its pairs and seeds, with a 95 %
    interval where there are three models or more; `over seeds` is the same mean with an interval over the seeds;
    `models` has each model's own.
    """
    grouped: dict[tuple[bool, str, Any], list[dict[str, Any]]] = {}
    for cell in cells(result):
        grouped.setdefault((cell["trained_width"], cell["method"], cell["samples"]), []).append(cell)
    found = []
    for (trained, method, samples), members in grouped.items():
        models = {name: _mean(members, "model", name) for name in dict.fromkeys(one["model"] for one in members)}
        seeds = [_mean(members, "seed", seed) for seed in dict.fromkeys(one["seed"] for one in members)]
        found.append(
            {
                "trained_width": trained,
                "method": method,
                "samples": samples,
                "score": _bounded(list(models.values())),
                "over seeds": interval(seeds),
                "models": models,
                "flops": float(np.mean([one["flops"] for one in members])),
            }
        )
    return found


def _bounded(values: Sequence[float]) -> Interval:
    """Mean and interval; two values bound nothing (Student's t with one degree of freedom)."""
    return interval(values) if len(values) > 2 else Interval(float(np.mean(values)), math.nan, math.nan)


def _mean(members: Sequence[Mapping[str, Any]], key: str, value: Any) -> float:
    """Mean over models of the mean over pairs and seeds, of the members that have this value."""
    chosen = [one for one in members if one[key] == value]
    return float(np.mean([np.mean(one["scores"]) for one in chosen]))


def table(result: Mapping[str, Any], group: bool) -> Table:
    """Methods by samples."""
    here = [line for line in result["table"] if line["trained_width"] is group]
    sampled = [samples for line in result["table"] if isinstance(samples := line["samples"], int)]
    names = {"none": "0", **{f"{samples:,}": samples for samples in sorted({*sampled} - {0})}}
    names |= {"all": 0} if 0 in sampled else {}
    models = max((len(line["models"]) for line in here), default=0)
    found = Table(title=f"{models} left-out models {GROUPS[group]}")
    for name in ("method", *names):
        found.add_column(name, justify="left" if name == "method" else "right")
    for method in dict.fromkeys(line["method"] for line in here):
        row = {line["samples"]: line["score"] for line in here if line["method"] == method}
        found.add_row(method, *(_written(row[key]) if key in row else "" for key in names.values()))
    return found


def _written(value: Sequence[float]) -> str:
    mean, low, high = Interval(*value)
    return f"{mean:.1f}" + (f" ± {(high - low) / 2:.1f}" if high == high else "")


def picture(result: Mapping[str, Any], path: Path) -> Path:
    """Score against samples, a panel for each group of models; no samples stand at 4, left of a gap."""
    import matplotlib.pyplot as plt

    training = result["about"]["splits"]["train"]
    groups = [group for group in GROUPS if any(line["trained_width"] is group for line in result["table"])]
    figure, panels = plt.subplots(1, len(groups), figsize=(6.5 * len(groups), 5.5), squeeze=False, sharey=True)
    methods = list(dict.fromkeys(line["method"] for line in result["table"]))
    for axes, group in zip(panels[0], groups, strict=True):
        for number, method in enumerate(methods):
            here = [line for line in result["table"] if (line["trained_width"], line["method"]) == (group, method)]
            points = sorted((_place(line["samples"], training), *line["score"]) for line in here)
            if not points:
                continue
            at, mean, low, high = map(np.array, zip(*points, strict=True))
            spread = np.nan_to_num(np.stack([mean - low, high - mean]))
            shift = 1.04 ** (number - len(methods) / 2)
            axes.errorbar(
                at * shift, mean, yerr=spread, marker=MARKS[number % len(MARKS)], color=f"C{number}", label=method,
                capsize=2,
            )  # fmt: skip
        axes.set_xscale("log")
        ticks = sorted({_place(line["samples"], training) for line in result["table"]})
        axes.set_xticks(ticks, ["0" if tick == _place("0", training) else f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_title(f"left-out models {GROUPS[group]}", fontsize="medium")
        axes.set_xlabel("samples that show both sides")
    panels[0][0].set_ylabel("mean R@10 of both directions, %")
    by_label: dict[str, Any] = {}
    for axes in panels[0]:
        handles, labels = axes.get_legend_handles_labels()
        by_label |= dict(zip(labels, handles, strict=True))
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=3, fontsize="small")
    figure.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _place(samples: int | str, training: int) -> int:
    return 4 if samples == "0" else int(samples) or training

"""Tables and picture of `fidelity.py`: how far each ranking is from the oracle's, what it cost, what it hands over."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from hyma_mllm.search.ranking import Interval, ceiling, compare, interval

SHOWN = (("spearman", "Spearman"), ("weighted_kendall", "weighted Kendall"), ("ndcg@1", "NDCG@1"),
         ("ndcg@3", "NDCG@3"), ("ndcg@5", "NDCG@5"), ("regret", "regret"))  # fmt: skip
LEAST_SHOWN = 0.2
"""Rank correlations below this are drawn at it."""

LEAST_COST = 1e-4
"""Shares of the grid's cost below this are drawn at it."""

MARKS = "os^vDP*Xhd<>8pH"


def lines(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line for each connector family, contestant and budget, means over seeds with 95 % intervals.

    Of the oracle itself: one seed against the mean of the others, the ceiling of any method. `handed over` is the test
    score of the pair that a contestant's own validation scores put first, with its own connector, less the oracle's
    score of that very pair, and less the best of the closed forms there.
    """
    found = []
    for connector, oracle in result["oracle"].items():
        true = np.mean(oracle["scores"], axis=0)
        best = [float(np.max(row)) for row in oracle["scores"]]
        found.append(
            {
                "label": "strong oracle, seed against seed",
                "connector": connector,
                "share": 1.0,
                "cost": interval([oracle["own_flops"] / oracle["flops"]]),
                "seconds": interval([oracle["own_seconds"] / oracle["seconds"]]),
                "mean score": interval([float(np.mean(row)) for row in oracle["scores"]]),
                "best score": interval(best),
                **ceiling(oracle["scores"]),
            }
        )
        runs = [run for run in result["runs"] if run["connector"] == connector]
        closed = [run for run in runs if run["label"] in ("ridge", "whitened", "consensus", "words")]
        for label, share in dict.fromkeys((run["label"], run["share"]) for run in runs):
            same = [run for run in runs if (run["label"], run["share"]) == (label, share)]
            found.append(_line(label, share, same, oracle, true, closed))
    return found


def _line(
    label: str,
    share: float,
    runs: Sequence[Mapping[str, Any]],
    oracle: Mapping[str, Any],
    true: "np.ndarray[Any, Any]",
    closed: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    line: dict[str, Any] = {
        "label": label,
        "connector": runs[0]["connector"],
        "share": share,
        "cost": interval([run["flops"] / oracle["flops"] for run in runs]),
        "seconds": interval([run["seconds"] / oracle["seconds"] for run in runs]),
        **compare([run["order_by"] for run in runs], oracle["scores"]),
    }
    if "loss" in runs[0]:
        line["validation loss"] = interval([float(np.mean(run["loss"])) for run in runs])
    if runs[0]["test"] is not None:
        picks = [int(np.argmax(run["validation"])) for run in runs]
        line["mean score"] = interval([float(np.mean(run["test"])) for run in runs])
        line["best score"] = interval([max(run["test"]) for run in runs])
        line["handed over"] = interval([run["test"][pick] - true[pick] for run, pick in zip(runs, picks, strict=True)])
        if closed:
            line["over closed forms"] = interval(
                [run["test"][p] - max(c["test"][p] for c in closed) for run, p in zip(runs, picks, strict=True)]
            )
    return line


def table(result: Mapping[str, Any], connector: str) -> Table:
    """All lines of a connector family, cheapest first."""
    about = result["about"]
    lines_ = [line for line in result["table"] if line["connector"] == connector]
    found = Table(title=f"{connector}, {about['pairs']} pairs, {about['splits']['train']} training pictures")
    names = ["method", "cost, plain grid = 1", "seconds", *(name for _, name in SHOWN)]
    of_scores = ["mean score", "best score", "handed over", "over closed forms"]
    names += ["mean score", "best score", "handed over - oracle", "- closed forms"]
    losses = any("validation loss" in line for line in lines_)
    names += ["validation loss"] if losses else []
    for name in names:
        found.add_column(name, justify="left" if name == "method" else "right")
    for line in sorted(lines_, key=lambda line: (line["label"], line["share"])):
        values = [_written(line.get(key), 3 if key != "regret" else 1) for key, _ in SHOWN]
        values += [_written(line.get(key), 1) for key in of_scores]
        values += [_written(line.get("validation loss"), 2)] if losses else []
        found.add_row(line["label"], _ratio(line["cost"]), _ratio(line["seconds"]), *values)
    return found


def _ratio(value: Sequence[float]) -> str:
    return f"1/{1 / value[0]:.0f}" if 0 < value[0] < 0.67 else f"{value[0]:.2f}"


def _written(value: Sequence[float] | None, decimals: int) -> str:
    if value is None:
        return ""
    mean, low, high = Interval(*value)
    spread = f" ± {(high - low) / 2:.{decimals}f}" if high == high else ""
    return f"{mean:.{decimals}f}{spread}"


def picture(result: Mapping[str, Any], path: Path) -> Path:
    """Rank correlation and mean score against cost, a column for each connector family."""
    import matplotlib.pyplot as plt

    connectors = list(result["oracle"])
    size = (5.5 * len(connectors) + 3, 8)
    figure, axes = plt.subplots(2, len(connectors), figsize=size, squeeze=False, sharex=True)
    for column, connector in enumerate(connectors):
        here = [line for line in result["table"] if line["connector"] == connector]
        for row, (key, title) in enumerate(
            (("spearman", "Spearman with the strong oracle"), ("mean score", "mean score, %"))
        ):
            _panel(axes[row][column], here, key)
            axes[row][column].set_ylabel(title)
        axes[0][column].set_title(connector)
        axes[1][column].set_xlabel("training cost, share of the plain grid's FLOPs")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    figure.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _panel(axes: Any, here: Sequence[Mapping[str, Any]], key: str) -> None:
    """One line a contestant, one point a budget; the oracle's own as a band."""
    costs = [max(line["cost"][0], LEAST_COST) for line in here]
    axes.set_xscale("log")
    axes.set_xlim(min(costs) / 1.5, 1.5 * max(1.0, *costs))
    axes.grid(alpha=0.3)
    if key == "spearman":  # what ranks by chance stands at the lower edge
        axes.set_ylim(LEAST_SHOWN, 1.02)
    for number, label in enumerate(dict.fromkeys(line["label"] for line in here)):
        points = sorted((line["cost"][0], *line[key]) for line in here if line["label"] == label and key in line)
        if not points:
            continue
        if label.startswith("strong oracle"):
            _, mean, low, high = points[0]
            axes.axhline(mean, color="black", linestyle="--", label=label)
            axes.axhspan(low, high, color="black", alpha=0.08)
            continue
        cost, mean, low, high = map(np.array, zip(*points, strict=True))
        if key == "spearman":
            mean, low, high = (values.clip(LEAST_SHOWN) for values in (mean, low, high))
        spread = np.nan_to_num(np.stack([mean - low, high - mean]))
        axes.errorbar(
            np.maximum(cost, LEAST_COST), mean, yerr=spread, marker=MARKS[number % len(MARKS)], label=label, capsize=2,
            color=f"C{number % 10}", alpha=1.0 if label.startswith("hyma") else 0.6,
            linewidth=2.5 if label == "hyma" else 1.0, markersize=9 if label == "hyma" else 6,
            zorder=3 if label.startswith("hyma") else 2,
        )  # fmt: skip

"""How well a ranking of pairs agrees with the oracle grid: `python eval/ranking.py RUN --oracle OTHER/ranking.json`.

A ranking is a run directory, its `ranking.json`, or a csv with the columns vision, text, score and, where there are
several, seed. Pairs are matched by name, so the two files may list the models in different orders.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jsonargparse import auto_cli
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hyma_mllm import command
from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import UNREADABLE, reason
from hyma_mllm.paths import write_text
from hyma_mllm.report import format_interval
from hyma_mllm.search.ranking import METRICS, Interval, SearchResult, ceiling, compare, known

Pair = tuple[str, str]
SeedScores = list[dict[Pair, float]]
"""One entry a seed: pair -> score."""


@dataclass
class Scored:
    """The scores of one file: method -> seeds, and the name of its oracle (None for a csv)."""

    path: Path
    methods: dict[str, SeedScores]
    oracle: str | None = None


def ranking(
    ranking: Path,
    oracle: Path | None = None,
    connector: str = "linear",
    task: str = "retrieval",
    method: str | None = None,
    level: float = 0.95,
    out: Path | None = None,
) -> None:
    """Compare a ranking with the oracle grid: NDCG@1/3/5, Spearman, Kendall (weighted too), top-1 regret in points.

    Args:
        ranking: a run directory, a ranking.json, or a csv with the columns vision, text, score[, seed].
        oracle: the file to compare with, of the same three kinds; by default the oracle in `ranking` itself.
        connector: the connector family to read from a ranking.json.
        task: the task to read from a ranking.json.
        method: only this method of `ranking`; by default all.
        level: confidence of the intervals over seeds, between 0 and 1.
        out: JSON file for the same numbers.
    """
    if not 0 < level < 1:
        raise HymaError(f"level is {level}; give a confidence between 0 and 1, e.g. 0.95.")
    ours = read(ranking, connector, task)
    truth = read(oracle, connector, task) if oracle else ours
    if truth.oracle is None and oracle is None:
        raise HymaError(f"{ranking} is a csv and holds no oracle; name one with --oracle.")
    name = truth.oracle or next(iter(truth.methods))
    if name not in truth.methods:
        raise HymaError(f"{truth.path} holds no {name} scores for {connector} and {task}; name a file with --oracle.")
    chosen = [known(method, list(ours.methods), "method", str(ours.path))] if method else list(ours.methods)
    pairs = sorted(truth.methods[name][0])
    true = [in_order(scores, pairs, truth.path) for scores in truth.methods[name]]
    found: dict[str, dict[str, Interval]] = {}
    for each in chosen:
        if ours.path.resolve() == truth.path.resolve() and each == name:
            found[f"{each} (ceiling between seeds)"] = ceiling(true, level)
        else:
            scores = [in_order(scores, pairs, ours.path) for scores in ours.methods[each]]
            found[each] = compare(scores, true, level)
    show(found, f"{connector}, {task}: {len(pairs)} pairs against {name} of {truth.path}")
    if out:
        save(out, found, {"connector": connector, "task": task, "level": level, "pairs": len(pairs), "oracle": name})


def read(path: Path, connector: str, task: str) -> Scored:
    """What the rankings in a run directory, a ranking.json or a csv order the pairs by.

    Raises:
        HymaError: when the file is missing or broken, or lacks the connector or the task.
    """
    if path.suffix.lower() == ".csv":
        return Scored(path, {path.stem: read_csv(path)})
    path = path / "ranking.json" if path.is_dir() else path
    result = SearchResult.load(path)
    known(connector, result.connectors, "connector", str(path))
    known(task, result.tasks, "task", str(path))
    methods = {
        method: [dict(zip(result.pairs, scores, strict=True)) for scores in seeds]
        for method in result.methods
        if (seeds := result.ranks_by(method, connector, task))
    }
    return Scored(path, methods, result.oracle)


def read_csv(path: Path) -> SeedScores:
    """The scores in a csv with the columns vision, text, score and, where there are several, seed.

    Raises:
        HymaError: when it cannot be read, lacks a column, has a score that is no number, or lists a pair twice.
    """
    try:
        table = pd.read_csv(path, dtype={"vision": str, "text": str}, keep_default_na=False)
    except UNREADABLE as error:
        raise HymaError(
            f"{path} cannot be read as csv ({reason(error)}); name a file with vision,text,score."
        ) from error
    missing = [column for column in ("vision", "text", "score") if column not in table]
    if missing:
        raise HymaError(f"{path} has no column {missing[0]}; its first line must name vision,text,score.")
    seeds: dict[str, dict[Pair, float]] = {}
    rows = zip(table["vision"], table["text"], table["score"], table.get("seed", ["0"] * len(table)), strict=True)
    for line, (vision, text, score, seed) in enumerate(rows, start=2):
        number = pd.to_numeric(score, errors="coerce")
        if not math.isfinite(number):
            raise HymaError(f"{path}, line {line}: the score {score} is not a number; mend it.")
        scores = seeds.setdefault(str(seed), {})
        if (vision, text) in scores:
            raise HymaError(f"{path}, line {line}: {vision},{text} stands there twice for one seed; remove one.")
        scores[vision, text] = float(number)
    if not seeds:
        raise HymaError(f"{path} has no rows; give one vision,text,score a line.")
    return list(seeds.values())


def in_order(scores: dict[Pair, float], pairs: list[Pair], path: Path) -> list[float]:
    """Scores in the order of `pairs`.

    Raises:
        HymaError: when the file has a pair too few or too many.
    """
    if odd := sorted(set(pairs) ^ set(scores)):
        where = "lacks the oracle's" if odd[0] in pairs else "has, against the oracle, the further"
        raise HymaError(f"{path} {where} pair {','.join(odd[0])}; compare rankings of the same pairs.")
    return [scores[pair] for pair in pairs]


def show(found: dict[str, dict[str, Interval]], title: str) -> None:
    """Print the table; ± is half the interval over seeds."""
    table = Table("method", *METRICS, title=escape(title))
    for method, metrics in found.items():
        table.add_row(escape(method), *(format_interval(metrics.get(metric)) for metric in METRICS))
    Console().print(table)


def save(out: Path, found: dict[str, dict[str, Interval]], facts: dict[str, object]) -> None:
    """Write the same numbers as JSON; what is undefined (a bound of one seed) is null."""
    methods = {
        method: {
            metric: {key: value if math.isfinite(value) else None for key, value in interval._asdict().items()}
            for metric, interval in metrics.items()
        }
        for method, metrics in found.items()
    }
    write_text(out, json.dumps(facts | {"methods": methods}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    command.run(lambda: auto_cli(ranking))

"""What a run says of itself: the self-contained page `report.html`, the table at its end, the picture of its grid.

Everything is read back from the run directory (`ranking.json`, `ledger.json`, `log.jsonl`, `examples.json`), so that
the page can be written again at any time. All text is escaped, all pictures are inlined, nothing is linked.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from rich.markup import escape
from rich.table import Table

from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import parse_json
from hyma_mllm.paths import atomic_path, write_text
from hyma_mllm.report_answers import blind_rows, read_answers
from hyma_mllm.report_log import Log, read_log
from hyma_mllm.report_pictures import inlined
from hyma_mllm.report_plots import CostPoint, cost_figure, curves_figure, heat_map_figure, svg_uri
from hyma_mllm.search.ledger import Cost, Ledger, load_ledgers, shared_embedding
from hyma_mllm.search.ranking import METRICS, Interval, SearchResult, interval, known

FIRST_ROWS = 10


@dataclass
class CostRow:
    """One line of the cost table: means over seeds, the highest peak."""

    method: str
    connector: str
    seeds: int
    batch: int
    samples_per_pair: float
    steps: float
    training_flops: float
    evaluation_flops: float
    training_seconds: float
    evaluation_seconds: float
    peak_bytes: int


@dataclass
class RankedPair:
    """One line of a ranking: a pair in the order of one method, beside the oracle's."""

    place: int
    pair: str
    score: Interval
    oracle_place: int | None
    oracle_score: Interval | None


def write_report(run: Path) -> Path:
    """Write `report.html` into the run directory, from what the run left there.

    Args:
        run: the run directory. `log.jsonl` and `examples.json` may be missing; their sections then say so.

    Returns:
        The path of the page.

    Raises:
        HymaError: when `ranking.json`, `ledger.json` or `examples.json` is missing where it must be, or broken.
    """
    result = SearchResult.load(run / "ranking.json")
    ledgers = load_ledgers(run / "ledger.json")
    log = read_log(run / "log.jsonl")
    page = jinja2.Environment(
        loader=jinja2.PackageLoader("hyma_mllm"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page.filters["interval"] = format_interval
    page.filters |= {"flops": format_flops, "seconds": format_seconds, "bytes": format_bytes}
    rows = cost_rows(result, ledgers)
    html = page.get_template("report.html.j2").render(
        result=result,
        metrics=METRICS,
        seeds=sorted({ranking.seed for ranking in result.rankings}),
        sections=[
            _section(result, rows, task, connector)
            for task in result.tasks
            for connector in result.connectors
            if main_method(result, connector)
        ],
        scatters=[(task, svg_uri(cost_figure(_points(result, rows, task), result.oracle))) for task in result.tasks],
        costs=rows,
        embedding=shared_embedding(ledgers),
        curves=_curves(result, log),
        damaged=log.damaged,
        examples=read_examples(run),
        answered=read_answers(run),
        blind=_blind(result),
        sides=("vision tower", "LLM") if result.case == "mllm" else ("image encoder", "text encoder"),
        attribution=_attribution(result.data.get("attribution", [])),
        config=json.dumps(result.config, indent=2, sort_keys=True, ensure_ascii=False),
        first_rows=FIRST_ROWS,
    )
    path = run / "report.html"
    write_text(path, html)
    return path


def summary_table(result: SearchResult, ledgers: Sequence[Ledger]) -> Table:
    """What a run prints at its end: per task, connector and method the best pair, the agreement and the bill."""
    table = Table(title=f"{len(result.pairs)} pairs, compared with {result.oracle}")
    for heading in ("task", "method", "best pair"):
        table.add_column(heading, overflow="fold", min_width=14)
    for heading in ("score", "Spearman", "NDCG@5", "regret", "samples/pair", "FLOPs", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    bills = {(row.method, row.connector): row for row in cost_rows(result, ledgers)}
    for task in result.tasks:
        for connector in result.connectors:
            heading = f"{task}, {connector}"
            for method in result.methods:
                if ranks := result.ranks_by(method, connector, task):
                    agreement = result.agreement(method, connector, task)
                    table.add_row(
                        *(escape(heading), f"{method} (ceiling)" if method == result.oracle else method),
                        *_best(result, method, np.mean(ranks, axis=0), result.mean_scores(method, connector, task)),
                        *(format_interval(agreement.get(metric), 2) for metric in ("spearman", "ndcg@5", "regret")),
                        *_bill(bills.get((method, connector))),
                    )
                    heading = ""
            table.add_section()
    if (embedding := shared_embedding(ledgers)) is not None:
        table.caption = f"embedding, once for all methods: {format_seconds(embedding.seconds)}"
    return table


def heat_map(result: SearchResult, path: Path, task: str | None = None, connector: str | None = None) -> None:
    """Save the grid of one task as a PNG, the main method beside the oracle.

    Args:
        result: the search.
        path: where to.
        task: which task; the first by default.
        connector: which connector family; the first by default.

    Raises:
        HymaError: when the task or the connector is not in the result.
    """
    task = known(task or result.tasks[0], result.tasks, "task")
    connector = known(connector or result.connectors[0], result.connectors, "connector")
    figure = heat_map_figure(result, task, connector, _shown(result, connector)[:2])
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight", facecolor="white")


def main_method(result: SearchResult, connector: str) -> str | None:
    """The method that a table is ordered by: hyma if it ran, else the first other than the oracle, else the oracle.

    Methods without scores of their own are passed over.
    """
    ran = {ranking.method for ranking in result.rankings if ranking.connector == connector and ranking.scores}
    order = sorted(result.methods, key=lambda name: name != "hyma")
    return next((method for method in order if method in ran and method != "random"), None)


def cost_rows(result: SearchResult, ledgers: Sequence[Ledger]) -> list[CostRow]:
    """One line per method and connector of the result that has a ledger, seeds averaged."""
    rows = []
    for connector in result.connectors:
        for method in result.methods:
            chosen = [ledger for ledger in ledgers if (ledger.method, ledger.connector) == (method, connector)]
            if not chosen:
                continue
            training = [ledger.phases.get("training", Cost()) for ledger in chosen]
            evaluation = [ledger.phases.get("evaluation", Cost()) for ledger in chosen]
            rows.append(
                CostRow(
                    method=method,
                    connector=connector,
                    seeds=len(chosen),
                    batch=chosen[0].batch,
                    samples_per_pair=float(np.mean([cost.samples_per_pair for cost in training])),
                    steps=float(np.mean([cost.steps for cost in training])),
                    training_flops=float(np.mean([cost.flops for cost in training])),
                    evaluation_flops=float(np.mean([cost.flops for cost in evaluation])),
                    training_seconds=float(np.mean([cost.seconds for cost in training])),
                    evaluation_seconds=float(np.mean([cost.seconds for cost in evaluation])),
                    peak_bytes=max(ledger.total().peak_bytes for ledger in chosen),
                )
            )
    return rows


def format_interval(value: Interval | None, decimals: int = 3) -> str:
    """`0.961 ± 0.021`; without the half width where there is one seed, a dash where there is nothing."""
    if value is None or not math.isfinite(value.mean):
        return "–"
    mean = f"{value.mean:.{decimals}f}"
    return f"{mean} ± {value.high - value.mean:.{decimals}f}" if math.isfinite(value.high) else mean


def format_flops(value: float) -> str:
    """With a prefix: `24.9 T`."""
    for prefix, unit in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= unit:
            return f"{value / unit:.3g} {prefix}"
    return f"{value:.0f}"


def format_seconds(value: float) -> str:
    """`1 h 02 min`, `3 min 05 s` or `4.2 s`."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_bytes(value: float) -> str:
    """In MiB or GiB."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _best(result: SearchResult, method: str, ranks: np.ndarray[Any, Any], scores: Sequence[float]) -> tuple[str, str]:
    if method == "random":  # each seed trains other pairs, so a mean over seeds names none
        return "another in each seed", "–"
    best = int(np.argmax(ranks))
    return escape(" + ".join(result.pairs[best])), f"{scores[best]:.1f}" if scores else "–"


def _bill(row: CostRow | None) -> tuple[str, ...]:
    if row is None:
        return ("–",) * 3
    seconds = format_seconds(row.training_seconds + row.evaluation_seconds)
    return f"{row.samples_per_pair:,.0f}", format_flops(row.training_flops), seconds


def _shown(result: SearchResult, connector: str) -> list[str]:
    """The methods whose scores mean something, the main one first and the oracle beside it."""
    main = main_method(result, connector)
    ran = [name for name in result.methods if result.scores(name, connector, result.tasks[0]) and name != "random"]
    return sorted(ran, key=lambda name: 0 if name == main else 1 if name == result.oracle else 2)


def _section(result: SearchResult, rows: Sequence[CostRow], task: str, connector: str) -> dict[str, Any]:
    """One task with one connector family: its heat map, its ranking, and every method's agreement with the oracle."""
    main = main_method(result, connector) or result.oracle
    oracle_flops = next(
        (row.training_flops for row in rows if (row.method, row.connector) == (result.oracle, connector)), 0.0
    )
    flops = {row.method: row.training_flops for row in rows if row.connector == connector}
    return {
        "task": task,
        "connector": connector,
        "main": main,
        "heat_map": svg_uri(heat_map_figure(result, task, connector, _shown(result, connector))),
        "ranking": ranked_pairs(result, main, connector, task),
        "agreement": [
            (
                method,
                result.agreement(method, connector, task),
                f"{flops[method] / oracle_flops:.3g}" if oracle_flops and method in flops else "–",
            )
            for method in result.methods
            if result.ranks_by(method, connector, task)
        ],
    }


def ranked_pairs(result: SearchResult, method: str, connector: str, task: str) -> list[RankedPair]:
    """The pairs in the order of a method's mean over seeds, each with its score and what the oracle says of it.

    Empty when the method did not run for the connector.
    """
    scores = np.asarray(result.scores(method, connector, task))
    if not len(scores):
        return []
    ranks = np.asarray(result.ranks_by(method, connector, task))
    oracle = np.asarray(result.scores(result.oracle, connector, task))
    places = _places(oracle.mean(axis=0)) if len(oracle) else {}
    return [
        RankedPair(
            place=place,
            pair=" + ".join(result.pairs[index]),
            score=interval(scores[:, index].tolist()),
            oracle_place=places.get(index),
            oracle_score=interval(oracle[:, index].tolist()) if len(oracle) else None,
        )
        for index, place in _places(ranks.mean(axis=0)).items()
    ]


def _places(scores: np.ndarray[Any, Any]) -> dict[int, int]:
    """Pair index -> place from 1, best first, equal scores in grid order."""
    return {int(index): place for place, index in enumerate(np.argsort(-scores, kind="stable"), start=1)}


def _points(result: SearchResult, rows: Sequence[CostRow], task: str) -> list[CostPoint]:
    points = []
    for row in rows:
        if agreement := result.agreement(row.method, row.connector, task):
            seconds = row.training_seconds + row.evaluation_seconds if row.training_flops else 0.0
            points.append(CostPoint(row.method, row.connector, row.training_flops, seconds, agreement["spearman"]))
    return points


def _curves(result: SearchResult, log: Log) -> list[tuple[str, str]]:
    """(title, figure) of the main method's first seed, per connector family."""
    figures = []
    for connector in result.connectors:
        main = main_method(result, connector)
        ours = [curves for curves in log.curves if (curves.method, curves.connector) == (main, connector)]
        chosen = [curves for curves in ours if curves.losses or curves.scores]
        if chosen:
            first = min(chosen, key=lambda curves: curves.seed)
            figures.append((f"{main}, {connector}, seed {first.seed}", svg_uri(curves_figure(result, first))))
    return figures


def read_examples(run: Path) -> list[dict[str, Any]]:
    """`examples.json` with each picture inlined; a picture that is not there becomes None, and the page says so.

    Raises:
        HymaError: the file or one of its pictures is broken.
    """
    path = run / "examples.json"
    if not path.exists():
        return []
    try:
        return [
            {
                "kind": str(example["kind"]),
                "query": str(example["query"]),
                "image": inlined(run, example["image"]),
                "retrieved": [
                    {
                        "image": inlined(run, hit["image"]),
                        "caption": str(hit["caption"]),
                        "rank": int(hit["rank"]),
                        "right": bool(hit["right"]),
                    }
                    for hit in example["retrieved"]
                ],
            }
            for example in parse_json(path.read_bytes())
        ]
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise HymaError(f"{path} is not a list of retrievals ({error}); remove it, or run the search again.") from error


def _blind(result: SearchResult) -> list[tuple[str, list[dict[str, Any]]]]:
    """(heading, rows of `blind_rows`) of the main method, per connector family; empty in the VLM case."""
    if result.case != "mllm":
        return []
    mains = [(main_method(result, connector), connector) for connector in result.connectors]
    return [(f"{main}, {connector}", blind_rows(result, main, connector)) for main, connector in mains if main]


def _attribution(entries: Sequence[Any]) -> list[dict[str, str]]:
    """Every entry as name, licence and origin; an entry may be just a sentence."""
    lines = []
    for entry in entries:
        fields = entry if isinstance(entry, dict) else {"name": entry}
        lines.append({key: str(fields.get(key, "")) for key in ("name", "licence", "origin")})
    return lines

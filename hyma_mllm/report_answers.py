"""The MLLM half of a report: each pair beside what its LLM says blind, and answered questions as pictures."""

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import parse_json
from hyma_mllm.report_pictures import inlined
from hyma_mllm.search.ranking import SearchResult

FIELDS = ("set", "question", "human", "blind", "best", "median", "worst")


def blind_rows(result: SearchResult, method: str, connector: str) -> list[dict[str, Any]]:
    """Each pair in the order of the first test set: name, (score, blind score) per set, loss gained over blind.

    Values are means over seeds.

    Args:
        result: of an MLLM search.
        method: whose ranking.
        connector: family.

    Raises:
        HymaError: the ranking lacks the blind scores.
    """
    chosen = [r for r in result.rankings if (r.method, r.connector) == (method, connector)]

    def mean(name: str, pair: int) -> float:
        columns = [ranking.scores | ranking.details for ranking in chosen]
        return sum(column[name][pair] for column in columns) / len(columns)

    try:
        rows = [
            {
                "pair": " + ".join(names),
                "scores": [(mean(task, pair), mean(f"blind {task}", pair)) for task in result.tasks],
                "gain": mean("blind validation loss", pair) - mean("validation loss", pair),
            }
            for pair, names in enumerate(result.pairs)
        ]
    except KeyError as error:
        raise HymaError(f"The ranking of {method}, {connector} lacks {error}; run the search again.") from error
    return sorted(rows, key=lambda row: -row["scores"][0][0])


def pair_table(result: SearchResult, method: str, connector: str) -> Table:
    """What a run prints: every pair's accuracy, and beside it the blind one."""
    table = Table(title=f"{method}, {connector}: accuracy, percent (blind: the same LLM without the picture)")
    table.add_column("tower + LLM", overflow="fold", min_width=20)
    for task in result.tasks:
        table.add_column(escape(task), justify="right")
        table.add_column("blind", justify="right", style="dim")
    table.add_column("loss gained", justify="right")
    for row in blind_rows(result, method, connector):
        cells = [cell for score, blind in row["scores"] for cell in (f"{score:.1f}", f"{blind:.1f}")]
        table.add_row(escape(row["pair"]), *cells, f"{row['gain']:.2f}")
    prior = result.data.get("prior", {})
    if prior:
        shares = ", ".join(f"{escape(task)} {value:.1f}" for task, value in prior.items())
        table.caption = f"guessing the usual answer to a question, without any model: {shares}"
    return table


def read_answers(run: Path) -> dict[str, Any] | None:
    """`answers.json` with its pictures inlined; None where the run has none.

    Raises:
        HymaError: the file or one of its pictures is broken.
    """
    path = run / "answers.json"
    if not path.exists():
        return None
    try:
        raw = parse_json(path.read_bytes())
        return {
            "pairs": {kind: str(name) for kind, name in raw["pairs"].items()},
            "answers": [
                {name: str(entry[name]) for name in FIELDS} | {"image": inlined(run, entry["image"])}
                for entry in raw["answers"]
            ],
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HymaError(f"{path} is not a list of answers ({error}); remove it, or run the search again.") from error


def answer_table(run: Path) -> Table:
    """Some held-out questions with the answers of people, of the best pair, and of its LLM blind."""
    found = read_answers(run) or {"pairs": {"best": ""}, "answers": []}
    table = Table(title=f"Held-out questions, answered by {escape(found['pairs']['best'])}")
    for heading in ("set", "question", "human", "best", "blind"):
        table.add_column(heading, overflow="fold")
    for entry in found["answers"]:
        table.add_row(
            *(escape(" ".join(entry[name].split())) for name in ("set", "question", "human", "best", "blind"))
        )
    return table

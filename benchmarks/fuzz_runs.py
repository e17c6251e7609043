"""The readers of runs, recipes and answers under the fuzzer."""

import contextlib
import io
import json
import tempfile
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import yaml

from hyma_mllm import launch, report
from hyma_mllm.data.rows import Row
from hyma_mllm.errors import HymaError
from hyma_mllm.report_answers import read_answers
from hyma_mllm.report_log import read_log
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.search.ledger import Cost, Ledger, load_ledgers, save_ledgers
from hyma_mllm.search.ranking import Ranking, SearchResult
from hyma_mllm.stitched.mllm_evaluation import AnswerFile
from hyma_mllm.vlm import VLMConfig

if TYPE_CHECKING:  # mypy takes the folder for a package; a script that is run finds what stands beside it
    from benchmarks.fuzz_data import PNG, as_bytes
    from benchmarks.fuzz_mutate import LONG, Structured, json_files, mutated_bytes, mutated_tree
    from benchmarks.fuzz_reader import Reader
else:
    from fuzz_data import PNG, as_bytes
    from fuzz_mutate import LONG, Structured, json_files, mutated_bytes, mutated_tree
    from fuzz_reader import Reader

RECIPE = Path(__file__).parents[1] / "recipes" / "vlm.yaml"


def search_result() -> SearchResult:
    """A small search."""
    models = [{"id": name, "revision": "r", "width": 3} for name in ("a", "b")]
    rankings = [
        Ranking(method, "linear", seed, {"retrieval": [1.0, 2.0, 3.0, 4.0]}, {"validation retrieval": [1.0] * 4})
        for method in ("hyma", "grid")
        for seed in (0, 1)
    ]
    data = {"attribution": ["A sentence"], "fingerprints": {"x": "y"}, "splits": {"train": 9}}
    return SearchResult("vlm", models, models, ["retrieval"], rankings, config={"search": {}}, data=data)  # type: ignore[arg-type]


def run_files() -> Reader:
    """`ranking.json` and `ledger.json` as `eval/ranking.py`, `hyma report` and `hyma export` read them."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        search_result().save(folder / "ranking.json")
        ledgers = [
            Ledger(m, "linear", s, {"training": Cost(1, 1, 1.0, 1.0, 1)}, 8) for m in ("hyma", "grid") for s in (0, 1)
        ]
        save_ledgers(folder / "ledger.json", ledgers)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    trees = {name: json.loads(content) for name, content in files.items()}

    def read(folder: Path, changed: str) -> object:
        result = SearchResult.load(folder / "ranking.json")
        report.summary_table(result, load_ledgers(folder / "ledger.json"))
        return [
            report.ranked_pairs(result, "hyma", "linear", task) for task in result.tasks if "hyma" in result.methods
        ]

    return Reader("run files", files, json_files(trees), read)


def report_files() -> Reader:
    """Examples, answers and the log of a run, as the report reads them."""
    example = {"kind": "best", "query": "q", "image": "examples/a.png"}
    example["retrieved"] = [{"image": "examples/a.png", "caption": "c", "rank": 1, "right": True}]  # type: ignore[assignment]
    said = dict.fromkeys(("set", "question", "human", "blind", "best", "median", "worst"), "x")
    answers = {"pairs": {"best": "a,b"}, "answers": [said | {"image": "examples/a.png"}]}
    step = {"event": "step", "method": "hyma", "connector": "linear", "seed": 0, "step": 1, "losses": {"0": 1.0}}
    log = [step, step | {"event": "evaluation", "scores": {"retrieval": [1.0] * 4}}]
    trees = {"examples.json": [example], "answers.json": answers, "log.jsonl": log}

    def read(folder: Path, changed: str) -> object:
        if changed == "log.jsonl":
            return read_log(folder / "log.jsonl")
        return report.read_examples(folder), read_answers(folder)

    return Reader("report files", {**as_bytes(trees), "examples/a.png": PNG}, json_files(trees), read)


def yaml_files(name: str, tree: Any) -> Structured:
    """A YAML file with odd values, or with text that only YAML knows."""

    def draw(rng: Random) -> dict[str, bytes]:
        if rng.random() < 0.2:
            laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
                f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
            )
            texts = [
                laughs,
                "a: &a [*a]",
                "[" * 5000,
                "&a *a",
                "? {a: b}\n: c",
                "!!python/object/apply:os.getcwd []",
                "run: !!binary x",
                "--- a\n--- b",
                "run: 2020-99-99",
                "<<: 3",
                "a: b: c",
                "\t",
                "%TAG ! x\n---",
                LONG,
                "search: &s\n  steps: 3\nhypernetwork: *s",
                "- a\n- b",
                "3",
                "run: 0x" + "f" * 9000,
                "search: 1:2:3",
            ]
            return {name: rng.choice(texts).encode()}
        changed = mutated_tree(tree, rng)
        with contextlib.suppress(yaml.YAMLError, RecursionError, ValueError, UnicodeError):
            return {name: yaml.safe_dump(changed, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")}
        return {name: mutated_bytes(yaml.safe_dump(tree).encode(), rng)}

    return draw


def recipe() -> Reader:
    """The configuration of a recipe; a mistake in it ends the command with code 2 and a sentence."""
    tree = yaml.safe_load(RECIPE.read_text(encoding="utf-8")) | {
        "image_encoders": ["a"],
        "data": {"sources": ["x.csv"]},
    }

    def read(folder: Path, changed: str) -> object:
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                return launch.parse(VLMConfig, RECIPE, arguments=["--config", str(folder / "x.yaml")])
            except SystemExit as end:
                if end.code == 2:
                    raise HymaError("refused by the command line") from end
                raise

    return Reader("recipe yaml", {"x.yaml": yaml.safe_dump(tree).encode()}, yaml_files("x.yaml", tree), read)


def run_configuration() -> Reader:
    """`config.yaml` of a run that is to go on."""
    tree = {"run": "x", "search": {"steps": 3, "methods": ["hyma"]}, "data": None}

    def read(folder: Path, changed: str) -> object:
        RunDirectory(folder, tree).close()
        return True

    return Reader("run config", {"config.yaml": yaml.safe_dump(tree).encode()}, yaml_files("config.yaml", tree), read)


def answer_file() -> Reader:
    """Answers that an evaluation goes on with."""
    rows = [Row(f"p#{n}", b"", (), "p", question="What?", answers=("a",) * 10) for n in range(3)]
    lines = [
        {
            "question_id": row.key,
            "prompt": "What?",
            "text": "a",
            "answer_id": "x",
            "model_id": "m",
            "metadata": {"blind": False},
        }
        for row in rows
    ]
    trees = {"a.jsonl": lines}
    return Reader(
        "answers.jsonl",
        as_bytes(trees),
        json_files(trees),
        lambda folder, changed: AnswerFile(folder / "a.jsonl", "m", False, rows).texts,
    )


def readers() -> list[Reader]:
    """All of them."""
    return [run_files(), report_files(), recipe(), run_configuration(), answer_file()]

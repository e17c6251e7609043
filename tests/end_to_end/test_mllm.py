"""recipes/mllm.py on tiny models: its files, its repeatability, its interruptions, its take-away."""

import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mllm_run as tiny_run
import pytest
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

from hyma_mllm.mllm import MLLMConfig
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.stitched.mllm import StitchedMLLM

pytestmark = pytest.mark.slow

Recipe = Callable[..., tuple[int, str, str]]

FILES = {
    "answers.json", "bad_rows.jsonl", "best", "config.yaml", "connectors", "environment.json", "examples",
    "folding.safetensors", "inputs.json", "ledger.json", "log.jsonl", "ranking.json", "ranking.png", "report.html",
    "results",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_run.make_world(tmp_path_factory.mktemp("mllm"))


@pytest.fixture(scope="module")
def run(world: Any) -> Path:
    """An uninterrupted run, as a user starts it."""
    path = world.folder / "run"
    done = tiny_run.start_recipe(world, *world.options(path))
    assert done.returncode == 0, done.stderr
    assert "Loading weights" not in done.stderr and "Warning" not in done.stderr
    assert str(path / "report.html") in done.stdout and "accuracy, percent" in done.stdout
    return path


@pytest.fixture
def recipe(world: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Recipe:
    monkeypatch.setenv("HYMA_CACHE", str(world.folder / "cache"))

    def call(*arguments: str) -> tuple[int, str, str]:
        found: tuple[int, str, str] = tiny_run.run_recipe(monkeypatch, capfd, *arguments)
        return found

    return call


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def test_files_and_scores_of_every_pair(world: Any, run: Path) -> None:
    assert {path.name for path in run.iterdir()} - {".lock"} == FILES
    result = json.loads((run / "ranking.json").read_text())
    assert result["case"] == "mllm" and result["tasks"] == ["vqa questions"]
    assert [entry["id"] for entry in result["vision"]] == list(world.towers)
    assert [entry["id"] for entry in result["text"]] == list(world.llms)
    assert [ranking["method"] for ranking in result["rankings"]] == ["hyma", "grid"]
    for ranking in result["rankings"]:
        assert set(ranking["scores"]) == {"vqa questions"}
        assert {
            "blind vqa questions", "blind validation loss", "validation loss", "validation vqa questions",
            "vqa questions accuracy colour",
        } == set(ranking["details"])  # fmt: skip
        for name, values in (ranking["scores"] | ranking["details"]).items():
            assert len(values) == 4 and all(value >= 0 for value in values), name
        blind = ranking["details"]["blind vqa questions"]
        assert blind[:2] == blind[2:]  # of an LLM, whatever the tower
    assert 0 <= result["data"]["prior"]["vqa questions"] <= 100
    assert result["data"]["splits"]["vqa questions"] > 2
    ledger = json.loads((run / "ledger.json").read_text())
    assert world.train in result["data"]["fingerprints"] and "training" in json.dumps(ledger)
    assert (run / "bad_rows.jsonl").read_text() == ""


def test_answers_and_report(run: Path) -> None:
    answered = json.loads((run / "answers.json").read_text())
    assert set(answered["pairs"]) == {"best", "median", "worst"}
    assert len(answered["answers"]) > 2
    assert {entry["human"] for entry in answered["answers"]} == {"red", tiny_run.EVIL}
    for entry in answered["answers"]:
        assert (run / entry["image"]).is_file()
        assert entry["question"] == "Which <b>colour</b>?"
    page = (run / "report.html").read_text()
    assert tiny_run.EVIL not in page and "&lt;script&gt;alert(1)" in page and "&lt;b&gt;colour" in page
    assert page.count("data:image/png;base64,") >= len(answered["answers"])


def test_the_best_pair_is_a_model(world: Any, run: Path) -> None:
    best = run / "best"
    model, processor = AutoModelForImageTextToText.from_pretrained(best), AutoProcessor.from_pretrained(best)
    assert type(model).__name__ == "LlavaForConditionalGeneration" and processor.chat_template
    stitched = StitchedMLLM.from_pretrained(best)
    result = json.loads((run / "ranking.json").read_text())
    hyma = result["rankings"][0]
    order = hyma["details"]["validation vqa questions"]
    chosen = order.index(max(order))
    pairs = [(tower, llm) for tower in world.towers for llm in world.llms]
    assert (stitched.config.vision.id, stitched.config.llm.id) == pairs[chosen]
    assert stitched.config.scores == {"vqa questions": pytest.approx(hyma["scores"]["vqa questions"][chosen])}
    assert [credit.name for credit in stitched.config.data] == [world.train, world.tests]


def test_the_exported_best_says_what_the_search_heard(world: Any, run: Path) -> None:
    answered = json.loads((run / "answers.json").read_text())
    result = json.loads((run / "ranking.json").read_text())
    stitched = StitchedMLLM.from_pretrained(run / "best")
    assert answered["pairs"]["best"] == f"{stitched.config.vision.id},{stitched.config.llm.id}"
    shown = [entry["key"].split("#")[0] for entry in answered["answers"]]
    pictures = [world.images / f"{name}.jpg" for name in shown]
    question = "Which <b>colour</b>?" + result["config"]["data"]["suffix"]
    said = stitched.answer(pictures, [question] * len(pictures), result["config"]["llm"]["longest_answer"])
    assert said == [entry["best"] for entry in answered["answers"]]


def test_the_same_seed_gives_the_same_bytes_and_a_finished_run_stays(
    world: Any, run: Path, recipe: Recipe, tmp_path: Path
) -> None:
    code, _, err = recipe(*world.options(tmp_path / "again"))
    assert code == 0, err
    before = (run / "ranking.json").read_bytes()
    assert (tmp_path / "again" / "ranking.json").read_bytes() == before
    config = tmp_path / "again.yaml"
    config.write_text((run / "config.yaml").read_text())
    # What only decides how much memory is needed may change.
    code, out, err = recipe(f"--config={config}", f"--run={run}", "--answer_batch=3", "--llm.checkpointing=true")
    assert code == 0, err
    assert "was finished before" in out and "step/s" not in err
    assert (run / "ranking.json").read_bytes() == before
    assert yaml.safe_load((run / "config.yaml").read_text())["search"]["steps"] == 4


@pytest.mark.parametrize("method", ["hyma", "grid"])
def test_sigterm_in_the_middle_changes_nothing(
    method: str, world: Any, run: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunDirectory.log

    def log_and_stop(self: RunDirectory, event: str, **fields: Any) -> None:
        log(self, event, **fields)
        if event == "step" and fields["method"] == method and fields["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    options = world.options(tmp_path / "torn")
    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "log", log_and_stop)
        code, _, err = recipe(*options)
    assert code == 143, err
    said = err.strip().splitlines()[-1]
    assert said.startswith("Stopped by SIGTERM at step 2") and "run the same command again" in said
    assert not (tmp_path / "torn" / "ranking.json").exists()
    code, out, err = recipe(*options)
    assert code == 0, err
    assert "going on from step 2" in out
    steps = [(event["method"], event["step"]) for event in rows_of(tmp_path / "torn") if event["event"] == "step"]
    assert steps == [("hyma", 1), ("hyma", 2), ("hyma", 3), ("hyma", 4), ("grid", 1), ("grid", 2), ("grid", 3)]
    assert (tmp_path / "torn" / "ranking.json").read_bytes() == (run / "ranking.json").read_bytes()


def test_the_hyma_command_on_a_run(
    world: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hyma(*arguments: str) -> str:
        assert tiny_run.hyma(monkeypatch, *arguments) == 0
        return capsys.readouterr().out

    page = (run / "report.html").read_text()
    (run / "report.html").unlink()
    out = hyma("report", str(run))
    assert "accuracy, percent" in out and "Which <b>colour</b>?" in out
    assert (run / "report.html").read_text() == page

    target = tmp_path / "worst"
    pair = f"{world.towers[0]},{world.llms[1]}"
    assert str(target) in hyma("export", str(run), "--pair", pair, "--method=grid", "--to", str(target))
    config = StitchedMLLM.from_pretrained(target).config
    assert (config.vision.id, config.llm.id) == (world.towers[0], world.llms[1])

    picture = str(world.images / "red00.jpg")
    question = "Which colour? Short."
    said = hyma("answer", str(target), picture, question, "--max_new_tokens=6").strip()
    assert said == StitchedMLLM.from_pretrained(target).answer(Path(picture), question, 6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "RUN", "--pair", "a,b"], "has no pair a,b"),
        (["export", "RUN", "--connector=linear"], "has no linear projectors"),
        (["export", "RUN", "--method=random"], "has no ranking by random"),
        (["answer", "RUN", "picture.jpg", "What?"], "picture.jpg"),
    ],
)
def test_mistakes_about_a_run(
    arguments: Sequence[str],
    said: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tiny_run.hyma(monkeypatch, *[str(run) if part == "RUN" else part for part in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_a_grid_alone_hands_over_its_own_best(world: Any, recipe: Recipe, tmp_path: Path) -> None:
    code, _, err = recipe(*world.options(tmp_path / "run", "--search.methods=[grid]", "--search.grid_steps=1"))
    assert code == 0, err
    assert (tmp_path / "run" / "best" / "hyma.json").exists() and (tmp_path / "run" / "report.html").exists()


def test_dry_run_prints_the_bill_and_writes_nothing(world: Any, recipe: Recipe, tmp_path: Path) -> None:
    began = time.monotonic()
    code, out, err = recipe("--dry-run", *world.options(tmp_path / "run"))
    assert code == 0, err
    assert time.monotonic() - began < 20
    assert "2 towers x 2 LLMs = 4 pairs" in out and "TFLOP" in out and "free memory" in out
    assert "4 tokens of width 24" in out and "16 tokens of width 24" in out and "ratio" in out
    assert not (tmp_path / "run").exists()


def test_help_explains_every_option(recipe: Recipe) -> None:
    code, out, _ = recipe("--help")
    assert code == 0
    blocks: dict[str, str] = {}
    for block in out.split("\n  --")[1:]:
        name, *rest = block.split(None, 1)
        blocks[name] = " ".join("".join(rest).split())
    frozen = Path(__file__).with_name("mllm_options.txt").read_text().split()
    assert sorted(blocks) == frozen  # an option that is renamed or taken away breaks people's scripts
    for name, text in blocks.items():
        described = text.split(" ", 1)[-1].replace("(type", "").strip()
        assert len(described) > 10 and any(letter.islower() for letter in described), name
    assert {name.split(".")[0] for name in blocks} >= set(MLLMConfig.__dataclass_fields__)

"""The recipe on real encoders and real pictures: its files, its repeatability, its interruptions, its take-away."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from hyma_mllm.data.sources import open_source
from hyma_mllm.stitched.vlm import StitchedVLM
from hyma_mllm.vlm import VLMConfig

pytestmark = [pytest.mark.zoo, pytest.mark.corpus, pytest.mark.slow]

STEPS = 9
OPTIONS = [
    "--image_encoders=[efficientnet-lite0, efficientnet-lite0#2]",
    "--text_encoders=[minilm-l6, paraphrase-minilm-l3]",
    "--data.sources=['corpus:fluent']",
    "--data.limit=200",
    "--search.methods=[hyma, grid]",
    "--search.connectors=[linear]",
    "--search.seeds=[0]",
    "--search.batch=64",
    f"--search.steps={STEPS}",
    "--search.grid_steps=8",
    "--search.evaluate_every=4",
    "--search.checkpoint_every=3",
]
FILES = {
    "best", "bad_rows.jsonl", "config.yaml", "connectors", "environment.json", "examples", "examples.json",
    "inputs.json", "ledger.json", "log.jsonl", "ranking.json", "ranking.png", "report.html", "results",
    "standardisers.safetensors",
}  # fmt: skip
TEXT_WITHOUT_US = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hyma_mllm":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from sentence_transformers import SentenceTransformer
print(*SentenceTransformer(sys.argv[1], device="cpu").encode("a red apple").tolist())
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, as a user starts it."""
    path = tmp_path_factory.mktemp("vlm") / "run"
    recipe = Path(__file__).parents[2] / "recipes" / "vlm.py"
    command = [sys.executable, str(recipe), f"--run={path}", *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Loading weights" not in done.stderr and "Warning" not in done.stderr
    assert str(path / "report.html") in done.stdout
    return path


def test_files_and_scores(run: Path) -> None:
    assert {path.name for path in run.iterdir()} - {".lock"} == FILES
    result = json.loads((run / "ranking.json").read_text())
    assert result["tasks"][0] == "retrieval" and len(result["tasks"]) >= 2
    assert [ranking["method"] for ranking in result["rankings"]] == ["hyma", "grid"]
    for ranking in result["rankings"]:
        assert set(ranking["scores"]) == set(result["tasks"])
        for scores in ranking["scores"].values():
            assert len(scores) == 4 and all(0 <= score <= 100 for score in scores)
    assert result["data"]["attribution"][0]["licence"] == "MIT"
    assert "Microsoft" in (run / "report.html").read_text() and "Microsoft" in (run / "best" / "README.md").read_text()


def test_a_duplicate_encoder_scores_like_itself(run: Path) -> None:
    result = json.loads((run / "ranking.json").read_text())
    pictures = result["data"]["splits"]["test"]
    for ranking in result["rankings"]:
        first, second = np.array(ranking["scores"]["retrieval"]).reshape(2, 2)
        # The rows read the same features and differ by their initial weights alone. A score is a share p of the test
        # queries, pictures and captions; three standard errors of the difference of two such shares are the tolerance.
        share = np.mean([first, second]) / 100
        tolerance = 3 * 100 * np.sqrt(2 * share * (1 - share) / (2 * pictures))
        assert np.abs(first - second).max() <= tolerance
        assert first.min() > 3 * 100 / pictures  # far above chance, or agreeing would mean nothing


def test_the_same_seed_gives_the_same_bytes(
    run: Path, recipe: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, _, err = recipe(f"--run={tmp_path / 'again'}", *OPTIONS)
    assert code == 0, err
    assert (tmp_path / "again" / "ranking.json").read_bytes() == (run / "ranking.json").read_bytes()


def steps_done(path: Path) -> int:
    log = path / "log.jsonl"
    return log.read_text().count('"event": "step"') if log.exists() else 0


def interrupt(process: "subprocess.Popen[str]", path: Path, after: int, number: signal.Signals) -> tuple[int, str]:
    """Send a signal once the log holds `after` steps; the exit code and stderr."""
    while steps_done(path) < after:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(number)
    err = process.communicate()[1]
    return process.returncode, err


def test_sigterm_and_sigkill_change_nothing(
    run: Path,
    start: Callable[..., "subprocess.Popen[str]"],
    recipe: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    path = tmp_path / "torn"
    options = [f"--run={path}", *OPTIONS]
    code, err = interrupt(start(*options), path, 2, signal.SIGTERM)
    assert code == 143
    said = err.strip().splitlines()[-1]
    assert said.startswith("Stopped by SIGTERM at step") and "run the same command again" in said
    assert "Traceback" not in err
    stopped = steps_done(path)
    assert stopped < STEPS
    code, _ = interrupt(start(*options), path, stopped + 2, signal.SIGKILL)
    assert code == -signal.SIGKILL
    killed = steps_done(path)
    code, out, err = recipe(*options)
    assert code == 0, err
    assert "going on from step" in out
    assert steps_done(path) - killed >= 8  # the grid at least; of the hypernetwork at most one interval is repeated
    events = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    resumed = [event["step"] for event in events if event["event"] == "resumed" and event["method"] == "hyma"]
    assert resumed[0] == stopped and killed - stopped + resumed[0] - resumed[-1] <= 3
    assert (path / "ranking.json").read_bytes() == (run / "ranking.json").read_bytes()


def test_a_signal_before_training_keeps_what_is_done(
    start: Callable[..., "subprocess.Popen[str]"], small: list[str], tmp_path: Path
) -> None:
    process = start(*small, "--embedding.shard_rows=8", "--embedding.batch_size=1", OMP_NUM_THREADS="1")
    shards = tmp_path / "cache" / "features"
    while not list(shards.rglob("*.safetensors")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
    assert process.returncode == 130, err
    assert "run the same command again" in err.strip().splitlines()[-1] and "Traceback" not in err


def test_the_best_pair_is_a_model(run: Path) -> None:
    best = run / "best"
    arguments = [sys.executable, "-c", TEXT_WITHOUT_US, str(best / "text")]
    alone = subprocess.run(arguments, capture_output=True, text=True, check=True, env=os.environ)
    vector = np.array(alone.stdout.split(), dtype=float)
    model = StitchedVLM.from_pretrained(best)
    assert vector.shape == (1280,)
    np.testing.assert_allclose(vector, model.encode_text(["a red apple"])[0].numpy(), atol=1e-5)
    rows = list(open_source("corpus:fluent").rows())[:200:25]
    names = [row.texts[0] for row in rows]
    found = model.classify([Path(row.image) for row in rows if not isinstance(row.image, bytes)], names)
    right = sum(max(scores, key=lambda name: scores[name]) == name for scores, name in zip(found, names, strict=True))
    assert right >= len(names) // 2


def test_dry_run_prints_the_bill_and_writes_nothing(
    recipe: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    began = time.monotonic()
    code, out, _ = recipe("--dry-run", f"--run={tmp_path / 'run'}", *OPTIONS)
    assert code == 0 and time.monotonic() - began < 20
    assert "2 image x 2 text encoders = 4 pairs" in out and "TFLOP" in out and "free disk" in out
    assert "(steps 0.0" in out and "closed forms 0." in out
    assert not (tmp_path / "run").exists()


def test_help_explains_every_option(recipe: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = recipe("--help")
    assert code == 0
    blocks: dict[str, str] = {}
    for block in out.split("\n  --")[1:]:
        name, *rest = block.split(None, 1)
        blocks[name] = " ".join("".join(rest).split())
    frozen = Path(__file__).with_name("vlm_options.txt").read_text().split()
    assert sorted(blocks) == frozen  # an option that is renamed or taken away breaks people's scripts
    for name, text in blocks.items():
        described = text.split(" ", 1)[-1].replace("(type", "").strip()
        assert len(described) > 10 and any(letter.islower() for letter in described), name
    assert {name.split(".")[0] for name in blocks} >= set(VLMConfig.__dataclass_fields__)


def test_the_resolved_configuration_starts_the_same_run(
    run: Path, recipe: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    config = tmp_path / "again.yaml"
    config.write_text((run / "config.yaml").read_text())
    code, out, err = recipe(f"--config={config}", f"--run={run}")
    assert code == 0, err
    assert "was finished before" in out
    assert yaml.safe_load((run / "config.yaml").read_text())["search"]["steps"] == STEPS

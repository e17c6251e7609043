"""The MLLM half of a report: order, blind scores, the prior, answers and their pictures."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from hyma_mllm.errors import HymaError
from hyma_mllm.report_answers import answer_table, blind_rows, pair_table, read_answers
from hyma_mllm.report_pictures import THUMBNAIL, inlined
from hyma_mllm.search.ranking import Ranking, SearchResult

TASKS = ["easy-vqa", "corpora"]


def ranking(method: str, seed: int, first: list[float], loss: list[float]) -> Ranking:
    """Two towers x two LLMs; the blind score is of the LLM."""
    return Ranking(
        method,
        "mlp1",
        seed,
        {"easy-vqa": first, "corpora": [50.0, 40.0, 30.0, 20.0]},
        {
            "blind easy-vqa": [10.0, 20.0] * 2,
            "blind corpora": [5.0, 6.0] * 2,
            "validation loss": loss,
            "blind validation loss": [2.0, 3.0] * 2,
        },
    )


@pytest.fixture
def result() -> SearchResult:
    models = [{"id": name, "revision": "r", "width": 4} for name in ("v0", "v1", "t0", "[b]t1")]
    rankings = [
        ranking("hyma", 0, [40.0, 60.0, 50.0, 90.0], [1.0, 1.0, 1.0, 2.5]),
        ranking("hyma", 1, [60.0, 60.0, 90.0, 90.0], [2.0, 1.0, 1.0, 2.5]),
        ranking("grid", 0, [99.0, 1.0, 1.0, 1.0], [0.0] * 4),
    ]
    data = {"prior": {"easy-vqa": 41.25, "corpora": 33.0}}
    return SearchResult("mllm", models[:2], models[2:], TASKS, rankings, data=data)


def shown(table: Table) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(table)
    return stream.getvalue()


def test_rows_go_by_the_mean_of_the_first_set_each_beside_its_blind_score(result: SearchResult) -> None:
    rows = blind_rows(result, "hyma", "mlp1")
    assert [row["pair"] for row in rows] == ["v1 + [b]t1", "v1 + t0", "v0 + [b]t1", "v0 + t0"]
    assert rows[0]["scores"] == [(90.0, 20.0), (20.0, 6.0)]
    assert rows[3]["scores"] == [(50.0, 10.0), (50.0, 5.0)]
    assert [row["gain"] for row in rows] == [0.5, 1.0, 2.0, 0.5]
    assert blind_rows(result, "grid", "mlp1")[0]["pair"] == "v0 + t0"


def test_the_table_shows_prior_and_names_as_they_are(result: SearchResult) -> None:
    said = shown(pair_table(result, "hyma", "mlp1"))
    assert "easy-vqa 41.2, corpora 33.0" in " ".join(said.split())
    first = next(line for line in said.splitlines() if "v1 + [b]t1" in line)
    assert [cell for cell in first.replace("│", " ").split() if cell[0].isdigit()] == [
        "90.0",
        "20.0",
        "20.0",
        "6.0",
        "0.50",
    ]
    result.data = {}
    assert "usual answer" not in shown(pair_table(result, "hyma", "mlp1"))


def entry(**more: Any) -> dict[str, Any]:
    said = {"set": "easy-vqa", "key": "k", "question": "What [b]?", "human": "red", "blind": "no"}
    return said | {"best": "red", "median": "a\nb", "worst": "", "image": "examples/0.png"} | more


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run" / "examples").mkdir(parents=True)
    Image.new("RGB", (400, 200), "red").save(tmp_path / "run" / "examples" / "0.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "run" / "secret.png")
    return tmp_path / "run"


def write(run: Path, *entries: dict[str, Any]) -> None:
    pairs = {"best": "v1,[b]t1", "median": "v0,t0", "worst": "v0,t0"}
    (run / "answers.json").write_text(json.dumps({"pairs": pairs, "answers": entries}))


def test_answers_come_with_their_pictures(run: Path) -> None:
    assert read_answers(run) is None
    write(run, entry(), entry(image="examples/gone.png"))
    found = read_answers(run)
    assert found is not None and found["pairs"]["best"] == "v1,[b]t1"
    picture, gone = (answered["image"] for answered in found["answers"])
    head, _, coded = picture.partition(",")
    assert head == "data:image/png;base64" and gone is None
    with Image.open(io.BytesIO(base64.b64decode(coded))) as opened:
        assert opened.size == (THUMBNAIL, THUMBNAIL // 2)
    said = shown(answer_table(run))
    assert "v1,[b]t1" in said and "What [b]?" in said and "red" in said


@pytest.mark.parametrize("name", ["../outside.png", "secret.png", "/etc/passwd", "examples/../secret.png"])
def test_a_picture_outside_examples_is_refused(name: str, run: Path) -> None:
    with pytest.raises(ValueError, match="lies outside"):
        inlined(run, name)
    write(run, entry(image=name))
    with pytest.raises(HymaError, match=r"answers\.json is not a list of answers .*lies outside"):
        read_answers(run)


def test_a_link_out_of_examples_is_refused(run: Path) -> None:
    (run / "examples" / "link.png").symlink_to(run / "secret.png")
    with pytest.raises(ValueError, match="lies outside"):
        inlined(run, "examples/link.png")


@pytest.mark.parametrize("text", ["{", "[]", '{"pairs": {}}', '{"pairs": {"best": 1}, "answers": [{}]}'])
def test_a_broken_file_is_one_sentence(text: str, run: Path) -> None:
    (run / "answers.json").write_text(text)
    with pytest.raises(HymaError, match="remove it, or run the search again"):
        read_answers(run)


def test_a_broken_picture_is_one_sentence(run: Path) -> None:
    (run / "examples" / "0.png").write_bytes(b"no picture")
    write(run, entry())
    with pytest.raises(HymaError, match=r"answers\.json"):
        read_answers(run)

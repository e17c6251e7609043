"""Reading and auditing the sources of a run."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from hyma_mllm.data.collection import DataConfig, attribution, collect
from hyma_mllm.data.corpora import CORPORA
from hyma_mllm.data.rows import Row
from hyma_mllm.errors import HymaError


@dataclass
class ListSource:
    name: str
    found: list[Row] = field(default_factory=list)
    licence: str = "MIT"
    fingerprint: str = "0123456789abcdef" * 4

    def rows(self) -> Iterator[Row]:
        return iter(self.found)


def rows_of(prefix: str, folder: Path, good: int, bad: int = 0) -> list[Row]:
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(good + bad):
        path = folder / f"{prefix}{number}.png"
        if number < good:
            Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
        else:
            path.write_bytes(b"no picture")
        rows.append(Row(f"{prefix}{number}", path, (f"caption {number}", f"Größe {number}"), f"{prefix} {number}"))
    return rows


def test_parts_captions_and_the_list_of_bad_rows(tmp_path: Path) -> None:
    sources = [
        ListSource("a", rows_of("a", tmp_path / "p", 3, 1)),
        ListSource("b", rows_of("b", tmp_path / "p", 2, 1)),
    ]
    parts = collect(sources, DataConfig(max_bad_fraction=0.5), tmp_path / "bad.jsonl")
    assert [[row.key for row in part.rows] for part in parts] == [["a0", "a1", "a2"], ["b0", "b1"]]
    assert parts[1].captions[:3] == [("b0#0", "caption 0"), ("b0#1", "Größe 0"), ("b1#0", "caption 1")]
    listed = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(entry["source"], entry["key"]) for entry in listed] == [("a", "a3"), ("b", "b2")]
    assert all(entry["reason"] for entry in listed)


def test_too_many_bad_rows_stop_the_run_and_are_listed_all(tmp_path: Path) -> None:
    source = ListSource("a", rows_of("a", tmp_path / "p", 98, 2))
    with pytest.raises(HymaError, match=r"a has 2 bad rows of 100.*first being a98.*bad\.jsonl") as said:
        collect([source], DataConfig(), tmp_path / "bad.jsonl")
    assert "max_bad_fraction 0.01" in str(said.value)
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 2
    # One in a hundred is just allowed.
    allowed = ListSource("a", [*source.found[:98], source.found[98], *rows_of("b", tmp_path / "p", 1)])
    assert len(collect([allowed], DataConfig(), tmp_path / "bad.jsonl")[0].rows) == 99


def test_a_source_without_one_good_row_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(HymaError, match="2 bad rows of 2, that is all"):
        collect(
            [ListSource("a", rows_of("a", tmp_path / "p", 0, 2))],
            DataConfig(max_bad_fraction=1.0),
            tmp_path / "bad.jsonl",
        )


def test_a_key_in_two_sources_is_named(tmp_path: Path) -> None:
    rows = rows_of("a", tmp_path / "p", 3)
    with pytest.raises(HymaError, match="The key a0 stands in two sources"):
        collect([ListSource("x", rows), ListSource("y", rows)], DataConfig(), tmp_path / "bad.jsonl")


def test_another_limit_is_another_store(tmp_path: Path) -> None:
    source = ListSource("a", rows_of("a", tmp_path / "p", 3))
    prints = {collect([source], DataConfig(limit=n), tmp_path / "bad.jsonl")[0].fingerprint for n in (0, 1, 2)}
    assert len(prints) == 3


def test_credit_names_the_artists() -> None:
    own, corpus = attribution([ListSource("photos/", licence="as its owner says"), ListSource("twemoji")])
    assert own == {"name": "photos/", "licence": "as its owner says", "origin": ""}
    assert corpus["origin"] == CORPORA["twemoji"].attribution and "Twitter" in corpus["origin"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"validation": 0.0}, r"data\.validation is 0\.0"),
        ({"test": 0.95}, r"data\.test is 0\.95"),
        ({"limit": -1}, r"data\.limit is -1"),
    ],
)
def test_bad_values(values: dict[str, float], said: str) -> None:
    with pytest.raises(HymaError, match=said):
        DataConfig(**values)

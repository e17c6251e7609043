"""Every form of pictures with words, and every way in which one can be wrong."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hyma_mllm.data.audit import BadRow, audit
from hyma_mllm.data.packed_pictures import ParquetPicture, TarPicture
from hyma_mllm.data.pictures import BadPicture, open_picture
from hyma_mllm.data.rows import Row
from hyma_mllm.data.sources import open_source
from hyma_mllm.data.threads import in_order
from hyma_mllm.errors import HymaError

CAPTIONS = ("A red square.", "007", "NA")
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for number, colour in enumerate(COLOURS):
        (folder / f"{number}.png").write_bytes(png(colour))
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def make_csv(folder: Path) -> str:
    lines = "".join(f"{number}.png,{text}\n" for number, text in enumerate(CAPTIONS))
    (folder / "x.csv").write_text("image,caption\n" + lines, encoding="utf-8")
    return str(folder / "x.csv")


def make_metadata_csv(folder: Path) -> str:
    lines = "".join(f"{number}.png,{text}\n" for number, text in enumerate(CAPTIONS))
    (folder / "metadata.csv").write_text("file_name,caption\n" + lines, encoding="utf-8")
    return str(folder)


def make_metadata_jsonl(folder: Path) -> str:
    rows = [{"file_name": f"{number}.png", "caption": text} for number, text in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


def make_parquet(folder: Path) -> str:
    images = [str(folder / f"{number}.png") for number in range(3)]
    table = datasets.Dataset.from_dict({"image": images, "caption": list(CAPTIONS)}).cast_column(
        "image", datasets.Image()
    )
    table.map(lambda row: row).to_parquet(str(folder / "x.parquet"))
    return str(folder / "x.parquet")


def make_bytes_parquet(folder: Path) -> str:
    table = datasets.Dataset.from_dict({"image": [png(colour) for colour in COLOURS], "caption": list(CAPTIONS)})
    table.to_parquet(str(folder / "x.parquet"))
    return str(folder / "x.parquet")


def make_struct_parquet(folder: Path) -> str:
    cells = [{"bytes": png(colour), "path": None} for colour in COLOURS]
    pq.write_table(pa.table({"image": cells, "caption": list(CAPTIONS)}), folder / "x.parquet")
    return str(folder / "x.parquet")


def make_tar(folder: Path) -> str:
    for number, (colour, text) in enumerate(zip(COLOURS, CAPTIONS, strict=True)):
        files = {f"{number:05d}.png": png(colour), f"{number:05d}.txt": text.encode()}
        write_tar(folder / f"shard-{number}.tar", files)
    return str(folder / "shard-*.tar")


def make_json_tar(folder: Path) -> str:
    files = {}
    for number, (colour, text) in enumerate(zip(COLOURS, CAPTIONS, strict=True)):
        files |= {f"{number}.png": png(colour), f"{number}.json": json.dumps({"caption": text}).encode()}
    write_tar(folder / "x.tar", files)
    return str(folder / "x.tar")


def make_llava(folder: Path) -> str:
    rows = [
        {
            "id": f"r{number}",
            "image": f"{number}.png",
            "conversations": [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": text}],
        }
        for number, text in enumerate(CAPTIONS)
    ]
    (folder.parent / "x.json").write_text(json.dumps(rows), encoding="utf-8")
    return f"{folder.parent / 'x.json'}::{folder}"


MAKERS = [
    make_csv,
    make_metadata_csv,
    make_metadata_jsonl,
    make_parquet,
    make_bytes_parquet,
    make_struct_parquet,
    make_tar,
    make_json_tar,
    make_llava,
]


@pytest.mark.parametrize("make", MAKERS)
def test_every_form_gives_the_same_rows(make: Callable[[Path], str], pictures: Path) -> None:
    source = open_source(make(pictures))
    checked = audit(source)
    assert checked.bad == []
    assert [row.texts for row in checked.rows] == [(text,) for text in CAPTIONS]
    assert [open_picture(row.image).getpixel((0, 0)) for row in checked.rows] == list(COLOURS)
    assert len({row.key for row in checked.rows}) == 3
    assert all(row.concept for row in checked.rows)
    assert [row.key for row in source.rows()] == [row.key for row in checked.rows]
    assert len(audit(source, limit=2).rows) == 2


@pytest.mark.parametrize("make", [make_struct_parquet, make_bytes_parquet, make_tar, make_json_tar])
def test_rows_of_packed_files_hold_places_and_no_bytes(make: Callable[[Path], str], pictures: Path) -> None:
    rows = list(open_source(make(pictures)).rows())
    assert all(isinstance(row.image, (TarPicture, ParquetPicture)) for row in rows)
    assert len({row.image for row in rows}) == 3
    for row, colour in zip(rows, COLOURS, strict=True):
        assert isinstance(row.image, (TarPicture, ParquetPicture)) and row.image.read_bytes() == png(colour)


def test_pictures_of_many_row_groups_and_files(tmp_path: Path) -> None:
    """In any order, from several threads."""
    shades = [(shade, 0, 0) for shade in range(11)]
    for number, part in enumerate((shades[:7], shades[7:])):
        cells = [png(shade) if place != 2 else None for place, shade in enumerate(part)]
        table = pa.table({"image": cells, "caption": [f"{shade}" for shade in part]})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=3)
    rows = list(open_source(str(tmp_path)).rows())
    assert [row.key for row in rows if row.image == b""] == ["000000002", "000000009"]
    held = [(row, shade) for row, shade in zip(rows, shades, strict=True) if row.image != b""]
    shuffled = held[::-1] + held[::2]
    found = in_order(lambda row: open_picture(row.image).getpixel((0, 0)), [row for row, _ in shuffled], 4, 3)
    assert list(found) == [shade for _, shade in shuffled]


def test_a_compressed_tar_keeps_its_bytes_within_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "x.tar", {"0.png": png(COLOURS[0]), "0.txt": b"a"})
    (tmp_path / "z.tar").write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes()))
    assert [row.image for row in open_source(str(tmp_path / "z.tar")).rows()] == [png(COLOURS[0])]
    monkeypatch.setattr("hyma_mllm.data.tar_samples.HELD_BYTES", 60)
    with pytest.raises(HymaError, match=r"z\.tar cannot .* compressed and holds more than 60 bytes; give a plain tar"):
        open_source(str(tmp_path / "z.tar"))
    assert len(list(open_source(str(tmp_path / "x.tar")).rows())) == 1


def test_a_packed_picture_whose_file_is_gone_is_refused(pictures: Path) -> None:
    source = open_source(make_json_tar(pictures))
    (row, *_) = source.rows()
    (pictures / "x.tar").unlink()
    with pytest.raises(BadPicture, match="does not exist"):
        open_picture(row.image)


def test_the_fingerprint_follows_content_not_place(pictures: Path, tmp_path: Path) -> None:
    first = open_source(make_csv(pictures)).fingerprint
    elsewhere = tmp_path / "elsewhere"
    pictures.rename(elsewhere)
    assert open_source(str(elsewhere / "x.csv")).fingerprint == first
    (elsewhere / "1.png").write_bytes(png((9, 9, 9)))
    changed_picture = open_source(str(elsewhere / "x.csv")).fingerprint
    text = (elsewhere / "x.csv").read_text()
    (elsewhere / "x.csv").write_text(text.replace("square", "box"))
    assert len({first, changed_picture, open_source(str(elsewhere / "x.csv")).fingerprint}) == 3


def test_llava_turns_questions_and_missing_pictures(pictures: Path) -> None:
    said = ["<image>\nWhat is it?", "A dog.", "What colour?", "Brown."]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    rows = [
        {"id": 7, "image": "0.png", "conversations": turns},
        {"id": "words only", "conversations": turns[2:]},
    ]
    (pictures / "x.json").write_text(json.dumps(rows))
    checked = audit(open_source(str(pictures / "x.json")))
    assert [(row.key, row.question, row.answers) for row in checked.rows] == [
        ("7", "What is it?", ("A dog.",)),
        ("7#1", "What colour?", ("Brown.",)),
    ]
    assert len({row.concept for row in checked.rows}) == 1
    assert checked.bad == [BadRow("words only", "there is no picture")]


def test_class_folders_have_labels(pictures: Path) -> None:
    for number, name in enumerate(("cat", "hot_dog", "cat")):
        (pictures / name).mkdir(exist_ok=True)
        (pictures / f"{number}.png").rename(pictures / name / f"{number}.png")
    rows = audit(open_source(str(pictures))).rows
    assert [(row.key, row.label) for row in rows] == [
        ("cat/0.png", "cat"),
        ("cat/2.png", "cat"),
        ("hot_dog/1.png", "hot dog"),
    ]
    assert {row.class_set for row in rows} == {"data"}


def test_several_captions_and_further_columns(pictures: Path) -> None:
    row = {"id": "k", "image": "0.png", "caption": ["one", "two"], "concept": "c", "label": "l", "answers": ["yes"]}
    (pictures / "x.jsonl").write_text(json.dumps(row | {"question": "Is it?"}) + "\n")
    assert list(open_source(str(pictures / "x.jsonl")).rows()) == [
        Row("k", pictures / "0.png", ("one", "two"), "c", "l", "labels", "Is it?", ("yes",))
    ]


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(HymaError, match="holds no pictures"):
        open_source(str(tmp_path))


def test_pictures_without_captions(pictures: Path) -> None:
    with pytest.raises(HymaError, match=r"0\.png has no caption"):
        open_source(str(pictures))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "image,captoin\n0.png,a\n", "no column caption; did you mean captoin"),
        ("x.csv", "picture,caption\n0.png,a\n", "no column image or path"),
        ("x.csv", "", "is empty"),
        ("x.csv", "image,caption\n", "holds no rows"),
        ("metadata.csv", "file_name,text\n0.png,a\n", "no column caption"),
        ("metadata.csv", "caption\na\n", "no column file_name or image"),
        ("x.jsonl", '{"image": "0.png"}\n', "no column caption"),
        ("x.jsonl", "{", "cannot be read as json"),
        ("x.json", "[1, 2]", "cannot be read as json|no column image"),
        ("x.json", '[{"image": "0.png", "conversations": [{"from": "gpt", "value": "a"}]}]', "speakers"),
        ("x.json", '[{"id": "a", "image": "0.png"}]', "no column conversations"),
        ("x.parquet", "{", "cannot be read as parquet"),
        ("x.tar", "{", "cannot be read as webdataset"),
        ("x.doc", "hello", "ends in .doc"),
    ],
)
def test_ill_formed_files_are_named(name: str, text: str, message: str, pictures: Path) -> None:
    (pictures / name).write_text(text, encoding="utf-8")
    spec = pictures if name == "metadata.csv" else pictures / name
    with pytest.raises(HymaError, match=message) as caught:
        open_source(str(spec))
    assert str(pictures) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_csv_in_another_encoding(pictures: Path) -> None:
    (pictures / "x.csv").write_bytes("image,caption\n0.png,Größe\n".encode("latin-1"))
    with pytest.raises(HymaError, match="cannot be read as csv"):
        open_source(str(pictures / "x.csv"))


def test_what_does_not_exist(tmp_path: Path) -> None:
    for spec in (tmp_path / "none.csv", tmp_path / "none-*.tar", tmp_path / "none"):
        with pytest.raises(HymaError, match="does not exist"):
            open_source(str(spec))
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(HymaError, match="picture folder"):
        open_source(f"{tmp_path / 'x.json'}::{tmp_path / 'none'}")
    with pytest.raises(HymaError, match="did you mean fluent"):
        open_source("corpus:fluend")


def test_two_metadata_files(pictures: Path) -> None:
    make_metadata_csv(pictures)
    make_metadata_jsonl(pictures)
    with pytest.raises(HymaError, match=r"both metadata\.csv and metadata\.jsonl"):
        open_source(str(pictures))


def test_tar_without_pictures_or_captions(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.txt": b"a", "0.json": b"{}"})
    with pytest.raises(HymaError, match="no picture in its first sample"):
        open_source(str(tmp_path / "a.tar"))
    write_tar(tmp_path / "b.tar", {"0.png": png(COLOURS[0]), "0.json": b'{"text": "a"}'})
    with pytest.raises(HymaError, match="no column caption"):
        open_source(str(tmp_path / "b.tar"))


@dataclass
class Fixed:
    """A source that is a list."""

    given: list[Row] = field(default_factory=list)
    name: str = "fixed"
    licence: str = "none"
    fingerprint: str = "0"
    pictures_checked: bool = False

    def rows(self) -> Iterator[Row]:
        return iter(self.given)


def test_bad_rows_are_counted_listed_and_limited(tmp_path: Path) -> None:
    good = [Row(f"good{number}", png(COLOURS[0]), ("a",), "a") for number in range(96)]
    bad = [
        Row("empty", png(COLOURS[0]), ("a", " "), "a"),
        Row("none", png(COLOURS[0]), (), "a"),
        Row("gone", tmp_path / "gone.png", ("a",), "a"),
        Row("broken", png(COLOURS[0])[:40], ("a",), "a"),
    ]
    source = Fixed([*bad[:2], *good, *bad[2:]])
    checked = audit(source)
    assert checked.rows == good
    assert [row.key for row in checked.bad] == ["empty", "none", "gone", "broken"]
    assert checked.bad[0] == BadRow("empty", "it has an empty caption")
    assert checked.bad[2] == BadRow("gone", "the file does not exist")
    assert audit(source, threads=1) == checked == audit(source, threads=5)
    checked.refuse_if_bad("fixed", 0.04, "mend them")
    with pytest.raises(HymaError, match=r"4 bad rows of 100.*0\.03.*empty \(it has an empty caption\); mend them\."):
        checked.refuse_if_bad("fixed", 0.03, "mend them")
    source.pictures_checked = True
    assert [row.key for row in audit(source).bad] == ["empty", "none"]


def test_duplicate_keys_and_no_rows() -> None:
    row = Row("k", png(COLOURS[0]), ("a",), "a")
    with pytest.raises(HymaError, match="key k stands twice in fixed, in rows 0 and 1"):
        audit(Fixed([row, row]))
    with pytest.raises(HymaError, match="holds no rows"):
        audit(Fixed())


def test_a_caption_that_repeats_in_a_csv_names_both_rows(pictures: Path) -> None:
    (pictures / "x.csv").write_text("path,caption\n0.png,a\n0.png,b\n")
    with pytest.raises(HymaError, match="rows 0 and 1"):
        audit(open_source(str(pictures / "x.csv")))


def test_sixteen_bit_and_transparent_pictures_pass_the_audit(pictures: Path) -> None:
    Image.fromarray(np.full((4, 4), 65535, dtype=np.uint16)).save(pictures / "0.png")
    Image.new("RGBA", (4, 4)).save(pictures / "1.png")
    assert len(audit(open_source(make_csv(pictures))).rows) == 3

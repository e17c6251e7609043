"""Rows out of each file form, streaming: tables through libraries, JSON and tars by what a row needs of them."""

import csv
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets.exceptions import DatasetsError

from hyma_mllm.data.packed_pictures import ParquetPicture, parquet_rows
from hyma_mllm.data.pictures import PackedPicture
from hyma_mllm.data.rows import Row
from hyma_mllm.data.tar_samples import tar_samples
from hyma_mllm.data.words import caption_key
from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.foreign import UNREADABLE, parse_json, reason

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
KEY_COLUMNS = ("key", "id", "__key__")
IMAGE_TAG = "<image>"

NAMED_BY = 1000
"""Rows of JSON, the first ones, whose names are columns; a later row may lack any."""

T = TypeVar("T")


def read_table(files: Sequence[Path], base: Path, image_columns: Sequence[str], caption_column: str) -> Iterator[Row]:
    """Rows of csv, jsonl or parquet files: a picture or its path (relative to `base`), one or more captions.

    Further columns that count where they exist: `key` or `id`, `concept`, `label`, `question`, `answers`.

    Raises:
        HymaError: a column is missing, or a file cannot be read.
    """
    form = {".csv": "csv", ".jsonl": "json", ".parquet": "parquet"}[files[0].suffix.casefold()]
    options: dict[str, Any] = {}
    if form == "csv":
        header = _csv_header(files[0])
        # All cells are strings, so that a caption `007` or `NA` stays what it is.
        options = {
            "features": datasets.Features(dict.fromkeys(header, datasets.Value("string"))),
            "keep_default_na": False,
        }
    image_column = ""
    rows: Iterator[tuple[dict[str, Any], ParquetPicture | None]]
    if form == "parquet":
        rows = _readable(form, files, partial(parquet_rows, files, image_columns))
    else:
        read = partial(_json_rows, files) if form == "json" else partial(_stream, form, files, **options)
        rows = ((cells, None) for cells in _readable(form, files, read))
    for number, (cells, place) in enumerate(rows):
        if number == 0:
            image_column = _first_of(image_columns, cells, files[0])
            _first_of((caption_column,), cells, files[0])
        image = place or _image(cells.get(image_column), base)
        path = str(cells[image_column]) if isinstance(cells.get(image_column), str) else f"{number:09d}"
        key = next((str(cells[name]) for name in KEY_COLUMNS if cells.get(name) not in (None, "")), path)
        texts = _texts(cells.get(caption_column))
        label = _optional(cells.get("label"))
        yield Row(
            key=key,
            image=image,
            texts=texts,
            concept=_optional(cells.get("concept")) or (caption_key(texts[0]) if texts else key),
            label=label,
            class_set=None if label is None else _optional(cells.get("class_set")) or "labels",
            question=_optional(cells.get("question")),
            answers=_texts(cells.get("answers")),
        )


def read_class_folders(folder: Path) -> Iterator[Row]:
    """Rows of a folder with one subfolder per class; the class name is the label and the only caption.

    Raises:
        HymaError: no pictures, or pictures without class folders.
    """
    if not any(path.suffix.casefold().lstrip(".") in PICTURE_SUFFIXES for path in folder.rglob("*")):
        raise HymaError(f"The folder {folder} holds no pictures; name one that does.")
    for path in sorted(folder.rglob("*")):
        if path.suffix.casefold().lstrip(".") not in PICTURE_SUFFIXES or not path.is_file():
            continue
        place = path.relative_to(folder)
        if len(place.parts) < 2:
            raise HymaError(
                f"The picture {path} has no caption: {folder} holds neither a metadata.csv with the columns file_name "
                "and caption nor a subfolder for each class; add one of them."
            )
        name = place.parts[0].replace("_", " ")
        yield Row(
            key=place.as_posix(),
            image=path,
            texts=(name,),
            concept=caption_key(name),
            label=name,
            class_set=folder.name,
        )


def read_webdataset(files: Sequence[Path], caption_column: str) -> Iterator[Row]:
    """Rows of webdataset shards: in each sample one picture, and a `.txt` or a `.json` with the caption.

    Raises:
        HymaError: a shard cannot be read, or its samples have no picture or no caption.
    """
    samples = (
        sample
        for file in files
        for sample in _readable("webdataset", [file], partial(tar_samples, file, PICTURE_SUFFIXES))
    )
    for number, sample in enumerate(samples):
        if number == 0 and sample.picture is None:
            raise HymaError(f"{files[0]} has no picture in its first sample {sample.key}; name another shard.")
        column = "txt" if "txt" in sample.fields else caption_column
        if number == 0:
            _first_of((column,), sample.fields, files[0])
        texts = _texts(sample.fields.get(column))
        yield Row(
            key=sample.key,
            image=sample.picture or b"",
            texts=texts,
            concept=caption_key(texts[0]) if texts else sample.key,
        )


def read_llava(files: Sequence[Path], base: Path) -> Iterator[Row]:
    """Rows of LLaVA's json: a list of `id`, `image` and `conversations`; each turn of a conversation is a row.

    Turns after the first have `#1`, `#2`, ... behind the key. The answer is the caption too. A conversation without a
    picture gives rows without one, which the audit refuses and counts.

    Raises:
        HymaError: no such list, or a field is missing.
    """
    for number, cells in enumerate(_readable("json", files, partial(_json_rows, files))):
        if number == 0:
            for name in ("image", "conversations"):
                _first_of((name,), cells, files[0])
        key = str(cells.get("id") or cells.get("image") or f"{number:09d}").strip('"')
        for turn, (question, answer) in enumerate(_turns(cells.get("conversations"), files[0], key)):
            yield Row(
                key=f"{key}#{turn}" if turn else key,
                image=_image(cells.get("image"), base),
                texts=(answer,),
                concept=str(cells.get("image") or key),
                question=question or None,
                answers=(answer,),
            )


def _turns(conversation: Any, file: Path, key: str) -> list[tuple[str, str]]:
    """(question, answer) of each turn, the image tag taken out."""
    parts = conversation if isinstance(conversation, list | tuple) else ()
    if not all(isinstance(part, Mapping) and {"from", "value"} <= part.keys() for part in parts):
        raise HymaError(f"The conversation {key} of {file} has a turn without the fields from and value; mend it.")
    said = [(str(part["from"]), str(part["value"])) for part in parts]
    speakers = [speaker for speaker, _ in said]
    if not said or len(said) % 2 or speakers != ["human", "gpt"] * (len(said) // 2):
        raise HymaError(
            f"The conversation {key} of {file} has the speakers {speakers}; it must go human, gpt, human, gpt, ..."
        )
    texts = [text.replace(IMAGE_TAG, "").strip() for _, text in said]
    return list(zip(texts[::2], texts[1::2], strict=True))


def _stream(form: str, files: Sequence[Path], **options: Any) -> Iterator[dict[str, Any]]:
    """The cells of each row by the `datasets` library, pictures undecoded."""
    loaded = datasets.load_dataset(
        form, data_files=[str(file) for file in files], split="train", streaming=True, **options
    )
    yield from loaded.decode(False) if loaded.features is not None else loaded


def _json_rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The cells of each row of JSON lines or of files with one list, each row with the names of all near the beginning.

    Not by `datasets`: its parser ends the process on lists that nest too deeply, and takes texts for dates.
    """
    rows = itertools.chain.from_iterable(map(_json_values, files))
    first = list(itertools.islice(rows, NAMED_BY))
    names = dict.fromkeys(name for row in first for name in row)
    for row in itertools.chain(first, rows):
        yield {**names, **row}


def _json_values(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8-sig") as opened:
        beginning = opened.read(1 << 16).lstrip()
        opened.seek(0)
        values = parse_json(opened.read()) if beginning.startswith("[") else map(parse_json, filter(str.strip, opened))
        for number, value in enumerate(values):
            if not isinstance(value, dict):
                raise ValueError(f"row {number} is no object with named fields")
            yield value


def _readable(form: str, files: Sequence[Path], read: Callable[[], Iterator[T]]) -> Iterator[T]:
    """What a library reads, its errors as one sentence that names the file."""
    try:
        yield from read()
    except (*UNREADABLE, DatasetsError) as error:
        where = files[0] if len(files) == 1 else f"{files[0]} (and {len(files) - 1} more)"
        raise HymaError(f"{where} cannot be read as {form}: {reason(error)}; mend the file.") from error


def _csv_header(file: Path) -> list[str]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            header = next(csv.reader(opened), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise HymaError(f"{file} cannot be read as csv: {error}; save it as UTF-8 text.") from error
    if not header:
        raise HymaError(f"{file} is empty; its first line must name the columns.")
    return header


def _first_of(wanted: Sequence[str], cells: Mapping[str, Any], file: Path) -> str:
    for name in wanted:
        if name in cells:
            return name
    near = near_names(wanted[0], cells) if cells else "it has no columns"
    raise HymaError(f"{file} has no column {' or '.join(wanted)}; {near}; rename it, or say which column holds it.")


def _image(cell: Any, base: Path) -> Path | bytes | PackedPicture:
    """A path or encoded bytes; empty bytes where there is no picture, which the audit refuses."""
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    return base / cell if isinstance(cell, str) and cell else b""


def _texts(cell: Any) -> tuple[str, ...]:
    if cell is None:
        return ()
    cells = cell if isinstance(cell, (list, tuple)) else [cell]
    return tuple("" if text is None else str(text).strip() for text in cells)


def _optional(cell: Any) -> str | None:
    return None if cell is None or not str(cell).strip() else str(cell).strip()

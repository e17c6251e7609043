"""One way to open pictures with words: folders, tables, shards, LLaVA json and the built-in corpora.

- files are read streaming, a row at a time, shards in order of their names
- a picture stays where it is, a path or a place in a larger file; it is decoded by `pictures.open_picture` alone
- columns and files are checked when a source is opened; rows are checked by `audit.audit`
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path

from hyma_mllm.data.corpora import load_corpus
from hyma_mllm.data.pictures import PackedPicture, refuse_special
from hyma_mllm.data.readers import read_class_folders, read_llava, read_table, read_webdataset
from hyma_mllm.data.rows import Row, Source
from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import UNREADABLE

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FORMS = "corpus:NAME, a folder, or files ending in .csv, .jsonl, .parquet, .tar or .json"


@dataclass
class FileSource:
    """Rows that are read from files of the user.

    Attributes:
        name: the spec that it was opened by.
        licence: not known to this program.
        read: starts reading from the first row.
    """

    name: str
    licence: str
    read: Callable[[], Iterator[Row]]

    def rows(self) -> Iterator[Row]:
        """All rows in a fixed order, unchecked."""
        return self.read()

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over every key, text, label, question and answer and the content of every picture.

        It reads all pictures once, which is far less work than embedding them; times and places of files do not enter.
        """
        whole = sha256()
        for row in self.read():
            fields = (row.key, *row.texts, row.concept, row.label, row.class_set, row.question, *row.answers)
            whole.update(repr(fields).encode())
            whole.update(_picture_hash(row.image))
        return whole.hexdigest()


def open_source(spec: str, image_column: str = "image", caption_column: str = "caption") -> Source:
    """The source that `spec` names, opened as far as its first row.

    Args:
        spec: `corpus:fluent`; a folder of pictures with metadata.csv, .jsonl or .parquet (column `file_name`), or with
            a subfolder for each class; `x.csv` or `x.jsonl` (a path and a caption in each row); `x.parquet`; `x.tar`
            (webdataset); `x.json` (LLaVA; its pictures lie beside it, or in the folder after `::`, as in
            `x.json::images`). `*` and `?` in a file name take all files that fit.
        image_column: column of the picture or its path; `file_name` counts too in a folder's metadata, and a tar takes
            the one picture of each sample.
        caption_column: column of the caption or the list of captions; in a tar a `.txt`, or this field of the `.json`.

    Raises:
        HymaError: nothing is there, it has another form, a column is missing, or its first row cannot be read.
    """
    if spec.startswith("corpus:"):
        return load_corpus(spec.removeprefix("corpus:"))
    place, _, images = spec.partition("::")
    path = Path(place).expanduser()
    if path.is_dir():
        read = _folder_reader(path, image_column, caption_column)
    else:
        read = _file_reader(
            spec, _files(path, spec), Path(images).expanduser() if images else None, image_column, caption_column
        )
    source = FileSource(spec, "as its owner says", read)
    if next(source.rows(), None) is None:
        raise HymaError(f"{spec} holds no rows; name a source with pictures and captions.")
    return source


def _folder_reader(folder: Path, image_column: str, caption_column: str) -> Callable[[], Iterator[Row]]:
    tables = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(tables) > 1:
        raise HymaError(f"{folder} holds both {tables[0].name} and {tables[1].name}; keep one of them.")
    if tables:
        return partial(read_table, tables, folder, ("file_name", image_column), caption_column)
    shards = sorted(folder.glob("*.tar"))
    if shards:
        return partial(read_webdataset, shards, caption_column)
    shards = sorted(folder.glob("*.parquet"))
    if shards:
        return partial(read_table, shards, folder, (image_column,), caption_column)
    return partial(read_class_folders, folder)


def _file_reader(
    spec: str, files: list[Path], images: Path | None, image_column: str, caption_column: str
) -> Callable[[], Iterator[Row]]:
    base = images or files[0].parent
    if not base.is_dir():
        raise HymaError(f"The picture folder {base} of {spec} does not exist; mend the part after `::`.")
    match files[0].suffix.casefold():
        case ".csv" | ".jsonl" | ".parquet":
            names = (image_column, "path") if files[0].suffix.casefold() == ".csv" else (image_column,)
            return partial(read_table, files, base, names, caption_column)
        case ".tar":
            return partial(read_webdataset, files, caption_column)
        case ".json":
            return partial(read_llava, files, base)
        case other:
            raise HymaError(f"{spec} ends in {other or 'no suffix'}, which is no known form; give {FORMS}.")


def _files(path: Path, spec: str) -> list[Path]:
    if path.is_file():
        return [path]
    found = (
        sorted(path.parent.glob(path.name)) if path.parent.is_dir() and any(sign in path.name for sign in "*?[") else []
    )
    if not found:
        raise HymaError(f"The source {spec} does not exist; give {FORMS}.")
    return found


def _picture_hash(image: Path | bytes | PackedPicture) -> bytes:
    if isinstance(image, bytes):
        return sha256(image).digest()
    try:
        if isinstance(image, Path):
            refuse_special(image)
        return sha256(image.read_bytes()).digest()
    except UNREADABLE:
        return b"unreadable"  # audit lists it with its reason

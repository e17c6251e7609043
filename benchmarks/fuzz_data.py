"""The readers of pictures, words, questions and features under the fuzzer."""

import csv
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from PIL import Image
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from hyma_mllm.data.features import FeatureStore
from hyma_mllm.data.imports import import_tensor
from hyma_mllm.data.manifest import hash_keys
from hyma_mllm.data.pictures import open_picture
from hyma_mllm.data.question_formats import (
    read_conversations,
    read_gqa,
    read_pope,
    read_scienceqa,
    read_textvqa,
    read_vqa,
)
from hyma_mllm.data.sources import open_source
from hyma_mllm.data.store_writer import StorePlan, StoreWriter

if TYPE_CHECKING:  # mypy takes the folder for a package; a script that is run finds what stands beside it
    from benchmarks.fuzz_mutate import Structured, json_bytes, json_files, mutated_bytes, mutated_tree, odd_values
    from benchmarks.fuzz_reader import Reader
else:
    from fuzz_mutate import Structured, json_bytes, json_files, mutated_bytes, mutated_tree, odd_values
    from fuzz_reader import Reader


QUOTING: tuple[Literal[0, 1], ...] = (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    """A small picture in a file format."""
    buffer = io.BytesIO()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8))
    noise.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encoded("PNG")
ROWS = [{"id": str(n), "image": f"{n}.png", "caption": f"A thing, {n}.", "concept": "thing"} for n in range(3)]
PICTURES = {f"{n}.png": PNG for n in range(3)}
CSV = b"image,caption,id\n" + b"".join(b"%d.png,A thing.,%d\n" % (n, n) for n in range(3))


def source(name: str) -> Any:
    """Opens a file as `data.sources` does and reads all of it, pictures included."""

    def read(folder: Path, changed: str) -> object:
        return open_source(str(folder / name) if name else str(folder)).fingerprint

    return read


def csv_files(name: str, column: str = "image") -> Structured:
    """A table whose cells are changed, written with some delimiters and encodings."""

    def draw(rng: Random) -> dict[str, bytes]:
        rows = mutated_tree([{**row, column: row["image"]} for row in ROWS], rng)
        rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        names = list(dict.fromkeys(str(key) for row in rows for key in row)) or ["image"]
        text = io.StringIO()
        writer = csv.writer(text, delimiter=rng.choice([",", ",", ",", ";", "\t"]), quoting=rng.choice(QUOTING))
        writer.writerow(names + rng.choice([[], [], names[:1], [""]]))
        writer.writerows([row.get(key, "") for key in names] + rng.choice([[], [], ["more"]]) for row in rows)
        coding = rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"])
        errors = "surrogatepass" if coding.startswith("utf") else "replace"
        return {name: text.getvalue().encode(coding, errors)}

    return draw


def parquet_bytes(rows: Any) -> bytes:
    """Rows as a parquet file."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=2)
    return buffer.getvalue()


PARQUET_ROWS: list[dict[str, Any]] = [{**row, "image": {"bytes": PNG, "path": None}} for row in ROWS]


def parquet_files(rng: Random) -> dict[str, bytes]:
    """A table whose columns change their types."""
    rows = mutated_tree(PARQUET_ROWS, rng)
    try:
        return {"x.parquet": parquet_bytes(rows)}
    except (pa.ArrowException, AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return {"x.parquet": mutated_bytes(parquet_bytes(PARQUET_ROWS), rng)}


def tar_bytes(members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> bytes:
    """Members as a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, content: bytes) -> tuple[tarfile.TarInfo, bytes]:
    """A regular member."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info, content


TAR = [
    member(f"{n}.{suffix}", content)
    for n in range(2)
    for suffix, content in {"png": PNG, "json": b'{"caption": "a thing"}'}.items()
]


def tar_files(rng: Random) -> dict[str, bytes]:
    """Members with odd names, kinds, sizes and contents."""
    members = []
    for info, content in TAR:
        changed = tarfile.TarInfo(info.name)
        if rng.random() < 0.3:
            odd = [".png", "0.txt", "../0.png", "/0.png", "a/b.c/0.png", "0", "", "x" * 300 + ".json", "0.PNG", "0.pth"]
            changed.name = rng.choice(odd)
        if rng.random() < 0.3:
            content = rng.choice([b"", b"[]", b"\xff", b'{"caption": ["a", null]}', b"[" * 100_000, PNG, b"3"])
        changed.size = len(content)
        if rng.random() < 0.1:
            kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S", b"?"]
            changed.type, changed.linkname = rng.choice(kinds), "/etc/passwd"
        if rng.random() < 0.05:
            changed.pax_headers = {"GNU.sparse.realsize": "100000000000", "GNU.sparse.map": "0,1", "size": "10e9"}
        members.append((changed, content))
    made = bytearray(tar_bytes(members, rng.choice(["w", "w", "w", "w:gz", "w:xz", "w:bz2"])))
    if rng.random() < 0.2 and len(made) > 512:
        made[124:136] = rng.choice([b"77777777777\0", b"\x80" + b"\xff" * 11, b"-0000000001\0", b"            "])
    return {"x.tar": bytes(made)}


CONVERSATIONS = [
    {"id": row["id"], "image": row["image"], "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."},
        {"from": "human", "value": "And?"}, {"from": "gpt", "value": "No."},
    ]} for row in ROWS
]  # fmt: skip
VQA = {"questions": [{"question_id": n, "image_id": n, "question": "What?"} for n in range(3)]}
VQA_ANSWERS = {
    "annotations": [
        {"question_id": n, "image_id": n, "answer_type": "other", "answers": [{"answer": "a"}] * 10} for n in range(3)
    ]
}
TEXTVQA = {
    "data": [{"question_id": n, "image_id": f"{n}", "question": "What?", "answers": ["a"] * 10} for n in range(3)]
}
GQA = {
    f"q{n}": {"question": "What?", "answer": "a", "imageId": f"{n}", "types": {"structural": "query"}} for n in range(3)
}
POPE = [{"question_id": n, "image": f"{n}.png", "text": "Is it?", "label": "yes"} for n in range(3)]
SCIENCE = {
    "0": {"question": "What?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": "0.png", "split": "train"},
    "1": {
        "question": "Why?",
        "choices": ["a"],
        "answer": 0,
        "hint": "h",
        "image": None,
        "split": "val",
        "subject": "s",
    },
}
COCO = {f"COCO_val2014_{n:012d}.jpg": PNG for n in range(3)}


def as_bytes(trees: dict[str, Any]) -> dict[str, bytes]:
    """Trees as JSON, and lists as JSON lines where the name says so."""
    return {
        name: "".join(json.dumps(tree) + "\n" for tree in content).encode()
        if name.endswith(".jsonl")
        else json.dumps(content).encode()
        for name, content in trees.items()
    }


def asked(name: str, trees: dict[str, Any], read: Any, pictures: dict[str, bytes]) -> Reader:
    """A reader of questions."""
    return Reader(name, {**pictures, **as_bytes(trees)}, json_files(trees), lambda folder, changed: list(read(folder)))


PICTURE_FILES = {
    "rgb.png": PNG, "grey16.png": encoded("PNG", "I;16"), "palette.png": encoded("PNG", "P"),
    "alpha.png": encoded("PNG", "RGBA"), "a.jpg": encoded("JPEG"), "cmyk.jpg": encoded("JPEG", "CMYK"),
    "exif.jpg": encoded("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    "a.webp": encoded("WEBP"), "a.gif": encoded("GIF"), "a.bmp": encoded("BMP"), "a.tif": encoded("TIFF"),
    "lab.tif": encoded("TIFF", "LAB"), "lzw.tif": encoded("TIFF", compression="tiff_lzw"),
    "float.tif": encoded("TIFF", "F"), "a.jp2": encoded("JPEG2000"), "a.ppm": encoded("PPM"), "a.ico": encoded("ICO"),
    "a.tga": encoded("TGA"), "a.avif": encoded("AVIF"),
}  # fmt: skip


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size."""
    return PNG[:16] + struct.pack(">II", width % 2**32, height % 2**32) + PNG[24:]


def picture_files(rng: Random) -> dict[str, bytes]:
    """One of the pictures, its header lying about sizes, or two formats in one file."""
    name = rng.choice(list(PICTURE_FILES))
    content = PICTURE_FILES[name]
    match rng.randrange(4):
        case 0:
            content = huge_png(rng.choice([0, 1, 60_000, 2**31 - 1, 2**32 - 1]), rng.choice([0, 1, 60_000, 2**32 - 1]))
        case 1:
            other = PICTURE_FILES[rng.choice(list(PICTURE_FILES))]
            cut = rng.randrange(min(64, len(content)))
            content = content[:cut] + other[cut:]
        case 2:
            content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" + content
        case _:
            content = content[: rng.randrange(len(content))]
    return {name: content}


def read_picture(folder: Path, changed: str) -> object:
    """The changed picture."""
    return open_picture(folder / changed).size


def odd_tensor(rng: Random) -> Any:
    """A tensor, or what stands in a tensor's place, that a reader of features does not expect."""
    good = torch.ones(4, 3)
    makers: list[Callable[[], Any]] = [
        lambda: good, lambda: good.half(), lambda: good.double(), lambda: good.int(), lambda: good.bool(),
        lambda: good.to(torch.complex64), lambda: torch.ones(()), lambda: torch.ones(0, 3),
        lambda: good * 1e38 * 10,
        lambda: good / 0, lambda: good.to_sparse(), lambda: torch.ones(1, 1).expand(10**6, 10**6),
        lambda: torch.quantize_per_tensor(good, 0.1, 0, torch.qint8), lambda: torch.empty(9, 9, device="meta"),
        lambda: torch.nn.Parameter(good), lambda: good.t(), lambda: [good, good], lambda: {"a": good, 3: good},
        lambda: {"a": {"b": good}}, lambda: odd_values(rng), lambda: good.to(torch.float8_e4m3fn),
        lambda: torch.ones(4, 3, 2), lambda: good.bfloat16(),
    ]  # fmt: skip
    return rng.choice(makers)()


def torch_bytes(value: Any, legacy: bool = False) -> bytes:
    """What `torch.save` writes, in its form of before 1.6 if `legacy`."""
    buffer = io.BytesIO()
    if legacy:
        _write_legacy(value, buffer)
    else:
        torch.save(value, buffer)
    return buffer.getvalue()


def _write_legacy(value: Any, buffer: io.BytesIO) -> None:
    """The old form with numbers as the storages' names: torch takes addresses, and a seed would name many files."""
    storages: dict[int, tuple[str, Any]] = {}

    class Writer(pickle.Pickler):
        def persistent_id(self, found: Any) -> Any:
            if not isinstance(found, torch.storage.TypedStorage):
                return None
            item: Any = found
            key, _ = storages.setdefault(item._untyped_storage._cdata, (str(len(storages)), item))
            return "storage", getattr(torch, item._pickle_storage_type()), key, "cpu", item._size(), None

    system = {
        "protocol_version": PROTOCOL_VERSION,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    for head in (MAGIC_NUMBER, PROTOCOL_VERSION, system):
        pickle.dump(head, buffer, protocol=2)
    Writer(buffer, protocol=2).dump(value)
    pickle.dump([key for key, _ in storages.values()], buffer, protocol=2)
    for _, storage in storages.values():
        buffer.write(struct.pack("<q", storage._size()) + bytes(storage._untyped_storage))


def npy_bytes(array: Any) -> bytes:
    """What `np.save` writes."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def safetensors_bytes(header: Any, data: bytes, rng: Random) -> bytes:
    """A safetensors file with any header; its length lies now and then."""
    text = json_bytes(header, rng)
    length = rng.choice([len(text), len(text), len(text), 10**8, 2**63, 0, len(text) + 1])
    return struct.pack("<Q", length) + text + data


TENSOR = torch.arange(12.0).reshape(4, 3)
HEADER = {"features": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}}
TENSOR_FILES = {
    "x.pt": torch_bytes(TENSOR),
    "old.pt": torch_bytes(TENSOR, legacy=True),
    "x.npy": npy_bytes(TENSOR.numpy()),
    "x.safetensors": safetensors.torch.save({"features": TENSOR}),
}


def tensor_files(rng: Random) -> dict[str, bytes]:
    """Files of tensors of every form, with odd tensors, odd headers or odd descriptions."""
    name = rng.choice(list(TENSOR_FILES))
    if name.endswith(".pt"):
        try:
            return {name: torch_bytes(odd_tensor(rng), legacy=name == "old.pt")}
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, RecursionError):
            return {name: mutated_bytes(TENSOR_FILES[name], rng)}
    if name == "x.npy":
        shape = rng.choice(["(4, 3)", "(-4, 3)", "(10**9,)", "(1000000000000, 3)", "4", "()", "(" * 90, "('a',)"])
        kind = rng.choice(["'<f4'", "'>f4'", "'O'", "'<f2'", "'S9'", "[('a', '<f4')]", "3", "'<i8'", "'x'", "'M8[ns]'"])
        order = rng.choice(["False", "True", "3"])
        text = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
        content = TENSOR_FILES[name]
        version = rng.choice([b"\x01\0", b"\x01\0", b"\x02\0", b"\x09\0"])
        return {name: content[:6] + version + struct.pack("<H", len(text) + 1) + text + b"\n" + content[-48:]}
    return {name: safetensors_bytes(mutated_tree(HEADER, rng), bytes(48), rng)}


def read_tensor(folder: Path, changed: str) -> object:
    """The changed file, imported as a store that is thrown away."""
    try:
        return import_tensor(folder / changed, folder / "store", "model").manifest.rows
    finally:
        shutil.rmtree(folder / "store", ignore_errors=True)


def store_files() -> dict[str, bytes]:
    """A finished feature store."""
    place = Path(os.environ.get("TMPDIR", "/tmp")) / f"fuzz-store-{os.getpid()}"
    shutil.rmtree(place, ignore_errors=True)
    keys = ["a", "b", "c", "d"]
    plan = StorePlan("m", "r", "image", 4, 3, "fp32", "s", False, hash_keys(keys), "fp32", 2)
    writer = StoreWriter(place, plan, keys)
    with writer.lock():
        writer.start()
        for shard in writer.missing():
            rows = writer.rows_of(shard)
            writer.write(shard, TENSOR[rows.start : rows.stop], 0.0)
        writer.finish()
    found = {path.name: path.read_bytes() for path in place.iterdir() if not path.name.startswith(".")}
    shutil.rmtree(place)
    return found


def readers() -> list[Reader]:
    """All of them."""
    store = store_files()
    store_trees = {name: json.loads(store[name]) for name in ("manifest.json", "keys.json")}
    table = csv_files("x.csv")
    return [
        Reader("csv", {"x.csv": CSV, **PICTURES}, table, source("x.csv")),
        _image_folder(),
        Reader("jsonl", {**as_bytes({"x.jsonl": ROWS}), **PICTURES}, json_files({"x.jsonl": ROWS}), source("x.jsonl")),
        Reader("parquet", {"x.parquet": parquet_bytes(PARQUET_ROWS)}, parquet_files, source("x.parquet")),
        Reader("webdataset", {"x.tar": tar_bytes(TAR)}, tar_files, source("x.tar")),
        Reader(
            "llava json, captions",
            {**as_bytes({"x.json": CONVERSATIONS}), **PICTURES},
            json_files({"x.json": CONVERSATIONS}),
            source("x.json"),
        ),
        asked(
            "llava json, questions",
            {"x.json": CONVERSATIONS},
            lambda f: read_conversations(f / "x.json", f),
            PICTURES,
        ),
        asked(
            "vqa json",
            {"q.json": VQA, "a.json": VQA_ANSWERS},
            lambda f: read_vqa(f / "q.json", f / "a.json", f),
            COCO,
        ),
        asked("textvqa json", {"x.json": TEXTVQA}, lambda f: read_textvqa(f / "x.json", f), PICTURES),
        asked("gqa json", {"x.json": GQA}, lambda f: read_gqa(f / "x.json", f), PICTURES),
        asked("pope jsonl", {"x.jsonl": POPE}, lambda f: read_pope(f / "x.jsonl", f), PICTURES),
        asked("scienceqa json", {"x.json": SCIENCE}, lambda f: read_scienceqa(f / "x.json", f), {"0/0.png": PNG}),
        Reader("pictures", PICTURE_FILES, picture_files, read_picture),
        Reader("imported tensors", TENSOR_FILES, tensor_files, read_tensor),
        Reader(
            "feature store", store, json_files(store_trees), lambda folder, changed: FeatureStore.open(folder).rows[:2]
        ),
    ]


def _image_folder() -> Reader:
    files = {"metadata.csv": CSV.replace(b"image,", b"file_name,"), **PICTURES}
    return Reader("image folder", files, csv_files("metadata.csv", "file_name"), source(""))

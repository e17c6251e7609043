"""Every reader meets some hundred wrong files and reads or refuses them; `benchmarks/fuzz.py` gives it thousands."""

import io
import json
import pickle
import struct
import tarfile
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import fuzz
import pytest
import torch
from fuzz_data import torch_bytes
from fuzz_mutate import LONG, json_bytes, mutated_bytes, mutated_tree
from fuzz_reader import Reader
from hypothesis import given, settings
from hypothesis import strategies as st

from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import MAX_DEPTH, parse_json, parse_yaml

READERS = {reader.name: reader for reader in fuzz.all_readers()}
INPUTS = 200
DEAR = {"recipe yaml": 20, "jsonl": 100, "llava json, captions": 100, "csv": 100, "image folder": 100}
"""Those that take milliseconds for each input."""


@pytest.mark.parametrize("name", READERS)
def test_a_reader_reads_or_refuses(name: str, tmp_path: Path) -> None:
    count = fuzz.fuzz(READERS[name], range(DEAR.get(name, INPUTS)), tmp_path)
    assert not count.kinds
    assert count.refused


@pytest.mark.parametrize("name", READERS)
def test_the_unchanged_files_are_read(name: str, tmp_path: Path) -> None:
    """A reader that refuses everything would pass the test above."""
    reader = READERS[name]
    fuzz.put(tmp_path, reader.files)
    if name == "stitched vlm":  # ends where the text model would be loaded, which is not there
        with pytest.raises(HymaError, match="no sentence-transformers directory"):
            reader.read(tmp_path, "config.json")
        return
    for changed in reader.changeable:
        assert reader.read(tmp_path, changed) is not None


def test_a_crash_is_seen(tmp_path: Path) -> None:
    def crash(folder: Path, changed: str) -> object:
        content = (folder / changed).read_bytes()
        if content == b"right":
            return True
        raise KeyError(changed) if content else HymaError("empty")

    reader = Reader("crashing", {"x": b"right"}, lambda rng: {"x": rng.choice([b"", b"wrong"])}, crash)
    count = fuzz.fuzz(reader, range(60), tmp_path, tmp_path / "kept")
    assert count.crashes and count.refused and count.inputs == 60
    assert count.accepted + count.refused + count.crashes == 60
    assert next(iter(count.kinds)).startswith("KeyError at test_fuzz.py")
    assert (tmp_path / "x").read_bytes() == b"right"
    assert list((tmp_path / "kept").iterdir())


def test_a_table_keeps_the_readers_that_did_not_run(tmp_path: Path) -> None:
    path = tmp_path / "fuzz.json"
    fuzz.write_table(path, [fuzz.Count("a", inputs=3), fuzz.Count("b", inputs=3, crashes=1)])
    fuzz.write_table(path, [fuzz.Count("b", inputs=5)])
    lines = {line["reader"]: line for line in json.loads(path.read_text())["readers"]}
    assert {name: (line["inputs"], line["crashes"]) for name, line in lines.items()} == {"a": (3, 0), "b": (5, 0)}
    assert all(line["versions"]["python"] for line in lines.values())


def test_a_seed_names_its_input() -> None:
    for reader in READERS.values():
        for seed in (2, 3, 5):
            first, again = fuzz.drawn(reader, seed), fuzz.drawn(reader, seed)
            assert first.keys() == again.keys()
            if reader.name != "archives":  # zips hold the time; everything else is the same to the byte
                assert first == again


def test_the_old_form_of_torch_is_written_as_torch_reads_it() -> None:
    state = {"model": {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.arange(3, dtype=torch.bfloat16), "c": 3}}
    state["model"]["same"] = state["model"]["a"]
    kept = [torch.zeros(4) for _ in range(9)]  # other addresses
    content = torch_bytes(state, legacy=True)
    assert content == torch_bytes({"model": dict(state["model"])}, legacy=True) and kept
    read = torch.load(io.BytesIO(content), weights_only=True)["model"]
    assert torch.equal(read["a"], state["model"]["a"]) and torch.equal(read["b"], state["model"]["b"])
    assert read["c"] == 3 and read["same"].data_ptr() == read["a"].data_ptr()
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    assert len(buffer.getvalue()) > len(content) > 0.8 * len(buffer.getvalue())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_parse_json_is_json(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text) == json.loads(text)
    assert parse_json(text.encode()) == value


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60))
def test_no_text_breaks_the_parsers(text: bytes | str) -> None:
    for parse in (parse_json, parse_yaml):
        given_text = text.decode("utf-8", "replace") if isinstance(text, bytes) and parse is parse_yaml else text
        with suppress(ValueError):
            parse(given_text)  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(JSON, st.integers())
def test_mutations_leave_the_original(value: Any, seed: int) -> None:
    before = repr(value)
    rng = Random(seed)
    with suppress(RecursionError, ValueError, TypeError):  # what JSON cannot say
        json_bytes(mutated_tree(value, rng), rng)
    assert repr(value) == before
    assert isinstance(mutated_bytes(b"abc", rng), bytes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "nested"),
        (LONG, "digits"),
        ('"\\ud800"', "surrogate"),
        ("{", "Expecting"),
    ],
)
def test_json_out_of_bounds(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_at_the_bound() -> None:
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(text) is not None
    assert parse_json('"\\ud83d\\ude00"') == "😀"


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than"),
        ("[" * 5000, "nested"),
        ("a: &a [*a]", "holds itself"),
        ("!!python/object/apply:os.getcwd []", "constructor"),
        ("a: [", "flow"),
    ],
)
def test_yaml_out_of_bounds(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)


def test_yaml_with_honest_aliases() -> None:
    assert parse_yaml("a: &x {k: 1}\nb: *x") == {"a": {"k": 1}, "b": {"k": 1}}


def read_with(name: str, folder: Path, files: dict[str, bytes]) -> object:
    reader = READERS[name]
    fuzz.put(folder, {**reader.files, **files})
    return reader.read(folder, next(iter(files)))


def sparse_tar(size: int) -> bytes:
    """A tar whose one picture is a hole of this size, in GNU's old form."""
    info = tarfile.TarInfo("0.png")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"00000000000\0", b"00000000000\0"
    header[483:495] = f"{size:011o}\0".encode()
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + bytes(1024)


def test_a_tar_of_holes_is_refused(tmp_path: Path) -> None:
    content = sparse_tar(8_000_000_000)
    (tmp_path / "check.tar").write_bytes(content)
    with tarfile.open(tmp_path / "check.tar") as tar:
        assert [(found.size, found.issparse()) for found in tar] == [(8_000_000_000, True)]
    with pytest.raises(HymaError, match="claims"):
        read_with("webdataset", tmp_path, {"x.tar": content})


def test_a_pickle_that_numbers_far_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HymaError, match="numbers a value"):
        read_with("numpy pickles", tmp_path, {"x.pkl": b"\x80\x02]r\xff\xff\xff\x7f."})


def test_a_gguf_count_is_not_believed(tmp_path: Path) -> None:
    key = b"tokens"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    content = head + struct.pack("<IIQ", 9, 4, 2**60)
    with pytest.raises(HymaError, match="longer than the file"):
        read_with("gguf", tmp_path, {"x.gguf": content})


def test_pickles_of_a_release_do_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (tmp_path / "ran").touch, ()

    import io

    import torch

    buffer = io.BytesIO()
    torch.save({"0.weight": Evil()}, buffer)
    for name in ("vit_s16_mlp1_minilm.pt", "vit_s16_mlp1_minilm.pth"):
        content = buffer.getvalue() if name.endswith(".pt") else pickle.dumps(Evil())
        with pytest.raises(HymaError, match="cannot be read as plain tensors"):
            read_with("release connectors", tmp_path / "files", {name: content})
    assert not (tmp_path / "ran").exists()


def test_a_number_that_cannot_be_written_down_is_refused() -> None:
    with pytest.raises(ValueError, match="4300"):
        parse_yaml("a: [{b: 0x" + "f" * 5000 + "}]")

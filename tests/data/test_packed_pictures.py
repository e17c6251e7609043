"""Pictures in large files: every row finds its own bytes, in any order, and collecting rows holds none of them."""

import gc
import io
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hyma_mllm.data import packed_pictures as module
from hyma_mllm.data.collection import DataConfig, collect, open_sources
from hyma_mllm.data.packed_pictures import ParquetPicture, parquet_rows
from hyma_mllm.data.pictures import BadPicture, open_picture
from hyma_mllm.data.sources import open_source
from hyma_mllm.data.threads import in_order
from hyma_mllm.errors import HymaError

MEGABYTE = 1 << 20


def noise(seed: int, side: int) -> bytes:
    """A PNG that does not compress: about 3 bytes a pixel."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def make_parquet(folder: Path, pictures: list[bytes]) -> str:
    table = pa.table({"image": pictures, "caption": [f"thing {number}" for number in range(len(pictures))]})
    pq.write_table(table, folder / "x.parquet", row_group_size=10)
    return str(folder / "x.parquet")


def make_struct_parquet(folder: Path, pictures: list[bytes]) -> str:
    """As `datasets` writes it, and without what tells that no row lacks a picture."""
    cells = [{"bytes": picture, "path": None} for picture in pictures]
    table = pa.table({"image": cells, "caption": [f"thing {number}" for number in range(len(pictures))]})
    pq.write_table(table, folder / "x.parquet", row_group_size=10, write_statistics=False)
    return str(folder / "x.parquet")


def make_tar(folder: Path, pictures: list[bytes]) -> str:
    with tarfile.open(folder / "x.tar", "w") as tar:
        for number, picture in enumerate(pictures):
            for name, data in ((f"{number:05d}.png", picture), (f"{number:05d}.txt", f"thing {number}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(folder / "x.tar")


@pytest.mark.parametrize("make", [make_parquet, make_struct_parquet, make_tar])
def test_memory_does_not_grow_with_the_pictures(make: Callable[[Path, list[bytes]], str], tmp_path: Path) -> None:
    """Collecting three times the rows, 40 MB of pictures more, costs no megabytes more."""
    peaks, pools = [], []
    for count in (30, 90):
        folder = tmp_path / str(count)
        folder.mkdir()
        spec = make(folder, [noise(seed, 480) for seed in range(count)])
        assert Path(spec).stat().st_size > count * 0.65 * MEGABYTE
        config = DataConfig(sources=[spec])
        gc.collect()
        module._row_group.cache_clear()
        tracemalloc.start()
        (part,) = collect(open_sources(config), config, folder / "bad.jsonl")
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(part.rows) == count and held < 2 * MEGABYTE
        peaks.append(peak)
        pools.append(pa.total_allocated_bytes())
    assert peaks[1] < peaks[0] + 4 * MEGABYTE
    # What Arrow still holds is what was read last, not what was read.
    assert pools[1] < pools[0] + 4 * MEGABYTE


def test_listing_rows_reads_no_pictures_where_none_is_missing(tmp_path: Path) -> None:
    spec = make_parquet(tmp_path, [noise(seed, 480) for seed in range(20)])
    before = pa.default_memory_pool().bytes_allocated()
    most = 0
    for _, place in parquet_rows([Path(spec)], ["image"]):
        assert place is not None
        most = max(most, pa.default_memory_pool().bytes_allocated() - before)
    assert most < MEGABYTE / 2


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("struct", [True, False])
def test_rows_without_a_picture_keep_their_place(tmp_path: Path, statistics: bool, struct: bool) -> None:
    held = [b"one", None, b"three", None, None, b"six", b"", b"eight"]
    cells = [{"bytes": cell, "path": f"{number}.png"} for number, cell in enumerate(held)] if struct else held
    several = [[f"a{number}", "b"] for number in range(8)]
    table = pa.table({"id": [f"r{number}" for number in range(8)], "picture": cells, "caption": several})
    file = tmp_path / "x.parquet"
    pq.write_table(table, file, row_group_size=3, write_statistics=statistics)
    rows = list(parquet_rows([file, file], ["image", "picture"]))
    assert [cells["id"] for cells, _ in rows] == [f"r{number}" for number in range(8)] * 2
    assert [cells["caption"] for cells, _ in rows] == several * 2
    read = [place.read_bytes() if place else None for _, place in rows]
    assert [one or None for one in read] == [one or None for one in held] * 2
    if struct:
        assert [cells["picture"]["path"] for cells, _ in rows] == [f"{number}.png" for number in range(8)] * 2
    else:
        assert {cells["picture"] for cells, _ in rows} == {None}


def test_a_column_of_paths_has_no_places(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a.png", None], "caption": ["a", "b"]}), tmp_path / "x.parquet")
    assert list(parquet_rows([tmp_path / "x.parquet"], ["image"])) == [
        ({"image": "a.png", "caption": "a"}, None),
        ({"image": None, "caption": "b"}, None),
    ]


def test_pictures_alone_and_a_file_without_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x", b"y"]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"picture": [b"x"], "caption": ["a"]}), tmp_path / "1.parquet")
    assert [place is not None for _, place in parquet_rows([tmp_path / "0.parquet"], ["image"])] == [True, True]
    with pytest.raises(HymaError, match=r"0\.parquet has no column caption"):
        open_source(str(tmp_path / "0.parquet"))
    with pytest.raises(HymaError, match=r"1\.parquet has no column image"):
        open_source(str(tmp_path / "1.parquet"))
    # A later file without it gives rows without a picture, which the audit counts and lists.
    pq.write_table(pa.table({"image": [b"x"], "caption": ["a"]}), tmp_path / "0.parquet")
    assert [row.image != b"" for row in open_source(str(tmp_path)).rows()] == [True, False]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    group=st.integers(1, 30),
    window=st.integers(1, 200),
    data=st.data(),
)
def test_any_order_of_reading_finds_the_bytes(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], group: int, window: int, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("order") / "x.parquet"
    held = [bytes([number]) * size for number, size in enumerate(sizes)]
    pq.write_table(pa.table({"image": held, "caption": ["a"] * len(held)}), file, row_group_size=group)
    order = data.draw(st.lists(st.integers(0, len(held) - 1), max_size=40))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "WINDOW_BYTES", window)
        patched.setattr(module, "WINDOW_ROWS", 2)
        patched.setattr(module, "WINDOWS", 2)
        rows = [place for _, place in parquet_rows([file], ["image"])]
        read = [place.read_bytes() for number in order if (place := rows[number])]
        shared = in_order(lambda place: place.read_bytes(), [place for place in rows if place], 4, 3)
        assert list(shared) == held
    assert read == [held[number] for number in order]


def test_a_large_group_is_read_window_by_window(tmp_path: Path) -> None:
    """Three files of one row group each, the last three times the first: what is held stays the same."""
    most = []
    for count in (60, 180):
        file = tmp_path / f"{count}.parquet"
        table = pa.table({"image": [noise(seed, 330) for seed in range(count)], "caption": ["a"] * count})
        # Pages of a few pictures, as a writer of pictures makes them.
        pq.write_table(table, file, row_group_size=count, use_dictionary=False, write_batch_size=4)
        del table
        module._row_group.cache_clear()
        before, highest = pa.total_allocated_bytes(), 0
        for number in range(count):
            assert len(ParquetPicture(file, "image", 0, number).read_bytes()) > 300_000
            highest = max(highest, pa.total_allocated_bytes() - before)
        most.append(highest)
    assert most[1] < module.WINDOW_BYTES * (module.WINDOWS + 2) < 180 * 330 * 330 * 3 * 2
    assert most[1] < most[0] * 3


def test_a_file_that_is_cut_off_is_a_bad_picture(tmp_path: Path) -> None:
    spec = Path(make_parquet(tmp_path, [noise(seed, 40) for seed in range(12)]))
    rows = list(open_source(str(spec)).rows())
    content = spec.read_bytes()
    module._row_group.cache_clear()
    spec.write_bytes(content[: len(content) // 2])
    with pytest.raises(BadPicture):
        open_picture(rows[-1].image)
    spec.unlink()
    with pytest.raises(BadPicture, match="does not exist"):
        open_picture(rows[-1].image)

"""What a long run of the fuzz suite found, made small: names longer than any file's, damaged words about columns."""

import subprocess
import sys
from pathlib import Path

import fuzz
import pytest

from hyma_mllm.foreign import is_file
from hyma_mllm.report import ranked_pairs
from hyma_mllm.search.ranking import Ranking, SearchResult

CHILD = """
import sys
from pathlib import Path
from hyma_mllm.data.packed_pictures import parquet_rows
try:
    for _ in parquet_rows([Path(sys.argv[1])], ["image"]):
        pass
except (OSError, ValueError) as error:
    print("refused")
"""


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "absent"])
def test_a_name_that_no_file_can_have_is_no_file(name: str, tmp_path: Path) -> None:
    assert not is_file(tmp_path / name)
    (tmp_path / "here").write_bytes(b"")
    assert is_file(tmp_path / "here")


def test_a_method_that_ran_for_another_connector_ranks_no_pair_here() -> None:
    models = [{"id": "a", "revision": "r", "width": 3}]
    rankings = [Ranking("hyma", "linear", 0, {"retrieval": [1.0]}), Ranking("grid", "mlp1", 0, {"retrieval": [2.0]})]
    result = SearchResult("vlm", models, models, ["retrieval"], rankings)  # type: ignore[arg-type]
    assert ranked_pairs(result, "hyma", "mlp1", "retrieval") == []
    assert [pair.place for pair in ranked_pairs(result, "hyma", "linear", "retrieval")] == [1]


@pytest.mark.parametrize("seed", [1617, 6904])
def test_damaged_words_about_a_column_do_not_end_the_process(seed: int, tmp_path: Path) -> None:
    """pyarrow aborts where it is asked for them; so the file is read in a process of its own."""
    reader = next(reader for reader in fuzz.all_readers() if reader.name == "parquet")
    path = tmp_path / "x.parquet"
    path.write_bytes(fuzz.drawn(reader, seed)["x.parquet"])
    done = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]

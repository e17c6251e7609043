"""What the step benchmarks share."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"

PEAK_OF_A_PASSING_TENSOR = """
import json, sys
import torch
sys.path.insert(0, json.loads(sys.argv[2])["scripts"])
import measure
earlier = torch.ones(200_000_000, dtype=torch.uint8)
del earlier
before = measure.start_of_peak("cpu")
passing = torch.ones(100_000_000, dtype=torch.uint8)
del passing
print(json.dumps({"before": before, "peak": measure.peak("cpu")}))
"""


@pytest.fixture
def measure(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("measure")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the mark of the peak is reset on Linux only")
def test_a_peak_counts_what_was_freed_and_not_what_came_before(measure: ModuleType, tmp_path: Path) -> None:
    # In a process of its own, as the benchmarks measure: this one's C library may hold freed memory to hand out again.
    script = tmp_path / "script.py"
    script.write_text(PEAK_OF_A_PASSING_TENSOR, encoding="utf-8")
    found = measure.in_fresh_process(str(script), {"scripts": str(SCRIPTS)}, 0.0)
    assert 95_000_000 < found["peak"] - found["before"] < 130_000_000


def test_a_fresh_process_gets_case_and_environment_and_its_last_line_is_read(
    measure: ModuleType, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\nprint('noise')\nprint(json.dumps({'argv': sys.argv[1:], 'seen': os.environ['SEEN']}))\n",
        encoding="utf-8",
    )
    found = measure.in_fresh_process(str(script), {"batch": 8}, 1.5, SEEN="yes")
    assert found == {"argv": ["--case", '{"batch": 8}', "--seconds", "1.5"], "seen": "yes"}

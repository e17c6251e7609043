"""The fuzzer of `benchmarks/`, importable."""

import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "benchmarks"

if str(SCRIPTS) not in sys.path:
    sys.path.insert(0, str(SCRIPTS))

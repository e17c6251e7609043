"""The helper modules beside the tests are imported by their names, as the scripts that tests start import them."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"

for folder in ("data", "search", "stitched", "end_to_end"):
    sys.path.insert(0, str(Path(__file__).with_name(folder)))

# Their assertions show their values, as those of the tests do.
pytest.register_assert_rewrite("tiny_prompts", "finetune_run")


@pytest.fixture
def load_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a script of benchmarks/ by its name: it and what it imports from there are new to each test."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for script in SCRIPTS.glob("*.py"):
        monkeypatch.delitem(sys.modules, script.stem, raising=False)
    return importlib.import_module

"""The helper modules beside the tests are imported by their names, as the scripts that tests start import them."""

import sys
from pathlib import Path

import pytest

for folder in ("data", "search", "stitched", "end_to_end"):
    sys.path.insert(0, str(Path(__file__).with_name(folder)))

# Their assertions show their values, as those of the tests do.
pytest.register_assert_rewrite("tiny_prompts", "finetune_run")

"""The helper modules beside the tests are imported by their names, as the scripts that tests start import them."""

import sys
from pathlib import Path

for folder in ("data", "search"):
    sys.path.insert(0, str(Path(__file__).with_name(folder)))

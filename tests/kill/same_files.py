"""Whether two runs left the same files, but for what each measures of itself: seconds, bytes of memory, its machine."""

import json
import zlib
from pathlib import Path
from typing import Any

VOLATILE = ("seconds", "peak_bytes", "command")
"""JSON keys of what one run measures of itself, and of how it was started."""
TIMED = ("log.jsonl", "report.html")
"""Files that tell of seconds throughout; a log holds the steps that a kill made necessary again."""


def numbers(path: Path) -> dict[str, float]:
    """Every number of a JSON file by its place, e.g. `rankings/0/scores/retrieval/3`; other values as their hash."""
    found: dict[str, float] = {}

    def walk(value: Any, place: str) -> None:
        if isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                walk(item, f"{place}/{key}")
        else:
            found[place] = float(value) if isinstance(value, int | float) else float(zlib.crc32(str(value).encode()))

    walk(json.loads(path.read_text()), "")
    return found


def contents(root: Path) -> dict[str, object]:
    """Relative path -> bytes of every file; JSON files without what a run measures; directories None."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            found[name] = None
        elif path.name in TIMED:
            found[name] = "present"
        elif path.suffix == ".json" and path.name != "ranking.json":
            found[name] = _steady(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes()
    return found


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(item) for key, item in value.items() if key not in VOLATILE}
    return [_steady(item) for item in value] if isinstance(value, list) else value


def differences(one: dict[str, object], other: dict[str, object]) -> dict[str, str]:
    """Path -> `missing`, `left over` or `other`, of what two directories do not share; the first is what is wanted."""
    found = dict.fromkeys(one.keys() - other.keys(), "missing")
    found |= dict.fromkeys(other.keys() - one.keys(), "left over")
    return found | {name: "other" for name in one.keys() & other.keys() if one[name] != other[name]}

"""Reading `ranking.json` and `ledger.json`: JSON objects that carry the number of their schema."""

import json
from pathlib import Path
from typing import Any

from hyma_mllm.errors import HymaError


def read_json(path: Path, schema: int) -> dict[str, Any]:
    """The object in a JSON file of ours.

    Args:
        path: the file.
        schema: the schema number that it must carry.

    Raises:
        HymaError: when it is missing, is not JSON, is not an object, or has another schema number.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HymaError(f"{path} cannot be read ({error.strerror}); name a file that a search wrote.") from error
    except ValueError as error:
        raise HymaError(f"{path} is not JSON ({error}); it is damaged, write it again with a search.") from error
    if not isinstance(content, dict) or "schema" not in content:
        raise HymaError(f"{path} has no schema number, so no search wrote it; name a file that one did.")
    if content["schema"] != schema:
        raise HymaError(f"{path} has schema {content['schema']} but this version reads {schema}; update, or run again.")
    return content


def describe(error: Exception) -> str:
    """What was wrong with a file's content, for an error message."""
    return f"the key {error} is missing" if isinstance(error, KeyError) else str(error)

"""Reading `ranking.json` and `ledger.json`: JSON objects that carry the number of their schema."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import parse_json


def read_json(path: Path, schema: int) -> dict[str, Any]:
    """The object in a JSON file of ours.

    Args:
        path: the file.
        schema: the schema number that it must carry.

    Raises:
        HymaError: when it is missing, is not JSON, is not an object, or has another schema number.
    """
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise HymaError(f"{path} cannot be read ({error.strerror}); name a file that a search wrote.") from error
    except ValueError as error:
        raise HymaError(f"{path} is not JSON ({error}); it is damaged, write it again with a search.") from error
    if not isinstance(content, dict) or "schema" not in content:
        raise HymaError(f"{path} has no schema number, so no search wrote it; name a file that one did.")
    if content["schema"] != schema:
        raise HymaError(
            f"{path} has schema {content['schema']!r:.40} but this version reads {schema}; update, or run again."
        )
    return content


def describe(error: Exception) -> str:
    """What was wrong with a file's content, for an error message."""
    return f"the key {error} is missing" if isinstance(error, KeyError) else str(error)


def check_whole(lists: Mapping[str, Sequence[str]], data: Mapping[str, Any], where: str) -> None:
    """Refuse a result that has nothing to show, or whose `data` a table could not show.

    Args:
        lists: what each list holds -> its names, which must be there, each once.
        data: of the result, see docs/schema.md.
        where: the file, for the message.

    Raises:
        HymaError: it is such a result.
    """
    for what, names in lists.items():
        if not names or len(set(names)) < len(names):
            raise HymaError(f"{where} lists no {what}, or one of them twice; write it again with a search.")
    prior = data.get("prior", {})
    mappings = [data.get(name, {}) for name in ("fingerprints", "rows", "splits")] + [prior]
    whole = isinstance(data.get("attribution", []), list) and all(isinstance(one, dict) for one in mappings)
    if not whole or not all(isinstance(share, int | float) for share in prior.values()):
        raise HymaError(f"The data of {where} are not what docs/schema.md says; write it again with a search.")

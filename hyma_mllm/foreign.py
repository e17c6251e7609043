"""What comes from elsewhere: JSON and YAML as plain values within limits, and what libraries raise on damaged files.

Every reader of a user's file goes through here, so that no file can do more than be refused: not by nesting, not by
aliases that double, not by numbers or letters that Python itself turns down later, far from the file.
"""

import csv
import dataclasses
import json
import lzma
import pickle
import re
import struct
import tarfile
import tokenize
import types
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

MAX_DEPTH = 64
"""Lists and mappings inside each other; no file that the package reads nests a fifth of it."""

MAX_YAML_NODES = 100_000
"""Values of a YAML file, those of an alias counted wherever it stands."""

UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    csv.Error,
    lzma.LZMAError,
    pickle.UnpicklingError,
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    tokenize.TokenError,
    zlib.error,
    SafetensorError,
    StrictDataclassError,  # transformers' of a config with a value of another type
)
"""What a library may raise on a damaged file. For the one call that reads it, never around code of our own."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Pairs = Callable[[list[tuple[str, Any]]], dict[str, Any]]
K = TypeVar("K")


def reason(error: BaseException) -> str:
    """What an error says, in one line that is not too long; its kind where it says nothing."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 200 else f"{said[:197]}..."


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that a foreign file gives may be longer than any can be."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def parse_json(text: str | bytes, pairs: Pairs | None = None) -> Any:
    """The value of a JSON text.

    Args:
        text: of the file; bytes are UTF-8, with or without a mark of it.
        pairs: makes the mapping of each object from its names and values.

    Raises:
        ValueError: it is no JSON (then a `json.JSONDecodeError`), nests deeper than `MAX_DEPTH`, or holds a number of
            thousands of digits or half a surrogate pair, neither of which can be written down again.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    if _too_deep(value):
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # a UnicodeEncodeError is a ValueError
    return value


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, of plain types only.

    Raises:
        ValueError: it is no YAML, nests deeper than `MAX_DEPTH`, is larger than `MAX_YAML_NODES`, or holds a number of
            thousands of digits, which cannot be written down again.
    """
    check_yaml(text)
    try:
        value = yaml.safe_load(text)
        repr(value)  # a hexadecimal number passes Python's limit of digits on its way in, not on its way out
        return value
    except (yaml.YAMLError, RecursionError, AttributeError, TypeError, LookupError) as error:
        raise ValueError(reason(error)) from error


def check_yaml(text: str) -> None:
    """Refuse a YAML text that nests too deeply, or grows too large by aliases of aliases; its values are not made.

    Raises:
        ValueError: it does, or it is no YAML.
    """
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # (anchor, nodes before it)
    nodes = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, nodes))
                nodes += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = open_nodes.pop()
                if anchor:
                    sizes[anchor] = nodes - before
            elif isinstance(event, yaml.ScalarEvent):
                nodes += 1
                if event.anchor:
                    sizes[event.anchor] = 1
            elif isinstance(event, yaml.AliasEvent):
                if any(event.anchor == anchor for anchor, _ in open_nodes):
                    raise ValueError(f"its anchor {event.anchor} holds itself")
                nodes += sizes.get(str(event.anchor), 1)
            if len(open_nodes) > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
            if nodes > MAX_YAML_NODES:
                raise ValueError(f"it holds more than {MAX_YAML_NODES:,} values")
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(reason(error)) from error


def build(kind: type[K], raw: Any) -> K:
    """A dataclass from a mapping of a file, every field of the type that the class says.

    Args:
        kind: the dataclass.
        raw: name of a field -> its value; values that are dataclasses or tuples are made already.

    Raises:
        TypeError: it is no mapping, lacks a field, has one too many, or one of another type.
    """
    if not isinstance(raw, Mapping):
        raise TypeError(f"{raw!r:.40} holds no named fields")
    made = kind(**raw)
    hints = get_type_hints(kind)
    for field in dataclasses.fields(made):  # type: ignore[arg-type]
        value = getattr(made, field.name)
        if not _fits(value, hints[field.name]):
            raise TypeError(f"{field.name} is {value!r:.40}")
    return made


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return isinstance(value, str | int | None) and value in inner
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if hint in (int, float):
        wanted = int if hint is int else (int, float)
        return isinstance(value, wanted) and not isinstance(value, bool)
    return isinstance(value, hint)


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for one in level
            for child in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True

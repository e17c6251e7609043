"""Valid files made wrong: bytes changed blindly, and values of a tree changed where they hurt.

Everything is drawn from a `random.Random`, so that a seed names its input again.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from random import Random
from typing import Any

TOKENS = (
    b"\0", b"\xff", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff" * 8, b"\0" * 8, b"\x80\0\0\0",
    b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\r\n", b"\n", b"\r", b'"', b"'", b",", b"[", b"]", b"{", b"}",
    b"[" * 300, b"{" * 300, b"NaN", b"Infinity", b"1e999", b"-1", b"null", b"9" * 40, b"..", b"/", b"\\", b"\\ud800",
    b"\\u0000", b"&a", b"*a", b"<<", b"!!python/object:os.system", b"PK\x03\x04", b"\x1f\x8b", b"%PDF", b"GIF89a",
)  # fmt: skip
"""What parsers stumble over."""

SIZES = (0, 1, -1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)

LONG = "9" * 5000
"""Written into a JSON text as a number of more digits than Python reads."""

_LONG_MARK = "\x01long\x01"


def odd_values(rng: Random) -> Any:
    """A value that a field does not expect."""
    return rng.choice(
        [
            None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400, 1e308, 5e-324, float("nan"),
            float("inf"), -float("inf"), 1.5, "", " ", "0", "-1", "1e999", "\0", "a\0b", "\ud800", "\u202e", "\ufeff",
            "é" * 300, "x" * 5000, "../../../etc/passwd", "/dev/zero", "/dev/stdin", "/", ".", "..", "a/b",
            "<script>alert(1)</script>", "[/red]", "{{ 7 * 7 }}", "%s%n", "NaN", "١٢٣", [], {}, [[]], [None],
            {"": None}, ["a", 1], [1, "a", None], {"a": {"b": [1, 2, {"c": None}]}}, nested(rng.choice([10, 70, 2000])),
            _LONG_MARK,
        ]
    )  # fmt: skip


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def mutated_tree(tree: Any, rng: Random) -> Any:
    """A copy of plain containers and values, with one to four places changed."""
    root = {"": deepcopy(tree)}
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = list(_places(root))
        if not places:
            break
        holder, key = rng.choice(places)
        _change(holder, key, rng)
    return root.get("")


def _places(holder: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of everything in it."""
    if depth > 20:
        return
    items = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))
    for key, value in items:
        yield holder, key
        if isinstance(value, dict | list):
            yield from _places(value, depth + 1)


def _change(holder: Any, key: Any, rng: Random) -> None:
    what = rng.randrange(8)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[rng.choice(["", "x", f"{key}x", str(key).upper(), "\ud800", "__class__"])] = holder.pop(key)
    elif what == 1:
        holder.append(deepcopy(holder[key]))
    elif what == 2 and isinstance(holder, list):
        holder.extend(deepcopy(holder[: rng.choice([1, 2, 50])]))
    elif what == 3 and isinstance(holder[key], str):
        text = holder[key]
        holder[key] = rng.choice([text * 2, text[:-1], f"{text}\0", f" {text}", text.swapcase(), f"../{text}", [text]])
    elif what == 4 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = rng.choice([-holder[key], holder[key] + 1, str(holder[key]), holder[key] * 10**9, [holder[key]]])
    else:
        holder[key] = odd_values(rng)


def json_bytes(tree: Any, rng: Random) -> bytes:
    """The tree as JSON, now and then in another encoding, with a name twice or with what is no JSON at all."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    text = text.replace(json.dumps(_LONG_MARK), LONG)
    match rng.randrange(30):
        case 0:
            return text.encode("utf-16", "surrogatepass")
        case 1:
            return b"\xef\xbb\xbf" + text.encode("utf-8", "surrogatepass")
        case 2 if text.startswith("{") and '":' in text:
            first = text[1 : text.index('":') + 2]
            return f"{{{first} null, {text[1:]}".encode("utf-8", "surrogatepass")
        case 3:
            return (text[:-1] + rng.choice([",]", "", "}}", " // x"])).encode("utf-8", "surrogatepass")
        case 4:
            return b"[" * rng.choice([100, 100_000]) + text.encode("utf-8", "surrogatepass")
    return text.encode("utf-8", "surrogatepass")


def lines_bytes(trees: list[Any], rng: Random) -> bytes:
    """One JSON value a line."""
    return b"".join(json_bytes(tree, rng).replace(b"\n", b" ") + b"\n" for tree in trees)


def mutated_bytes(data: bytes, rng: Random) -> bytes:
    """The bytes with one to six places changed, more often near the beginning, where headers stand."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        _spoil(found, rng)
    return bytes(found)


def _spoil(found: bytearray, rng: Random) -> None:
    length = len(found)
    at = rng.randrange(min(length, 256) if rng.random() < 0.5 else length) if length else 0
    span = rng.choice([1, 2, 4, 8, 16, 64])
    match rng.randrange(8):
        case 0 if length:
            found[at] ^= 1 << rng.randrange(8)
        case 1 if length:
            found[at] = rng.randrange(256)
        case 2:
            size, order = rng.choice([1, 2, 4, 8]), rng.choice(["little", "big"])
            found[at : at + size] = (rng.choice(SIZES) % 256**size).to_bytes(size, order)  # type: ignore[arg-type]
        case 3:
            del found[at : at + span]
        case 4:
            found[at:at] = found[at : at + span]
        case 5:
            found[at:at] = rng.choice(TOKENS)
        case 6:
            del found[at:]
        case _:
            found[at : at + span] = rng.randbytes(span)


Files = Mapping[str, bytes]
"""Name -> content of the files of an input."""

Structured = Callable[[Random], dict[str, bytes]]
"""Draws the files that an input changes."""


def json_files(trees: Mapping[str, Any]) -> Structured:
    """One of several JSON files changed; a name that ends in `.jsonl` holds a list, one value a line."""

    def draw(rng: Random) -> dict[str, bytes]:
        name = rng.choice(list(trees))
        tree = mutated_tree(trees[name], rng)
        if name.endswith(".jsonl"):
            return {name: lines_bytes(tree if isinstance(tree, list) else [tree], rng)}
        return {name: json_bytes(tree, rng)}

    return draw

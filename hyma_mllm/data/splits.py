"""Splits by concept: what a picture shows never stands in two parts, under whatever style or source."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from hyma_mllm.data.rows import Row
from hyma_mllm.data.words import caption_key
from hyma_mllm.errors import HymaError


@dataclass(frozen=True)
class Split:
    """Row numbers of each part, ascending; every row is in exactly one."""

    train: list[int]
    validation: list[int]
    test: list[int]


def split_by_concept(rows: Sequence[Row], seed: int, validation: float = 0.1, test: float = 0.15) -> Split:
    """Parts of about these shares of the concepts, decided concept by concept through a hash of its name and the seed.

    Rows are one concept when their concepts or any of their captions have the same `caption_key`, or a chain of such
    rows joins them. Adding rows moves no other concept than those that the new rows join together.

    Args:
        rows: all rows of the run.
        seed: another seed is another split.
        validation: share of the concepts, in [0, 1).
        test: share of the concepts, in [0, 1).

    Raises:
        HymaError: shares that leave no training part, or too few concepts for a part that was asked for.
    """
    if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise HymaError(
            f"A validation share of {validation} and a test share of {test} leave no part for training; "
            "both must be at least 0 and their sum below 1."
        )
    concepts = joined_concepts(rows)
    parts = _dealt(concepts, seed, validation, test)
    for part, share in (("train", 1.0), ("validation", validation), ("test", test)):
        if share > 0 and not parts[part]:
            raise HymaError(
                f"{len(rows)} rows of {len(set(concepts))} concepts are too few: none fell to the {part} part "
                f"(share {share}); give more rows, a larger share or another split seed."
            )
    return Split(**parts)


def split_by_key(keys: Sequence[str], seed: int, validation: float, test: float) -> Split:
    """Parts of about these shares of rows whose concepts are not known, decided row by row as those of concepts are.

    Args:
        keys: of the rows.
        seed: another seed is another split.
        validation: share of the rows, in (0, 1).
        test: share of the rows, in (0, 1).

    Raises:
        HymaError: too few rows for a part.
    """
    parts = _dealt(keys, seed, validation, test)
    for part, members in parts.items():
        if not members:
            raise HymaError(
                f"{len(keys)} imported rows are too few: none fell to the {part} part; give more rows, a larger share "
                "or another data.split_seed."
            )
    return Split(**parts)


def joined_concepts(rows: Sequence[Row]) -> list[str]:
    """For each row the name of its joined concept: the first in order of the keys that the chain holds."""
    parents: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        parents.setdefault(node, node)
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    names = set[str]()
    for number, row in enumerate(rows):
        for key in {caption_key(text) for text in (row.concept, *row.texts)}:
            names.add(key)
            parents[root(number)] = root(key)
    smallest: dict[Hashable, str] = {}
    for name in names:
        top = root(name)
        smallest[top] = min(name, smallest.get(top, name))
    return [smallest[root(number)] for number in range(len(rows))]


def _dealt(names: Sequence[str], seed: int, validation: float, test: float) -> dict[str, list[int]]:
    """Row numbers of each part; rows of one name are in one part."""
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for number, name in enumerate(names):
        at = _unit_hash(f"{seed}\0{name}")
        parts["test" if at < test else "validation" if at < test + validation else "train"].append(number)
    return parts


def _unit_hash(text: str) -> float:
    """Uniform in [0, 1), the same on every machine."""
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big") / 2**56

"""Fewer questions, chosen so that guessing without the picture pays as little as the questions allow.

In easy-VQA yes and no are equally frequent over all, but the wording gives 82 percent of them away: "is there a blue
shape?" is mostly no, "is there no blue shape?" mostly yes. A subset is worth a blind baseline only if it is balanced
under every wording.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import TypeVar

from hyma_mllm.data.rows import Row
from hyma_mllm.errors import HymaError

Item = TypeVar("Item")

logger = logging.getLogger(__name__)

YES_NO = frozenset(("yes", "no"))


def balanced(rows: Sequence[Row], limit: int, seed: int = 0) -> list[Row]:
    """At most `limit` rows, in their order: question types alike often, and in each type the answers.

    Yes/no questions are taken in pairs of one yes and one no to the same wording, as far as there are such pairs; other
    questions in turns over their answers (or over the places of the right choice), and under each over the wordings.
    The choice is a hash of key and seed: the same on every machine, and it moves little when rows are added.

    Args:
        rows: questions with answers.
        limit: rows at most; 0 takes all rows as they are, without balancing.
        seed: another seed is another choice.

    Raises:
        HymaError: a negative limit.
    """
    if limit < 0:
        raise HymaError(f"The limit of questions is {limit}; give a number of rows, or 0 for all.")
    if limit == 0:
        return list(rows)
    types = _grouped(range(len(rows)), lambda number: rows[number].question_type or "")
    queues = [_ordered(rows, types[kind], seed) for kind in sorted(types)]
    taken = sorted(_in_turns(queues, limit))
    if len(taken) < min(limit, len(rows)):
        logger.warning(
            "%d of the %d questions asked for: there are no more whose answers can be balanced", len(taken), limit
        )
    return [rows[number] for number in taken]


def right_answer(row: Row) -> str:
    """The answer that most annotators gave, the first of equals; empty where there is none."""
    return max(dict.fromkeys(row.answers), key=row.answers.count, default="")


def shuffled(keys: Sequence[str], seed: int, what: str = "") -> list[int]:
    """Numbers of the keys in the order of a hash of key, seed and purpose."""
    return sorted(range(len(keys)), key=lambda number: (_digest(f"{seed}\0{what}\0{keys[number]}"), keys[number]))


def _ordered(rows: Sequence[Row], numbers: Sequence[int], seed: int) -> list[list[int]]:
    """One type's row numbers in groups that are taken whole, the first groups being the most balanced."""
    mixed = [numbers[place] for place in shuffled([rows[number].key for number in numbers], seed)]
    if {right_answer(rows[number]).casefold() for number in numbers} == YES_NO:
        wordings = _grouped(mixed, lambda number: rows[number].question or "")
        return [list(pair) for pair in _turns([_pairs(rows, members) for members in wordings.values()])]
    answers = _grouped(mixed, lambda number: _answer_to_balance(rows[number]))
    by_wording = [
        list(_turns(list(_grouped(members, lambda number: rows[number].question or "").values())))
        for members in answers.values()
    ]
    return [[number] for number in _turns(by_wording)]


def _answer_to_balance(row: Row) -> str:
    """The answer, or where the question itself offers it, its place among the choices."""
    answer = right_answer(row)
    return str(row.choices.index(answer)) if answer in row.choices else answer


def _pairs(rows: Sequence[Row], numbers: Sequence[int]) -> list[tuple[int, int]]:
    yes = [number for number in numbers if right_answer(rows[number]).casefold() == "yes"]
    no = [number for number in numbers if right_answer(rows[number]).casefold() == "no"]
    return list(zip(yes, no, strict=False))


def _in_turns(queues: Sequence[list[list[int]]], limit: int) -> Iterator[int]:
    """Row numbers, from the type that has the fewest so far, until none is left or the limit is reached."""
    counts, places = [0] * len(queues), [0] * len(queues)
    while True:
        open_types = [
            kind
            for kind, queue in enumerate(queues)
            if places[kind] < len(queue) and sum(counts) + len(queue[places[kind]]) <= limit
        ]
        if not open_types:
            return
        kind = min(open_types, key=counts.__getitem__)
        group = queues[kind][places[kind]]
        places[kind] += 1
        counts[kind] += len(group)
        yield from group


def _turns(lists: Sequence[Sequence[Item]]) -> list[Item]:
    """The first of every list, then the second of every list, ..."""
    return [members[place] for place in range(max(map(len, lists))) for members in lists if place < len(members)]


def _grouped(numbers: Iterable[int], name: Callable[[int], str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for number in numbers:
        groups.setdefault(name(number), []).append(number)
    return groups


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()

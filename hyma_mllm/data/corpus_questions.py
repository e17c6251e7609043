"""Questions about the pictures of the caption corpora, drawn from their names and classes.

Six types, balanced so that the words of a question tell next to nothing about its answer:

| type | question | answer |
|---|---|---|
| what | What is this? | its name; keywords of its metadata earn part of the score |
| kind | What kind of thing is this? | its class |
| either name, either kind | Is this a A or a B? | A as often as B; every word is right as often as it is wrong |
| exists name | Is there a X in the picture? | yes as often as no for every X |
| exists kind | Is this a X? | likewise |

Wrong names come from the same part of the split by concept, so that a held-out name occurs in no training question.
"""

import logging
from collections.abc import Callable, Iterator, Sequence

from hyma_mllm.data.corpus_questions_names import Thing, alike, there_is, things_of, with_article
from hyma_mllm.data.questions_balance import shuffled
from hyma_mllm.data.questions_json import ANNOTATORS, repeated
from hyma_mllm.data.rows import Row
from hyma_mllm.data.splits import joined_concepts

logger = logging.getLogger(__name__)

CAPTION_REQUEST = "Describe this picture in a few words."
TYPES = ("what", "kind", "either name", "either kind", "exists name", "exists kind")


def corpus_questions(rows: Sequence[Row], parts: Sequence[Sequence[int]], seed: int) -> list[list[Row]]:
    """The questions about each part of a split.

    Keys are `<key of the picture's row>#<type>`, with `#<type>/yes` and `#<type>/no` for the existence questions.

    Args:
        rows: the corpora's rows; their `concept` counts, joined as the split joins it.
        parts: row numbers of each part, no concept in two of them.
        seed: of the choice of wrong answers.

    Returns:
        For each part its questions, ordered by type and row.
    """
    things = things_of(rows, joined_concepts(rows))
    return [list(_part_questions([things[number] for number in part], seed)) for part in parts]


def corpus_captions(rows: Sequence[Row]) -> list[Row]:
    """For alignment: each picture with a request to describe it, and its first caption as the answer.

    Keys are `<key of the picture's row>#caption`, the type is `caption`.
    """
    return [
        Row(
            key=f"{row.key}#caption",
            image=row.image,
            texts=row.texts,
            concept=row.concept,
            question=CAPTION_REQUEST,
            answers=repeated(row.texts[0]),
            turns=((CAPTION_REQUEST, row.texts[0]),),
            question_type="caption",
        )
        for row in rows
    ]


def _part_questions(things: Sequence[Thing], seed: int) -> Iterator[Row]:
    named = [thing for thing in things if thing.name]
    for thing in named:
        yield _question(thing, "what", "What is this?", _annotators(thing.name or "", thing.keywords, seed, 3, 1))
    kinds = [thing for thing in things if thing.kind]
    for thing in kinds:
        kind = thing.kind or ""
        yield _question(
            thing, "kind", "What kind of thing is this?", _annotators(kind, _alternatives(kind), seed, 2, 2)
        )
    by_name = _opposed(named, lambda thing: thing.name or "", _other_thing, seed, "name")
    yield from _either("either name", by_name)
    yield from _either("either kind", _by_kind([thing for thing in kinds if " or " not in (thing.kind or "")], seed))
    yield from _exists("exists name", there_is, by_name)
    yield from _exists("exists kind", lambda kind: f"Is this {with_article(kind)}?", _by_kind(kinds, seed))


def _question(
    thing: Thing, kind: str, question: str, answers: tuple[str, ...], detail: str = "", choices: tuple[str, ...] = ()
) -> Row:
    return Row(
        key=f"{thing.row.key}#{kind}{detail}",
        image=thing.row.image,
        texts=(),
        concept=thing.concept,
        label=thing.row.label,
        class_set=thing.row.class_set,
        question=question,
        answers=answers,
        question_type=kind,
        choices=choices,
    )


def _either(kind: str, opposed: Sequence[tuple[Thing, str, str]]) -> Iterator[Row]:
    """The right word stands first in every second question."""
    for number, (thing, right, wrong) in enumerate(opposed):
        choices = (right, wrong) if number % 2 else (wrong, right)
        asked = f"Is this {with_article(choices[0])} or {with_article(choices[1])}?"
        yield _question(thing, kind, asked, repeated(right), choices=choices)


def _exists(kind: str, asked: Callable[[str], str], opposed: Sequence[tuple[Thing, str, str]]) -> Iterator[Row]:
    for thing, right, wrong in opposed:
        yield _question(thing, kind, asked(right), repeated("yes"), "/yes")
        yield _question(thing, kind, asked(wrong), repeated("no"), "/no")


def _by_kind(things: Sequence[Thing], seed: int) -> list[tuple[Thing, str, str]]:
    """Each thing with its class and a wrong one of the same class set: classes of two sets may mean the same."""
    opposed = []
    for class_set in sorted({thing.row.class_set or "" for thing in things}):
        members = [thing for thing in things if thing.row.class_set == class_set]
        opposed += _opposed(members, lambda thing: thing.kind or "", _other_kind, seed, f"kind {class_set}")
    return opposed


def _opposed(
    things: Sequence[Thing], word: Callable[[Thing], str], fair: Callable[[Thing, Thing], bool], seed: int, purpose: str
) -> list[tuple[Thing, str, str]]:
    """Each thing with its own word and a wrong one, every word being wrong as often as it is right.

    The wrong words are the right ones in another order. A thing for which no fair partner is left is left out, and
    counted.
    """
    order = shuffled([thing.row.key for thing in things], seed, purpose)
    partners = _permuted(order, lambda one, other: fair(things[one], things[other]))
    if len(partners) < len(things):
        logger.info(
            "%d of %d questions by %s have no fair wrong answer", len(things) - len(partners), len(things), purpose
        )
    return [(things[one], word(things[one]), word(things[partners[one]])) for one in order if one in partners]


def _permuted(order: Sequence[int], fair: Callable[[int, int], bool]) -> dict[int, int]:
    """A fair partner for each number: as many as can be, each the partner of one, all in rings.

    Greedy first, which mixes well; those that are left take theirs along augmenting paths (Kuhn).
    """
    partners: dict[int, int] = {}
    # Partners are tried from half way round, so that neighbours in the order do not simply trade places.
    free = [*order[len(order) // 2 :], *order[: len(order) // 2]]
    for one in order:
        place = next((place for place, other in enumerate(free) if fair(one, other)), None)
        if place is not None:
            partners[one] = free.pop(place)
    owners = {other: one for one, other in partners.items()}
    for one in [one for one in order if one not in partners]:
        _augment(one, order, fair, partners, owners)
    _close_rings(partners, fair)
    return partners


def _augment(
    start: int, order: Sequence[int], fair: Callable[[int, int], bool], partners: dict[int, int], owners: dict[int, int]
) -> None:
    """Give `start` a partner by moving others to other ones, if that can be done; breadth first."""
    reached: dict[int, int] = {}
    queue = [start]
    for one in queue:
        for other in order:
            if other in reached or not fair(one, other):
                continue
            reached[other] = one
            if other in owners:
                queue.append(owners[other])
                continue
            while True:
                taker = reached[other]
                given_up = partners.get(taker)
                partners[taker], owners[other] = other, taker
                if given_up is None:
                    return
                other = given_up


def _close_rings(partners: dict[int, int], fair: Callable[[int, int], bool]) -> None:
    """Shorten every open chain until its end may point to its beginning: a word is wrong as often as it is right."""
    pointed_at = set(partners.values())
    for start in [one for one in partners if one not in pointed_at]:
        chain = [start]
        while chain[-1] in partners:
            chain.append(partners[chain[-1]])
        while chain and not fair(chain[-1], start):
            partners.pop(chain.pop(), None)
        if chain:
            partners[chain[-1]] = start


def _other_thing(thing: Thing, other: Thing) -> bool:
    """Whether the other's name is surely wrong for the thing."""
    one_name, other_name = thing.name or "", other.name or ""
    return (
        thing.concept != other.concept
        and (thing.kind is None or thing.kind != other.kind)
        and not alike(one_name, other_name)
        and not any(alike(other_name, keyword) for keyword in thing.keywords)
        and not any(alike(one_name, keyword) for keyword in other.keywords)
    )


def _other_kind(thing: Thing, other: Thing) -> bool:
    return not alike(thing.kind or "", other.kind or "") and not (thing.name and alike(thing.name, other.kind or ""))


def _alternatives(kind: str) -> tuple[str, ...]:
    """`insect or snail` may be answered by either; a class of one word has no alternative."""
    words = kind.split(" or ")
    return tuple(words) if len(words) > 1 else ()


def _annotators(main: str, others: Sequence[str], seed: int, most: int, each: int) -> tuple[str, ...]:
    """Ten answers: `each` of at most `most` others, and the main one for the rest.

    One vote in ten earns 30 percent, two earn 60, four and more earn all.
    """
    chosen = [others[number] for number in shuffled(others, seed, main)[:most]]
    votes = [word for word in chosen for _ in range(each)]
    return (main,) * (ANNOTATORS - len(votes)) + tuple(votes)

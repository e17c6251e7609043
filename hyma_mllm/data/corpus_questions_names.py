"""What a row of a caption corpus shows, in the few words that a question or an answer has room for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hyma_mllm.data.rows import Row
from hyma_mllm.data.words import caption_key

MAX_WORDS = 3

_NAME = re.compile(r"[a-z][a-z' -]*[a-z]")
_ARTICLE = re.compile(r"^(?:an?|the|some) ")
_LISTED = re.compile(r": (?:an emoji for|a drawing of) (.+)$")
_SMALL = frozenset("a an and as at for from in item of on one or piece set the thing to with".split())  # noqa: SIM905
_PLURAL = re.compile(r"(?<![iusx])s$")
_VOWEL = re.compile(r"(?!uni|use|eu|one\b)[aeiou]|hour|honest")


@dataclass(frozen=True)
class Thing:
    """One picture of a corpus.

    Attributes:
        row: its row.
        concept: its joined concept, the same for all pictures of one thing.
        name: at most three words without article, in lower case; None where its caption has no such.
        kind: its class, in lower case, where it has one.
        keywords: further words for it, in lower case.
    """

    row: Row
    concept: str
    name: str | None
    kind: str | None
    keywords: tuple[str, ...]


def thing_of(row: Row, concept: str) -> Thing:
    """What the row shows; `concept` is its joined one."""
    kind = row.label.casefold() if row.label else None
    name = short_name(row)
    keywords = tuple(word for word in keywords_of(row) if name is None or caption_key(word) != caption_key(name))
    return Thing(row, concept, name, kind, keywords)


def short_name(row: Row) -> str | None:
    """The caption without its article, if it is short; else its concept, as the caption spells it."""
    caption = row.texts[0].casefold().replace("’", "'").strip(" .!")
    name = _ARTICLE.sub("", caption)
    if not _is_name(name):
        found = re.search(rf"\b{re.escape(row.concept)}\w?\b", caption)
        name = found[0] if found else ""
    return name if _is_name(name) else None


def keywords_of(row: Row) -> tuple[str, ...]:
    """The keywords that stand in the corpus' second caption (`robot: an emoji for face and monster`)."""
    found = [_LISTED.search(text) for text in row.texts[1:]]
    parts = [part for match in found if match for part in re.split(r", | and ", match[1].casefold())]
    return tuple(dict.fromkeys(part for part in parts if _is_name(part)))


def with_article(words: str) -> str:
    """`a dog`, `an owl`, and `glasses` as it is."""
    if words == "money" or _plural(words):
        return words
    return f"an {words}" if _VOWEL.match(words) else f"a {words}"


def there_is(words: str) -> str:
    """`Is there a dog in the picture?`, `Are there glasses in the picture?`."""
    return f"{'Are' if _plural(words) else 'Is'} there {with_article(words)} in the picture?"


def alike(one: str, other: str) -> bool:
    """Whether two names or classes share a word that counts, so that the question would not be fair."""
    return not _words(one).isdisjoint(_words(other))


def _plural(words: str) -> bool:
    last = words.split()[-1]
    return len(last) > 3 and _PLURAL.search(last) is not None


def _words(text: str) -> frozenset[str]:
    return frozenset(caption_key(word) for word in re.split(r"[\s-]+", text) if word not in _SMALL)


def _is_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text)) and len(text.split()) <= MAX_WORDS


def things_of(rows: Sequence[Row], concepts: Sequence[str]) -> list[Thing]:
    """A thing for each row."""
    return [thing_of(row, concept) for row, concept in zip(rows, concepts, strict=True)]

"""The one row type of every source of pictures and words."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hyma_mllm.data.pictures import PackedPicture


@dataclass(frozen=True)
class Row:
    """One picture with its words.

    Attributes:
        key: stable and unique in its source, e.g. `fluent/1f600`.
        image: a file, the encoded bytes of one, or a place in a larger file; no bytes (`b""`) where a row has no
            picture.
        texts: its captions, none empty; at least one, but for a row with a question, which needs none.
        concept: what it shows, the same under every drawing style; splits never part one concept.
        label: its class name in `class_set`, where it has one.
        class_set: which `ClassSet` the label belongs to.
        question: for visual question answering.
        answers: the human answers to `question`, one an annotator, in ten-annotator form: a single right answer stands
            ten times.
        turns: (question, answer) of each turn of a conversation about the picture; the first is `question` and
            `answers[0]`. A caption to be learnt is a turn that asks for one. Empty unless a source holds conversations.
        question_type: what kind of question it is, by which scores are broken down.
        choices: what the question offers to choose from, in order; where `answers` are letters, `A` is the first.
    """

    key: str
    image: Path | bytes | PackedPicture
    texts: tuple[str, ...]
    concept: str
    label: str | None = None
    class_set: str | None = None
    question: str | None = None
    answers: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    question_type: str | None = None
    choices: tuple[str, ...] = ()


class Source(Protocol):
    """Where rows come from. `fingerprint` changes whenever a key, a picture or a text changes."""

    name: str
    licence: str

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over keys, texts and pictures."""
        ...

    def rows(self) -> Iterator[Row]:
        """All rows in a fixed order, unchecked: `sources.audit` passes the good ones."""
        ...

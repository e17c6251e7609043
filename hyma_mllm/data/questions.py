"""One way to open questions about pictures: the published file forms, and the two built-in sets.

| spec | what it reads |
|---|---|
| `llava:FILE.json,IMAGES` | LLaVA's conversations and captions |
| `vqa:QUESTIONS.json,ANNOTATIONS.json,IMAGES` | VQAv2, OK-VQA |
| `textvqa:FILE.json,IMAGES` | TextVQA |
| `gqa:FILE.json,IMAGES` | GQA |
| `pope:FILE.json,IMAGES` | POPE |
| `scienceqa:problems.json,IMAGES` | ScienceQA, all questions; `scienceqa-image:` only those with a picture |
| `questions:easy-vqa` | the published easy-VQA, its own split |
| `questions:corpora` | questions about the built-in corpora, held-out concepts; `questions:corpora+fluent` names them |
| `questions:captions` | requests to describe the same pictures, the same split; `questions:captions+fluent` likewise |

`/train`, `/validation` or `/test` behind a built-in set takes one part of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

from hyma_mllm.data import question_formats as formats
from hyma_mllm.data.audit import BadRow
from hyma_mllm.data.corpora import CORPORA, default_corpora, load_corpus
from hyma_mllm.data.corpus_questions import corpus_captions, corpus_questions
from hyma_mllm.data.easy_vqa import LICENCE, easy_vqa_folder, easy_vqa_part, easy_vqa_rows
from hyma_mllm.data.questions_audit import audit_questions
from hyma_mllm.data.rows import Row
from hyma_mllm.data.splits import split_by_concept
from hyma_mllm.errors import HymaError, near_names

PartName = Literal["train", "validation", "test"]

BUILT_IN = ("easy-vqa", "corpora", "captions")

_FORMS: dict[str, tuple[Callable[..., Iterator[Row]], tuple[str, ...]]] = {
    "llava": (formats.read_conversations, ("FILE.json", "IMAGES")),
    "vqa": (formats.read_vqa, ("QUESTIONS.json", "ANNOTATIONS.json", "IMAGES")),
    "textvqa": (formats.read_textvqa, ("FILE.json", "IMAGES")),
    "gqa": (formats.read_gqa, ("FILE.json", "IMAGES")),
    "pope": (formats.read_pope, ("FILE.json", "IMAGES")),
    "scienceqa": (formats.read_scienceqa, ("problems.json", "IMAGES")),
    "scienceqa-image": (partial(formats.read_scienceqa, image_only=True), ("problems.json", "IMAGES")),
}


@dataclass(frozen=True)
class SplitShares:
    """How rows are split that have no published split.

    Attributes:
        seed: another seed is another split.
        validation: share of the concepts or pictures.
        test: share of the concepts or pictures.
    """

    seed: int = 0
    validation: float = 0.1
    test: float = 0.15


@dataclass
class QuestionSource:
    """Questions that are read and checked, but for their pictures' pixels.

    Attributes:
        name: the spec that it was opened by.
        licence: of pictures and words, as far as this program knows it.
        questions: all of them, in order.
        shares: of the split, where none is published.
        published: the questions of each part where the parts are given; some may be empty.
        pictures_checked: every picture is known to be good.
    """

    name: str
    licence: str
    questions: list[Row]
    shares: SplitShares
    published: dict[PartName, list[Row]] | None = None
    pictures_checked: bool = False

    def rows(self) -> Iterator[Row]:
        """All questions, unchecked: `questions_audit` passes the good ones."""
        return iter(self.questions)

    @cached_property
    def parts(self) -> dict[PartName, list[Row]]:
        """The questions of each part: as published, else split so that no picture is in two of them.

        Raises:
            HymaError: too few pictures for a part.
        """
        return self.published or split_questions(self.questions, self.shares)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over every word of every row and the content of every picture, each read once."""
        whole, pictures = sha256(), dict[object, bytes]()
        for row in self.rows():
            if row.image not in pictures:
                held = row.image if isinstance(row.image, bytes) else row.image.read_bytes()
                pictures[row.image] = sha256(held).digest()
            whole.update(repr(replace(row, image=b"")).encode())
            whole.update(pictures[row.image])
        return whole.hexdigest()


def open_questions(spec: str, shares: SplitShares | None = None) -> QuestionSource:
    """The questions that `spec` names, read, checked and split.

    A published split stands (easy-VQA's, ScienceQA's); its validation part, where it has none, is a share of the
    training pictures. The corpora's questions are split by concept exactly as the corpora themselves, user files by
    picture.

    Args:
        spec: see the module.
        shares: of the split; None takes the defaults of the VLM case.

    Raises:
        HymaError: no such form or set, a file or a picture is missing, or a row is wrong.
    """
    shares = shares or SplitShares()
    form, colon, place = spec.partition(":")
    if form == "questions" and colon:
        return _built_in(spec, place, shares)
    if form not in _FORMS or not colon:
        raise HymaError(
            f"The question source {spec} has no known form; {near_names(form, [*_FORMS, 'questions'])} (as in "
            "`textvqa:FILE.json,IMAGES` or `questions:easy-vqa`)."
        )
    read, wanted = _FORMS[form]
    paths = [Path(part).expanduser() for part in place.split(",")]
    if len(paths) != len(wanted) or not all(part.strip() for part in place.split(",")):
        raise HymaError(f"{spec} names {place.count(',') + 1} places; give `{form}:{','.join(wanted)}`.")
    rows = list(read(*paths))
    published = _as_published(rows, formats.scienceqa_part, shares) if form.startswith("scienceqa") else None
    return QuestionSource(spec, "as its owner says", rows, shares, published)


def split_questions(rows: Sequence[Row], shares: SplitShares) -> dict[PartName, list[Row]]:
    """The rows of each part, by concept: of files the picture, of the corpora what it shows.

    Raises:
        HymaError: too few concepts for a part.
    """
    split = split_by_concept(rows, shares.seed, shares.validation, shares.test)
    numbers = zip(get_args(PartName), (split.train, split.validation, split.test), strict=True)
    return {part: [rows[number] for number in members] for part, members in numbers}


def good_parts(
    source: QuestionSource, max_bad_fraction: float = 0.01, check_pictures: bool = True, without_picture: bool = False
) -> tuple[dict[PartName, list[Row]], list[BadRow]]:
    """The good questions of each part, and the refused ones with their reasons; arguments as of `audit_questions`.

    Raises:
        HymaError: too many bad rows, or too few pictures for a part.
    """
    checked = audit_questions(source, max_bad_fraction, check_pictures, without_picture)
    if source.published is None:
        return split_questions(checked.rows, source.shares), checked.bad
    refused = {row.key for row in checked.bad}
    parts = {part: [row for row in rows if row.key not in refused] for part, rows in source.published.items()}
    return parts, checked.bad


def _built_in(spec: str, place: str, shares: SplitShares) -> QuestionSource:
    named, _, part = place.partition("/")
    name, *corpora = named.split("+")
    if name not in BUILT_IN:
        raise HymaError(f"There are no built-in questions {name}; {near_names(name, BUILT_IN)}")
    if part and part not in get_args(PartName):
        raise HymaError(f"{spec} has no part {part}; {near_names(part, get_args(PartName))}")
    if name != "easy-vqa":
        parts, licence = _about_corpora(name, corpora or default_corpora(), shares)
    elif corpora:
        raise HymaError(f"{spec} adds corpora to easy-vqa, which has none; write questions:easy-vqa.")
    else:
        parts, licence = _as_published(list(easy_vqa_rows(easy_vqa_folder())), easy_vqa_part, shares), LICENCE
    if part:
        parts = {other: rows if other == part else [] for other, rows in parts.items()}
    questions = [row for rows in parts.values() for row in rows]
    return QuestionSource(spec, licence, questions, shares, parts, pictures_checked=True)


def _about_corpora(name: str, corpora: Sequence[str], shares: SplitShares) -> tuple[dict[PartName, list[Row]], str]:
    """Questions or requests for captions about the corpora, split as the corpora are; and their licences."""
    rows = [row for corpus in corpora for row in load_corpus(corpus).rows()]
    split = split_by_concept(rows, shares.seed, shares.validation, shares.test)
    numbers = (split.train, split.validation, split.test)
    if name == "captions":
        about = [corpus_captions([rows[number] for number in part]) for part in numbers]
    else:
        about = corpus_questions(rows, numbers, shares.seed)
    licences = dict.fromkeys(CORPORA[corpus].licence for corpus in corpora)
    return dict(zip(get_args(PartName), about, strict=True)), ", ".join(licences)


def _as_published(
    rows: Sequence[Row], part_of: Callable[[Row], PartName], shares: SplitShares
) -> dict[PartName, list[Row]]:
    """The published parts; where there is no validation part, it is a share of the training pictures."""
    parts: dict[PartName, list[Row]] = {part: [] for part in get_args(PartName)}
    for row in rows:
        parts[part_of(row)].append(row)
    if shares.validation > 0 and parts["train"] and not parts["validation"]:
        within = split_questions(parts["train"], SplitShares(shares.seed, shares.validation, 0.0))
        parts |= {"train": within["train"], "validation": within["validation"]}
    return parts

"""Rows out of the files that question sets are published in, each in its own form.

- the key of every row is `<picture>#<question id>`, its concept the picture, so that a split never parts one picture
- every question file is read whole and checked row by row: fields, unique ids, a file for every picture
- single right answers are repeated ten times, in the form of ten annotators
"""

from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from hyma_mllm.data.questions_json import (
    Entry,
    PictureFolder,
    Unique,
    entries,
    listed_under,
    read_json,
    read_json_lines,
    repeated,
)
from hyma_mllm.data.readers import IMAGE_TAG
from hyma_mllm.data.rows import Row
from hyma_mllm.errors import HymaError

COCO_PARTS = ("train2014", "val2014", "test2015")
SCIENCEQA_PARTS: dict[str, Literal["train", "validation", "test"]] = {
    "train": "train",
    "val": "validation",
    "test": "test",
}
SPEAKERS = {"human": 0, "gpt": 1, "user": 0, "assistant": 1}


def read_conversations(file: Path, images: Path) -> Iterator[Row]:
    """LLaVA's json: a list of `id`, `image` and `conversations`; a conversation is one row with all its turns.

    Captions for alignment (a request to describe the picture, and its caption) are conversations of one turn. One
    without a picture gives a row without one, which `questions_audit` refuses and counts.
    """
    held = read_json(file)
    if not isinstance(held, list) or not held:
        raise HymaError(
            f"{file} holds no list of conversations; give a LLaVA json, `[{{id, image, conversations}}, ...]`."
        )
    folder, unique = PictureFolder(images), Unique(file)
    for number, entry in enumerate(entries(file, held)):
        identity = unique.check(entry.text("id") if "id" in entry.cells else f"{number:09d}", entry.place)
        picture = entry.text("image") if entry.cells.get("image") else None
        turns = _turns(entry)
        yield Row(
            key=f"{picture}#{identity}" if picture else identity,
            image=folder.find(entry, picture) if picture else b"",
            texts=(),
            concept=picture or identity,
            question=turns[0][0],
            answers=repeated(turns[0][1]),
            turns=turns,
            question_type="conversation" if len(turns) > 1 else "single turn",
        )


def read_vqa(questions: Path, annotations: Path, images: Path) -> Iterator[Row]:
    """VQAv2 and OK-VQA: `questions` and `annotations` files that belong together, COCO's pictures."""
    folder = PictureFolder(images)
    asked, answered = _by_id(questions, "questions"), _by_id(annotations, "annotations")
    _same_questions(questions, annotations, asked, answered)
    for identity, entry in asked.items():
        told = answered[identity]
        picture = entry.text("image_id")
        if told.text("image_id") != picture:
            raise HymaError(
                f"Question {identity} asks about picture {picture} in {questions} and about {told.text('image_id')} in "
                f"{annotations}; give files of one release."
            )
        padded = f"{picture.zfill(12)}.jpg" if picture.isdecimal() else f"{picture}.jpg"
        yield Row(
            key=f"{picture}#{identity}",
            image=folder.find(entry, *(f"COCO_{part}_{padded}" for part in COCO_PARTS), padded, f"{picture}.jpg"),
            texts=(),
            concept=picture,
            question=entry.text("question"),
            answers=_answers(told),
            question_type=_optional(told, "answer_type") or _optional(told, "question_type"),
        )


def read_textvqa(file: Path, images: Path) -> Iterator[Row]:
    """TextVQA: `data` with `question_id`, `image_id`, `question` and ten `answers`, OpenImages' pictures."""
    folder = PictureFolder(images)
    for identity, entry in _by_id(file, "data").items():
        picture = entry.text("image_id")
        yield Row(
            key=f"{picture}#{identity}",
            image=folder.find(entry, f"{picture}.png", f"{picture}.jpg"),
            texts=(),
            concept=picture,
            question=entry.text("question"),
            answers=_answers(entry),
        )


def read_gqa(file: Path, images: Path) -> Iterator[Row]:
    """GQA: a mapping of question id to `question`, `answer`, `imageId` and `types`; the type is the structural one."""
    held = read_json(file)
    if not isinstance(held, dict) or not held:
        raise HymaError(f"{file} holds no mapping of question ids to questions; give a questions file of GQA.")
    folder, names = PictureFolder(images), list(held)
    for entry in entries(file, held.values(), lambda number: f"question {names[number]}"):
        picture = entry.text("imageId")
        types = entry.cells.get("types")
        yield Row(
            key=f"{picture}#{entry.place.removeprefix('question ')}",
            image=folder.find(entry, f"{picture}.png", f"{picture}.jpg"),
            texts=(),
            concept=picture,
            question=entry.text("question"),
            answers=repeated(entry.text("answer")),
            question_type=str(types["structural"]) if isinstance(types, dict) and types.get("structural") else None,
        )


def read_pope(file: Path, images: Path) -> Iterator[Row]:
    """POPE: json lines of `question_id`, `image`, `text` and `label`; the type is the last word of the file's name."""
    folder, unique = PictureFolder(images), Unique(file)
    for entry in entries(file, read_json_lines(file)):
        identity = unique.check(entry.text("question_id"), entry.place)
        label = entry.text("label").casefold()
        if label not in ("yes", "no"):
            raise entry.wrong("label", "give yes or no")
        picture = entry.text("image")
        yield Row(
            key=f"{picture}#{identity}",
            image=folder.find(entry, picture),
            texts=(),
            concept=picture,
            question=entry.text("text"),
            answers=repeated(label),
            question_type=file.stem.rpartition("_")[2],
        )


def read_scienceqa(file: Path, images: Path, image_only: bool = False) -> Iterator[Row]:
    """ScienceQA's problems.json: `question`, `choices`, `answer`, `hint`, `image`, `split`; pictures in SPLIT/ID/.

    The question is put as LLaVA puts it: hint, question and lettered choices; the answer is a letter. Questions without
    a picture are rows without one, or left out with `image_only`.
    """
    held = read_json(file)
    if not isinstance(held, dict) or not held:
        raise HymaError(f"{file} holds no mapping of question ids to questions; give ScienceQA's problems.json.")
    folder, names = PictureFolder(images), list(held)
    for entry in entries(file, held.values(), lambda number: f"question {names[number]}"):
        identity, split = entry.place.removeprefix("question "), entry.text("split")
        if split not in SCIENCEQA_PARTS:
            raise entry.wrong("split", f"give one of {', '.join(SCIENCEQA_PARTS)}")
        choices = tuple(str(choice) for choice in entry.list("choices"))
        right = entry.required("answer")
        if not isinstance(right, int) or not 0 <= right < len(choices) <= len(ascii_uppercase):
            raise entry.wrong("answer", f"give the number of one of its {len(choices)} choices, counted from 0")
        picture = entry.cells.get("image")
        if image_only and not picture:
            continue
        yield Row(
            key=f"{split}/{identity}#{identity}",
            image=folder.find(entry, f"{identity}/{picture}", f"{split}/{identity}/{picture}") if picture else b"",
            texts=(),
            concept=f"{split}/{identity}",
            question=_lettered(_optional(entry, "hint"), entry.text("question"), choices),
            answers=repeated(ascii_uppercase[right]),
            question_type=_optional(entry, "subject"),
            choices=choices,
        )


def scienceqa_part(row: Row) -> Literal["train", "validation", "test"]:
    """The part of ScienceQA's own split that a row stands in."""
    return SCIENCEQA_PARTS[row.key.partition("/")[0]]


def _turns(entry: Entry) -> tuple[tuple[str, str], ...]:
    """(question, answer) of each turn, the image tag taken out."""
    said = list(entries(entry.file, entry.list("conversations"), lambda turn: f"turn {turn} of {entry.place}"))
    speakers = [part.text("from") for part in said]
    turns = [SPEAKERS.get(speaker) for speaker in speakers]
    if not turns or turns != [0, 1] * (len(turns) // 2):
        raise HymaError(
            f"In {entry.file} the conversation of {entry.place} has the speakers {', '.join(speakers) or 'none'}; it "
            "must go human, gpt, human, gpt, ..."
        )
    texts = [part.text("value").replace(IMAGE_TAG, "").strip() for part in said]
    if not all(texts[1::2]):
        raise HymaError(f"In {entry.file} the conversation of {entry.place} has an empty answer; fill it in.")
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def _by_id(file: Path, key: str) -> dict[str, Entry]:
    """The entries under `key`, by `question_id`."""
    unique = Unique(file)
    return {
        unique.check(entry.text("question_id"), entry.place): entry for entry in entries(file, listed_under(file, key))
    }


def _same_questions(questions: Path, annotations: Path, asked: dict[str, Entry], answered: dict[str, Entry]) -> None:
    for here, there, missing in (
        (questions, annotations, asked.keys() - answered.keys()),
        (annotations, questions, answered.keys() - asked.keys()),
    ):
        if missing:
            raise HymaError(
                f"{len(missing)} of the question ids in {here} are not in {there}, {min(missing)} for one; give "
                "questions and annotations of the same split."
            )


def _answers(entry: Entry) -> tuple[str, ...]:
    """The annotators' answers, texts or objects with `answer`; a single one is repeated."""
    given: list[str] = []
    for answer in entry.list("answers"):
        text: Any = answer.get("answer") if isinstance(answer, dict) else answer
        if not isinstance(text, str):
            raise entry.wrong("answers", "give texts, or objects with the field answer")
        given.append(text)
    if not any(text.strip() for text in given):
        raise entry.wrong("answers", "at least one must say something")
    return repeated(given[0]) if len(given) == 1 else tuple(given)


def _lettered(hint: str | None, question: str, choices: tuple[str, ...]) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
    return "\n".join([*([f"Context: {hint}"] if hint else []), question, *lines])


def _optional(entry: Entry, name: str) -> str | None:
    return str(entry.cells[name]).strip() or None if entry.cells.get(name) is not None else None

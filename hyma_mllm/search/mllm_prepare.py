"""From question rows and frozen models to the causal search's task: pictures numbered, words encoded, tokens read."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from hyma_mllm.data.collection import Part
from hyma_mllm.data.prompts import Encoded, Prompter, Turn
from hyma_mllm.data.question_sets import QuestionSets, asked
from hyma_mllm.data.rows import Row
from hyma_mllm.data.token_library import TokenLibrary, channel_statistics
from hyma_mllm.errors import HymaError
from hyma_mllm.pairs import PairGrid
from hyma_mllm.search.mllm_parts import Reader, Scorer, Tower, facts_of
from hyma_mllm.search.mllm_task import MLLMTask
from hyma_mllm.search.placement import Placement
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.llm import LanguageModel

logger = logging.getLogger(__name__)

LENGTH_ROWS = 512
"""Training rows whose mean length stands for all in the bill."""

STATISTICS_PICTURES = 2048
"""Training pictures whose tokens tell the mean and spread of a tower's channels."""


@dataclass
class UsedPictures:
    """The distinct pictures of some questions, as a source of rows.

    Attributes:
        name: of the source, in logs.
        licence: of the pictures.
        fingerprint: of the pictures.
        pictures: one row each.
    """

    name: str
    licence: str
    fingerprint: str
    pictures: tuple[Row, ...]

    def rows(self) -> Iterator[Row]:
        """The pictures."""
        return iter(self.pictures)


def number_pictures(rows: Sequence[Row]) -> tuple[list[Row], Tensor]:
    """The distinct pictures of some questions, and for each question [questions] int64 the number of its picture."""
    numbers: dict[str, int] = {}
    pictures: list[Row] = []
    picture_of = []
    for row in rows:
        name = picture_key(row)
        if name not in numbers:
            numbers[name] = len(pictures)
            pictures.append(Row(key=name, image=row.image, texts=(), concept=row.concept))
        picture_of.append(numbers[name])
    return pictures, torch.tensor(picture_of)


def picture_key(row: Row) -> str:
    """What names a question's picture: a digest of its file's path, size and age, or of its bytes."""
    if isinstance(row.image, Path):
        stat = row.image.stat()
        named = f"{row.image}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()
    else:
        named = row.image if isinstance(row.image, bytes) else repr(row.image).encode()
    return blake2b(named, digest_size=16).hexdigest()


def turns_of(row: Row, suffix: str) -> list[Turn]:
    """The conversation of a row: its own turns, or its question with the answer that most annotators gave.

    Raises:
        HymaError: the row has no question or no answer.
    """
    if row.turns:
        return [Turn(question, answer) for question, answer in row.turns]
    if not row.question or not row.answers:
        raise HymaError(f"The row {row.key} has no question or no answer; mend it or leave it out.")
    return [Turn(asked(row, suffix), max(dict.fromkeys(row.answers), key=row.answers.count))]


def encode_rows(prompter: Prompter, rows: Sequence[Row], name: str, suffix: str = "") -> list[Encoded]:
    """Every row in one LLM's words, checked.

    Raises:
        HymaError: a row whose labels do not align, by its key.
    """
    with tqdm(rows, desc=f"prompts of {name}", unit="row") as bar:  # closed before an error is told
        found = [prompter.encode(row.key, turns_of(row, suffix)) for row in bar]
    cut = sum(row.cut > 0 for row in found)
    if cut:
        logger.warning("%s: %d of %d rows were too long and lost their ends", name, cut, len(found))
    return found


def prepare_mllm(
    towers: Sequence[ModelCard],
    llms: Sequence[ModelCard],
    load: Callable[[ModelCard], LanguageModel],
    placement: Placement,
    questions: QuestionSets,
    library: TokenLibrary,
    scorer: Scorer,
    max_length: int,
    chunk: int,
    longest_answer: int,
) -> MLLMTask:
    """Build the task.

    Args:
        towers: the N vision towers.
        llms: the M LLMs.
        load: opens one.
        placement: which of them this process works with; the others are not opened.
        questions: what is asked.
        library: reads and writes vision tokens.
        scorer: measures answers.
        max_length: tokens of a conversation at most, picture included.
        chunk: questions that are answered at once.
        longest_answer: tokens after which an answer is cut.

    Returns:
        The task.

    Raises:
        HymaError: a split is empty, a row does not align, or a store is damaged.
    """
    for name, members in {"training": questions.train, "validation": questions.validation, **questions.tests}.items():
        if not members:
            raise HymaError(f"The {name} questions are none; add some, or raise their limit in data.")
    rows = questions.all_rows()
    pictures, picture_of = number_pictures(rows)
    longest = max(card.tokens or 0 for card in towers)
    # Words first: they are cheap, and a row that does not align must be named before a picture is embedded.

    def reader(number: int) -> Reader:
        llm = load(llms[number])
        prompter = Prompter(llm.tokenizer, llm.card.id, max_length, longest)
        prefix = llm.prefix(torch.tensor(prompter.before, dtype=torch.long))
        return Reader(llm, prompter, prefix, encode_rows(prompter, rows, llm.card.id, questions.suffix))

    readers = {number: reader(number) for number in range(len(llms)) if placement.here(number)}
    train = torch.arange(len(questions.train))
    own = {number: facts_of(opened, train[:LENGTH_ROWS].tolist()) for number, opened in readers.items()}
    facts = dict(gather_object(list(own.items())))
    digest = blake2b("\0".join(picture.key for picture in pictures).encode(), digest_size=16).hexdigest()
    source = UsedPictures("questions", "", digest, tuple(pictures))
    part = Part(source, f"{digest[:16]}-{len(pictures)}", pictures)
    known = torch.unique(picture_of[train])[:STATISTICS_PICTURES]
    read = []
    for card, tokens in zip(towers, library.tokens(list(towers), [part]), strict=True):
        mean, spread = channel_statistics(tokens, known)
        read.append(Tower(tokens, card.tokens or 0, mean.float(), spread.float()))
    grid = PairGrid(
        tuple(card.id for card in towers),
        tuple(card.width for card in towers),
        tuple(card.id for card in llms),
        tuple(card.width for card in llms),
        "vision_to_text",
    )
    first = len(questions.train)
    validation = torch.arange(first, first + len(questions.validation))
    tests, at = {}, first + len(questions.validation)
    for name, members in questions.tests.items():
        tests[name] = torch.arange(at, at + len(members))
        at += len(members)
    return MLLMTask(
        grid,
        read,
        readers,
        [facts[number] for number in range(len(llms))],
        rows,
        picture_of,
        train,
        validation,
        tests,
        chunk,
        longest_answer,
        questions.suffix,
        open_reader=reader,
        scorer=scorer,
    )

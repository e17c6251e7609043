"""The language prior: the best answer without looking, learnt from the training questions (1612.00837, section 1).

An MLLM that does not beat it has learnt which answers are common, not what is in the picture.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

from hyma_mllm.data.rows import Row
from hyma_mllm.errors import HymaError


def prior_answers(train_rows: Sequence[Row], test_rows: Sequence[Row]) -> list[str]:
    """For each test question the answer that the training questions make likeliest, no picture being looked at.

    That is the most frequent answer to the same question, else to questions of its type, else of all; equal ones by
    their order in the alphabet. Where the answer is one of the words that the question itself offers (`choices`), it is
    the one in the place that was most often right among questions of its type.

    Args:
        train_rows: questions with answers; the answer is the one that most annotators gave.
        test_rows: questions; their answers are not looked at.

    Raises:
        HymaError: there is no training question with an answer.
    """
    answers: dict[tuple[str, str | None], Counter[str]] = defaultdict(Counter)
    places: dict[str | None, Counter[int]] = defaultdict(Counter)
    for row in train_rows:
        if not row.answers:
            continue
        answer = max(dict.fromkeys(row.answers), key=row.answers.count)
        for level in _levels(row):
            answers[level][answer] += 1
        if answer in row.choices:
            places[row.question_type][row.choices.index(answer)] += 1
    if not answers:
        raise HymaError("No training question has an answer; the language prior is learnt from training questions.")
    best = {level: _commonest(counts) for level, counts in answers.items()}
    return [_guess(row, best, places) for row in test_rows]


def _levels(row: Row) -> tuple[tuple[str, str | None], ...]:
    """From the question itself to all questions."""
    return ("question", row.question), ("type", row.question_type), ("all", None)


def _guess(row: Row, best: dict[tuple[str, str | None], str], places: dict[str | None, Counter[int]]) -> str:
    if row.choices and ("question", row.question) not in best and places[row.question_type]:
        place = min(places[row.question_type], key=lambda at: (-places[row.question_type][at], at))
        return row.choices[min(place, len(row.choices) - 1)]
    return next(best[level] for level in _levels(row) if level in best)


def _commonest(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))

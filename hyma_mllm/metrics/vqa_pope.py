"""POPE (2305.10355, section 5): does a model say yes to things that are not in the picture?"""

import re
from collections.abc import Sequence
from typing import Any

from hyma_mllm.errors import HymaError
from hyma_mllm.metrics.vqa import by_type, check_lengths, percent

_NEGATIVE = re.compile(r"\b(?:no|not)\b|n['’]t\b")
_POSITIVE = re.compile(r"\b(?:yes|yeah|yep)\b")


def read_yes_no(text: str) -> str | None:
    """`yes`, `no`, or None where the first sentence says neither.

    As in POPE's own program a `no` or `not` anywhere in the first sentence is a no. That program takes everything else
    for a yes; here it must be said.
    """
    sentence = text.strip().casefold().partition(".")[0]
    if _NEGATIVE.search(sentence):
        return "no"
    return "yes" if _POSITIVE.search(sentence) else None


def pope(
    predictions: Sequence[str], references: Sequence[str], question_types: Sequence[str | None] | None = None
) -> dict[str, Any]:
    """Accuracy, precision, recall, F1 and the share of yes, in percent, `yes` being the positive class.

    An answer that is neither yes nor no is wrong: it lowers the accuracy, lowers the recall where yes was right, and is
    counted in `unreadable`; it is no yes.

    Args:
        predictions: one answer a question.
        references: `yes` or `no` for each.
        question_types: one a question, e.g. `random`, `popular`, `adversarial`.

    Returns:
        `accuracy`, `precision`, `recall`, `f1`, `yes_ratio` (0 where a quotient is 0 / 0), `unreadable`, `questions`,
        and with types `by_type`.

    Raises:
        HymaError: lists of other lengths, no question, or a reference that is neither yes nor no.
    """
    check_lengths(len(predictions), references=len(references))
    right = [_reference(reference, question) for question, reference in enumerate(references)]
    said = [read_yes_no(prediction) for prediction in predictions]
    hits = sum(answer == truth == "yes" for answer, truth in zip(said, right, strict=True))
    yeses, positives = said.count("yes"), right.count("yes")
    precision, recall = _quotient(hits, yeses), _quotient(hits, positives)
    scores = [float(answer == truth) for answer, truth in zip(said, right, strict=True)]
    return {
        "accuracy": percent(scores),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * _quotient(2 * precision * recall, precision + recall),
        "yes_ratio": 100 * _quotient(yeses, len(said)),
        "unreadable": said.count(None),
        "questions": len(said),
    } | by_type(scores, question_types)


def _reference(reference: str, question: int) -> str:
    plain = reference.strip().casefold()
    if plain not in ("yes", "no"):
        raise HymaError(
            f"The reference answer to question {question} (counted from 0) is {reference!r}; give yes or no."
        )
    return plain


def _quotient(part: float, whole: float) -> float:
    return part / whole if whole else 0.0

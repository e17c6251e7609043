"""Multiple choice, as ScienceQA (2209.09513) is scored: the letter that an answer names."""

import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from hyma_mllm.errors import HymaError
from hyma_mllm.metrics.vqa import by_type, check_lengths, percent
from hyma_mllm.metrics.vqa_words import evalai_form

_ALONE = re.compile(r"\(?([A-Z])\)?[.:)]?")
_LEADING = re.compile(r"\(([A-Z])\)\s|([A-Z])[.:)](?:\s|$)")
_NAMED = re.compile(r"(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?: is)?:? \(?([A-Z])\b")


def read_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that an answer names, or None where it names none of them.

    Read are a letter alone (`B`, `(b)`, `B.`), one in front (`B. a river`), one that is named (`The answer is B`), and
    a choice in its own words.

    Args:
        text: the answer.
        choices: the choices in order of their letters; only their number counts unless the answer repeats one.
    """
    letters = ascii_uppercase[: len(choices)]
    plain = text.strip()
    alone = _ALONE.fullmatch(plain.upper())
    if alone:
        return alone[1] if alone[1] in letters else None
    found = _LEADING.match(plain) or _NAMED.search(plain)
    if found:
        letter = next(group for group in found.groups() if group)
        return letter if letter in letters else None
    said = evalai_form(plain)
    same = [letter for letter, choice in zip(letters, choices, strict=True) if said and evalai_form(choice) == said]
    return same[0] if len(same) == 1 else None


def multiple_choice(
    predictions: Sequence[str],
    references: Sequence[str],
    choices: Sequence[Sequence[str]],
    with_image: Sequence[bool] | None = None,
    question_types: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """Accuracy in percent over all questions, and over those with a picture.

    Args:
        predictions: one answer a question.
        references: the right letter of each, `A` being the first choice.
        choices: the choices of each, in order.
        with_image: whether each question has a picture.
        question_types: one a question.

    Returns:
        `accuracy`, `questions`, `unreadable` (no letter or choice could be read; they count as wrong), with
        `with_image` also `image_accuracy` and `image_questions`, with types `by_type`.

    Raises:
        HymaError: lists of other lengths, no question, none with a picture, or a letter that no choice has.
    """
    check_lengths(len(predictions), references=len(references), lists_of_choices=len(choices))
    for question, (reference, offered) in enumerate(zip(references, choices, strict=True)):
        if len(reference) != 1 or reference not in ascii_uppercase[: len(offered)]:
            raise HymaError(
                f"The reference answer to question {question} (counted from 0) is {reference!r}; give the letter of "
                f"one of its {len(offered)} choices."
            )
    said = [read_letter(prediction, offered) for prediction, offered in zip(predictions, choices, strict=True)]
    scores = [float(letter == right) for letter, right in zip(said, references, strict=True)]
    result: dict[str, Any] = {"accuracy": percent(scores), "questions": len(scores), "unreadable": said.count(None)}
    return result | _over_pictures(scores, with_image) | by_type(scores, question_types)


def _over_pictures(scores: Sequence[float], with_image: Sequence[bool] | None) -> dict[str, Any]:
    if with_image is None:
        return {}
    check_lengths(len(scores), with_image_flags=len(with_image))
    pictured = [value for value, there in zip(scores, with_image, strict=True) if there]
    if not pictured:
        raise HymaError("None of the questions has a picture; leave with_image out, or give questions with pictures.")
    return {"image_accuracy": percent(pictured), "image_questions": len(pictured)}

"""VQA accuracy (Antol et al., 1505.00468, section 3; ten-fold as in the evaluation program of 1612.00837).

An answer earns min(matches / 3, 1) against nine of the ten human answers, averaged over which one is left out. The
variants differ in what is normalised before the comparison, and lie up to 12 points apart on one file of answers:

- `official`: the VQA program; answers are normalised only where the annotators disagree, so that a capital letter
  fails against ten equal answers
- `evalai`: TextVQA's program; every answer is normalised, in its own way
- `always`: the VQA program's normalisation, applied to every answer
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.metrics.vqa_words import evalai_form, plain_spaces, vqa_form

Variant = Literal["official", "evalai", "always"]

FEWEST_ANSWERS = 4
"""With fewer human answers no prediction can reach 100 percent, since one is always left out and three must match."""


def accuracy(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    variant: Variant = "evalai",
    question_types: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """Accuracy in percent over all questions, and for each type of question where the types are given.

    Args:
        predictions: one answer a question.
        references: the human answers of each question, ten as a rule.
        variant: `official`, `evalai` or `always`; see the module.
        question_types: one a question, None where it has none.

    Returns:
        `accuracy` in percent, `questions`, `unreadable` (empty predictions, which count as wrong unless an annotator
        said nothing too), and with types `by_type`: type -> `accuracy`, `questions`.

    Raises:
        HymaError: no such variant, lists of other lengths, no question, or too few human answers to one.
    """
    check_variant(variant)
    check_lengths(len(predictions), references=len(references))
    scores = [
        score(prediction, answers, variant, question)
        for question, (prediction, answers) in enumerate(zip(predictions, references, strict=True))
    ]
    result: dict[str, Any] = {
        "accuracy": percent(scores),
        "questions": len(scores),
        "unreadable": sum(not prediction.strip() for prediction in predictions),
    }
    return result | by_type(scores, question_types)


def score(prediction: str, answers: Sequence[str], variant: Variant = "evalai", question: int = 0) -> float:
    """What one prediction earns against the human answers of its question, in [0, 1].

    Args:
        prediction: the answer to judge.
        answers: the human answers.
        variant: of the normalisation.
        question: its number, for the message.

    Raises:
        HymaError: fewer than four human answers.
    """
    if len(answers) < FEWEST_ANSWERS:
        raise HymaError(
            f"Question {question} (counted from 0) has {len(answers)} reference answers and VQA accuracy needs at "
            f"least {FEWEST_ANSWERS}, since one is left out and three must match; repeat a single answer ten times."
        )
    form = _form(variant, answers)
    said = form(prediction)
    equal = [form(answer) == said for answer in answers]
    # Left out by position: an equal answer of another annotator still counts.
    return sum(min((sum(equal) - left_out) / 3, 1.0) for left_out in equal) / len(equal)


def by_type(scores: Sequence[float], question_types: Sequence[str | None] | None) -> dict[str, Any]:
    """`by_type`: question type -> `accuracy` in percent and `questions`, types in order of their names; or nothing.

    Raises:
        HymaError: not one type a score.
    """
    if question_types is None:
        return {}
    check_lengths(len(scores), question_types=len(question_types))
    grouped: dict[str, list[float]] = {}
    for kind, value in zip(question_types, scores, strict=True):
        grouped.setdefault(kind or "other", []).append(value)
    return {
        "by_type": {
            kind: {"accuracy": percent(values), "questions": len(values)} for kind, values in sorted(grouped.items())
        }
    }


def percent(scores: Sequence[float]) -> float:
    """The mean in percent."""
    return 100.0 * sum(scores) / len(scores)


def check_variant(variant: str) -> None:
    """Raise HymaError unless `variant` is one of the three."""
    if variant not in get_args(Variant):
        raise HymaError(f"There is no variant {variant} of VQA accuracy; {near_names(variant, get_args(Variant))}.")


def check_lengths(predictions: int, **others: int) -> None:
    """Raise HymaError unless there are predictions, and as many of everything else."""
    if predictions == 0:
        raise HymaError("There are no predictions to score; give one answer a question.")
    for name, length in others.items():
        if length != predictions:
            raise HymaError(
                f"There are {predictions} predictions and {length} {name.replace('_', ' ')}; give one each."
            )


def _form(variant: Variant, answers: Sequence[str]) -> Callable[[str], str]:
    if variant == "evalai":
        return evalai_form
    # The program strips the human answers before it asks whether they agree.
    if variant == "official" and len({plain_spaces(answer) for answer in answers}) == 1:
        return plain_spaces
    return vqa_form

"""Measures of answers: VQA accuracy over all questions and per type; and what guessing the usual answer reaches."""

from collections.abc import Mapping, Sequence

from hyma_mllm.data.rows import Row
from hyma_mllm.metrics.vqa import accuracy
from hyma_mllm.metrics.vqa_prior import prior_answers


def score_answers(rows: Sequence[Row], answers: Sequence[str]) -> dict[str, float]:
    """`accuracy` (TextVQA's variant) and `accuracy <question type>`, in percent; the types in order of their names."""
    types = [row.question_type for row in rows]
    found = accuracy(answers, [row.answers for row in rows], "evalai", types)
    by_type = found["by_type"] if any(types) else {}
    return {"accuracy": found["accuracy"]} | {f"accuracy {kind}": part["accuracy"] for kind, part in by_type.items()}


def prior_scores(train: Sequence[Row], tests: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """Accuracy per test set of the most frequent training answer to the same question, the strongest blind guess."""
    return {name: score_answers(rows, prior_answers(train, rows))["accuracy"] for name, rows in tests.items()}

"""The published answers of LLaVA-1.5-13B on TextVQA, against what the reference programs give them."""

import gzip
import json
from collections import Counter
from pathlib import Path

import evaluate
import pytest

from hyma_mllm.metrics.vqa import accuracy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def golden():
    """(predictions, human answers) of 5,000 questions."""
    with gzip.open(ROOT / "tests" / "golden" / "textvqa_answers.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 5000
    return [row["prediction"] for row in rows], [row["answers"] for row in rows]


@pytest.mark.parametrize(("variant", "expected"), [("evalai", 61.254), ("official", 49.094), ("always", 61.254)])
def test_the_evaluate_module_gives_the_golden_accuracy(golden, variant, expected):
    predictions, answers = golden
    metric = evaluate.load(str(ROOT / "eval" / "metrics" / "vqa_accuracy"))
    result = metric.compute(predictions=predictions, references=answers, variant=variant)
    assert round(result["accuracy"], 3) == expected
    assert result["questions"] == 5000


def test_golden_official_in_lower_case(golden):
    predictions, answers = golden
    assert round(accuracy([text.lower() for text in predictions], answers, "official")["accuracy"], 3) == 61.134


@pytest.mark.parametrize(
    ("variant", "majority", "first"),
    [("evalai", 98.458, 87.144), ("official", 98.452, 87.152), ("always", 98.452, 87.152)],
)
def test_golden_controls(golden, variant, majority, first):
    _, answers = golden
    most = [Counter(given).most_common(1)[0][0] for given in answers]
    assert round(accuracy(most, answers, variant)["accuracy"], 3) == majority
    assert round(accuracy([given[0] for given in answers], answers, variant)["accuracy"], 3) == first
    assert round(accuracy(["unanswerable"] * len(answers), answers, variant)["accuracy"], 3) == 5.35

"""The modules load through the `evaluate` library, as a user of it would."""

from pathlib import Path

import evaluate
import pytest

from hyma_mllm.errors import HymaError

METRICS = Path(__file__).parents[2] / "eval" / "metrics"


def test_vqa_accuracy_with_a_breakdown():
    metric = evaluate.load(str(METRICS / "vqa_accuracy"))
    result = metric.compute(
        predictions=["Cat", "dog"],
        references=[["cat"] * 10, ["cat"] * 10],
        variant="official",
        question_types=["what", "which"],
    )
    assert result["accuracy"] == 0
    assert set(result["by_type"]) == {"what", "which"}
    assert metric.compute(predictions=["Cat"], references=[["cat"] * 10])["accuracy"] == 100


def test_a_wrong_variant_is_named():
    metric = evaluate.load(str(METRICS / "vqa_accuracy"))
    with pytest.raises(HymaError, match="official"):
        metric.compute(predictions=["cat"], references=[["cat"] * 10], variant="offical")


def test_pope():
    metric = evaluate.load(str(METRICS / "pope"))
    result = metric.compute(predictions=["Yes", "well"], references=["yes", "no"])
    assert (result["accuracy"], result["f1"], result["yes_ratio"], result["unreadable"]) == (50, 100, 50, 1)


def test_multiple_choice():
    metric = evaluate.load(str(METRICS / "multiple_choice"))
    result = metric.compute(
        predictions=["A.", "Lake"], references=["A", "A"], choices=[["River", "Lake"]] * 2, with_image=[True, False]
    )
    assert (result["accuracy"], result["image_accuracy"], result["unreadable"]) == (50, 100, 0)

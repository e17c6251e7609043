import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score

from hyma_mllm.errors import HymaError
from hyma_mllm.metrics.vqa_pope import pope, read_yes_no


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes", "yes"),
        ("yes, there is a dog.", "yes"),
        ("No.", "no"),
        ("NO", "no"),
        ("There is not a dog", "no"),
        ("there isn't one", "no"),
        ("Yes. It is not small.", "yes"),
        ("a nose", None),
        ("", None),
        ("a dog", None),
    ],
)
def test_reading(text, read):
    assert read_yes_no(text) == read


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(["Yes", "no"]), st.sampled_from(["yes", "no"])), min_size=1))
def test_readable_answers_score_as_in_sklearn(pairs):
    said, right = ([pair[side].lower() == "yes" for pair in pairs] for side in (0, 1))
    result = pope([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    assert result["accuracy"] == pytest.approx(100 * np.mean(np.equal(said, right)))
    assert result["precision"] == pytest.approx(100 * precision_score(right, said, zero_division=0))
    assert result["recall"] == pytest.approx(100 * recall_score(right, said, zero_division=0))
    assert result["f1"] == pytest.approx(100 * f1_score(right, said, zero_division=0))
    assert result["yes_ratio"] == pytest.approx(100 * np.mean(said))
    assert result["unreadable"] == 0


def test_an_unreadable_answer_is_wrong_counted_and_no_yes():
    result = pope(
        ["yes", "perhaps", "perhaps", "no"], ["yes", "yes", "no", "no"], ["random", "random", "popular", "popular"]
    )
    assert result == {
        "accuracy": 50,
        "precision": 100,
        "recall": 50,
        "f1": pytest.approx(200 / 3),
        "yes_ratio": 25,
        "unreadable": 2,
        "questions": 4,
        "by_type": {"popular": {"accuracy": 50, "questions": 2}, "random": {"accuracy": 50, "questions": 2}},
    }


def test_bad_input():
    with pytest.raises(HymaError, match=r"question 1 .* is 'maybe'; give yes or no"):
        pope(["yes", "no"], ["yes", "maybe"])
    with pytest.raises(HymaError, match="1 predictions and 2 references"):
        pope(["yes"], ["yes", "no"])

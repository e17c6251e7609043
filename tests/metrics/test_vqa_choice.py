import pytest

from hyma_mllm.errors import HymaError
from hyma_mllm.metrics.vqa_choice import multiple_choice, read_letter

CHOICES = ("a river", "Lake Erie", "the sea")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" b\n", "B"),
        ("(C)", "C"),
        ("C.", "C"),
        ("B. Lake Erie", "B"),
        ("(B) Lake Erie", "B"),
        ("The answer is C.", "C"),
        ("Answer: A", "A"),
        ("lake erie", "B"),
        ("River", "A"),
        ("D", None),
        ("The answer is E", None),
        ("A river runs here", None),
        ("", None),
        ("no idea", None),
    ],
)
def test_reading(text, letter):
    assert read_letter(text, CHOICES) == letter


def test_two_equal_choices_are_not_told_apart_by_their_words():
    assert read_letter("the sea", ("the sea", "sea")) is None


def test_all_and_image_only():
    result = multiple_choice(
        ["A", "no idea", "B", "C"],
        ["A", "B", "A", "C"],
        [CHOICES] * 4,
        [True, True, False, False],
        ["x", "x", "y", "y"],
    )
    assert result == {
        "accuracy": 50,
        "questions": 4,
        "unreadable": 1,
        "image_accuracy": 50,
        "image_questions": 2,
        "by_type": {"x": {"accuracy": 50, "questions": 2}, "y": {"accuracy": 50, "questions": 2}},
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["A"], ["D"], [CHOICES]), "is 'D'; give the letter of one of its 3 choices"),
        ((["A"], [""], [CHOICES]), "is ''"),
        ((["A"], ["A"], []), "1 predictions and 0 lists of choices"),
        ((["A"], ["A"], [CHOICES], [False]), "None of the questions has a picture"),
        ((["A"], ["A"], [CHOICES], []), "0 with image flags"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(HymaError, match=words):
        multiple_choice(*arguments)

import pytest

from hyma_mllm.data.rows import Row
from hyma_mllm.errors import HymaError
from hyma_mllm.metrics.vqa_prior import prior_answers


def row(question, answer, kind="type", choices=()):
    return Row("k", b"x", (), "c", question=question, answers=(answer,) * 10, question_type=kind, choices=choices)


def test_the_question_then_its_type_then_all():
    train = [
        row("a?", "1"), row("a?", "1"), row("a?", "2"), row("b?", "2"), row("b?", "2"), row("c?", "2"),
        *[row("d?", "9", "other")] * 5,
    ]  # fmt: skip
    tests = [row("a?", ""), row("new?", ""), row("new?", "", "unseen")]
    assert prior_answers(train, tests) == ["1", "2", "9"]


def test_of_offered_words_the_likelier_place():
    train = [row("x or y?", "y", choices=("x", "y")), row("u or v?", "v", choices=("u", "v"))]
    train.append(row("p or q?", "p", choices=("p", "q")))
    tests = [row("n or m?", "", choices=("n", "m")), row("p or q?", "", choices=("p", "q"))]
    assert prior_answers(train, tests) == ["m", "p"]


def test_letters_are_answers_like_others():
    train = [row("a\nA. x\nB. y", "B", choices=("x", "y"))] * 2 + [row("b\nA. x\nB. y", "A", choices=("x", "y"))]
    assert prior_answers(train, [row("c\nA. x\nB. y", "", choices=("x", "y"))]) == ["B"]


def test_equally_frequent_answers_go_by_the_alphabet_and_test_answers_are_not_read():
    assert prior_answers([row("a?", "z"), row("a?", "b")], [row("a?", "z")]) == ["b"]


def test_no_training_answers():
    with pytest.raises(HymaError, match="No training question has an answer"):
        prior_answers([Row("k", b"x", (), "c", question="a?")], [row("a?", "1")])

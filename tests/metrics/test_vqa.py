from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyma_mllm.errors import HymaError
from hyma_mllm.metrics.vqa import accuracy, score
from hyma_mllm.metrics.vqa_words import evalai_form, vqa_form


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_the_known_steps_of_the_score(matches, expected):
    answers = ["cat"] * matches + [f"dog {number}" for number in range(10 - matches)]
    assert score("cat", answers) == pytest.approx(expected)


@given(st.lists(st.sampled_from("ab"), min_size=4, max_size=10))
def test_the_score_is_the_mean_over_all_subsets_of_all_but_one(answers):
    subsets = list(combinations(answers, len(answers) - 1))
    expected = sum(min(subset.count("b") / 3, 1) for subset in subsets) / len(subsets)
    assert score("b", answers) == pytest.approx(expected)


@given(st.lists(st.sampled_from(["cat", "a dog", "2", "two", "Cat"]), min_size=4), st.randoms())
def test_the_order_of_the_answers_does_not_matter(answers, random):
    shuffled = random.sample(answers, len(answers))
    for variant in ("official", "evalai", "always"):
        assert score("two", answers, variant) == pytest.approx(score("two", shuffled, variant))


@pytest.mark.parametrize(
    ("answer", "vqa", "evalai"),
    [
        ("The Cat.", "cat", "cat"),
        ("two", "2", "2"),
        ("none", "0", "0"),
        ("dont", "don't", "don't"),
        ("couldnt've", "couldn't've", "couldn't've"),
        ("twas", "'twas", "'twas"),
        ("somebody'd", "somebodyd", "somebodyd"),
        ("a/b", "b", "b"),
        ("well - done", "well done", "well done"),
        ("1,000", "1000", "1000"),
        ("1,000-2", "10002", "1000 2"),
        ("3.5", "3.5", "3.5"),
        (".5", ".5", ".5"),
        ("5. avenue", "5 avenue", "5 avenue"),
        ("men's", "men's", "men 's"),
        ("yes,\nit is", "yes it is", "yes it is"),
        ("x," + "." * 40, "x " + "." * 8, "x" + "." * 8),
    ],
)
def test_answers_are_reduced_as_the_reference_programs_do(answer, vqa, evalai):
    assert (vqa_form(answer), evalai_form(answer)) == (vqa, evalai)


def test_official_normalises_only_where_the_annotators_disagree():
    agreed, disagreed = ["cat"] * 10, ["cat"] * 9 + ["kitten"]
    assert (score("Cat", agreed, "official"), score("Cat", disagreed, "official")) == (0, 1)
    assert (score("Cat", agreed, "always"), score("Cat", agreed, "evalai")) == (1, 1)
    # Spaces at the ends are no disagreement.
    assert score("Cat", ["cat"] * 9 + ["cat "], "official") == 0


def test_types_part_the_whole_and_empty_answers_are_counted():
    result = accuracy(
        ["cat", " ", "2"], [["cat"] * 10, ["dog"] * 10, ["two"] * 10], question_types=["animal", "animal", None]
    )
    assert result == {
        "accuracy": pytest.approx(200 / 3),
        "questions": 3,
        "unreadable": 1,
        "by_type": {"animal": {"accuracy": 50, "questions": 2}, "other": {"accuracy": 100, "questions": 1}},
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["a"], [["a"] * 10], "evalia"), "did you mean evalai"),
        ((["a", "b"], [["a"] * 10]), "2 predictions and 1 references"),
        (([], []), "no predictions"),
        ((["a"], [["a"]]), "repeat a single answer ten times"),
        ((["a"], [["a"] * 10], "always", ["x", "y"]), "1 predictions and 2 question types"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(HymaError, match=words):
        accuracy(*arguments)

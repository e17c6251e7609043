from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyma_mllm.data.questions_balance import balanced, right_answer
from hyma_mllm.data.rows import Row
from hyma_mllm.errors import HymaError


def row(number, kind, question, answer, choices=()):
    return Row(
        f"p{number}#{number}", b"x", (), f"p{number}", question=question, answers=(answer,) * 10, question_type=kind,
        choices=choices,
    )  # fmt: skip


CELLS = st.tuples(
    st.sampled_from(["yesno", "shape"]), st.sampled_from(["is it?", "is it not?", "what?"]), st.sampled_from("abc")
)


def rows_of(cells):
    return [
        row(number, kind, question, {"a": "yes"}.get(letter, "no") if kind == "yesno" else letter)
        for number, (kind, question, letter) in enumerate(cells)
    ]


@given(st.lists(CELLS, max_size=60), st.integers(1, 40), st.integers(0, 3))
def test_a_subset_in_order_within_the_limit_and_yes_as_often_as_no_under_each_wording(cells, limit, seed):
    rows = rows_of(cells)
    taken = balanced(rows, limit, seed)
    assert len(taken) <= limit
    places = [rows.index(taken_row) for taken_row in taken]
    assert places == sorted(set(places))
    said = {right_answer(taken_row) for taken_row in rows if taken_row.question_type == "yesno"}
    if said == {"yes", "no"}:
        counts = Counter((r.question, right_answer(r)) for r in taken if r.question_type == "yesno")
        assert all(counts[question, "yes"] == counts[question, "no"] for question, _ in counts)


def test_types_and_answers_are_alike_often_whatever_their_shares():
    cells = [("yesno", "is it?", "a")] * 30 + [("yesno", "is it?", "b")] * 300
    cells += [("shape", "what?", "a")] * 90 + [("shape", "what?", "b")] * 20 + [("shape", "what?", "c")] * 20
    taken = balanced(rows_of(cells), 60)
    assert Counter((r.question_type, right_answer(r)) for r in taken) == {
        ("yesno", "yes"): 15,
        ("yesno", "no"): 15,
        ("shape", "a"): 10,
        ("shape", "b"): 10,
        ("shape", "c"): 10,
    }


def test_a_type_that_runs_out_leaves_its_place_to_the_others():
    cells = [("yesno", "is it?", "a"), ("yesno", "is it?", "b")] + [("shape", "what?", "a")] * 20
    assert Counter(r.question_type for r in balanced(rows_of(cells), 12)) == {"yesno": 2, "shape": 10}


def test_the_right_choice_stands_first_as_often_as_second():
    rows = [row(n, "either", f"is it {n}?", f"w{n}", (f"w{n}", "z") if n % 10 else ("z", f"w{n}")) for n in range(200)]
    taken = balanced(rows, 40)
    assert sum(r.choices[0] == right_answer(r) for r in taken) == 20


def test_no_limit_takes_all_and_another_seed_is_another_choice():
    rows = rows_of([("shape", "what?", "abc"[number % 3]) for number in range(60)])
    assert balanced(rows, 0) == rows
    assert balanced(rows, 12) == balanced(rows, 12)
    assert balanced(rows, 12, seed=1) != balanced(rows, 12)
    with pytest.raises(HymaError, match="limit of questions is -1"):
        balanced(rows, -1)


def test_fewer_than_asked_for_is_said(caplog):
    assert balanced(rows_of([("yesno", "is it?", "a")] * 5 + [("yesno", "is it?", "b")]), 4) != []
    assert "2 of the 4 questions asked for" in caplog.text

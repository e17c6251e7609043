"""Batches of rows of like length: exact against every other way to cut them."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from hyma_mllm.data.prompt_batches import IGNORE, Encoded, by_length


def cost(parts: list[list[int]], lengths: list[int], overhead: int) -> int:
    return sum(len(part) * max(lengths[row] for row in part) + overhead for part in parts)


def test_rows_of_like_length_stand_together() -> None:
    assert by_length([9, 2, 3, 9], pass_tokens=3) == [[1, 2], [0, 3]]
    assert by_length([9, 2, 3, 9], pass_tokens=100) == [[1, 2, 0, 3]]
    assert by_length([9, 2, 3, 8], pass_tokens=0) == [[1], [2], [3], [0]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(0, 50))
def test_no_other_cut_costs_less(lengths: list[int], overhead: int) -> None:
    parts = by_length(lengths, overhead)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    order = [row for part in parts for row in part]
    assert [lengths[row] for row in order] == sorted(lengths)
    rows = range(len(lengths))
    others = [
        [order[start:end] for start, end in zip((0, *cuts), (*cuts, len(order)), strict=True)]
        for count in rows
        for cuts in combinations(range(1, len(order)), count)
    ]
    assert cost(parts, lengths, overhead) == min(cost(other, lengths, overhead) for other in others)


def test_tokens_behind_the_last_label_are_not_passed() -> None:
    assert Encoded((5, 6, 7, 8), (IGNORE, IGNORE, 7, IGNORE), 0).passed == 2

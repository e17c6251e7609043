"""Threads that keep the order, stay near their reader, and hand errors over."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyma_mllm.data.threads import in_order


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 3), max_size=12), st.integers(0, 4), st.integers(0, 5))
def test_order_is_kept_whatever_takes_longest(items: list[int], threads: int, ahead: int) -> None:
    def work(item: int) -> int:
        time.sleep(0.001 * item)
        return -item

    assert list(in_order(work, items, threads, ahead)) == [-item for item in items]


@pytest.mark.parametrize(("threads", "most"), [(0, 1), (3, 5)])
def test_items_are_drawn_a_few_ahead(threads: int, most: int) -> None:
    drawn = []

    def items() -> object:
        for number in range(100):
            drawn.append(number)
            yield number

    results = in_order(lambda item: item, items(), threads, ahead=4)  # type: ignore[arg-type]
    assert next(results) == 0 and len(drawn) == most
    results.close()
    assert len(drawn) == most


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_comes_at_its_turn(threads: int) -> None:
    results = in_order(lambda item: 1 // item, [1, 1, 0, 1], threads, ahead=3)
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)

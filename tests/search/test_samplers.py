from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyma_mllm.errors import HymaError
from hyma_mllm.search.samplers import BatchSampler, PairSampler, generator


@given(pairs=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 2**31), step=st.integers(0, 1000))
def test_a_fair_step_visits_every_pair_once(pairs: int, share: float, seed: int, step: int) -> None:
    sampler = PairSampler(tuple(range(pairs)), max(1, round(share * pairs)), "fair", seed)
    visits = sampler.visits(step)
    assert len(visits) == sampler.visits_per_step
    assert sorted(pair for visit in visits for pair in visit) == list(range(pairs))


def test_fair_order_is_fresh_each_step_and_fixed_by_the_seed() -> None:
    sampler = PairSampler(tuple(range(12)), 4, "fair", 3)
    assert sampler.visits(0) != sampler.visits(1)
    assert sampler.visits(5) == PairSampler(tuple(range(12)), 4, "fair", 3).visits(5)
    assert sampler.visits(5) != PairSampler(tuple(range(12)), 4, "fair", 4).visits(5)


@given(pairs=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 2**31), first=st.integers(0, 50))
def test_a_round_of_steps_visits_every_pair_once(pairs: int, share: float, seed: int, first: int) -> None:
    sampler = PairSampler(tuple(range(pairs)), max(1, round(share * pairs)), "round", seed)
    steps = -(-pairs // sampler.size)
    visits = [sampler.visits(first * steps + step) for step in range(steps)]
    assert sampler.visits_per_step == 1 and all(len(visit) == 1 for visit in visits)
    assert sorted(pair for visit in visits for pair in visit[0]) == list(range(pairs))


def test_cyclic_walks_in_order_and_random_draws_without_replacement() -> None:
    cyclic = PairSampler(tuple(range(5)), 2, "cyclic", 0)
    assert [cyclic.visits(step)[0] for step in range(3)] == [[0, 1], [2, 3], [4, 0]]
    random = PairSampler(tuple(range(5)), 3, "random", 0)
    draws = [random.visits(step)[0] for step in range(200)]
    assert all(len(set(draw)) == 3 for draw in draws)
    counts = Counter(pair for draw in draws for pair in draw)
    assert min(counts.values()) > 80  # expected 120 each


def test_only_members_are_visited() -> None:
    assert sorted(PairSampler((7, 3, 5), 0, "fair", 0).visits(0)[0]) == [3, 5, 7]


def test_more_pairs_per_visit_than_exist_is_refused() -> None:
    with pytest.raises(HymaError, match=r"pairs_per_visit is 7 but the grid has 6 pairs"):
        PairSampler(tuple(range(6)), 7, "fair", 0)


@given(rows=st.integers(1, 60), share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_an_epoch_has_no_row_twice(rows: int, share: float, seed: int) -> None:
    members = torch.arange(100, 100 + rows)
    sampler = BatchSampler(members, max(1, round(share * rows)), seed)
    epoch = torch.cat([sampler.batch(number) for number in range(rows // sampler.size)])
    assert len(epoch.unique()) == len(epoch)
    assert set(epoch.tolist()) <= set(members.tolist())


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(HymaError, match=r"search.batch is 11 but the training split has 10 rows"):
        BatchSampler(torch.arange(10), 11, 0)


def test_streams_of_other_numbers_differ() -> None:
    draws = {float(torch.rand((), generator=generator(a, b))) for a in range(10) for b in range(10)}
    assert len(draws) == 100

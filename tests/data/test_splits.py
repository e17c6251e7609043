"""Splits by concept, the key that captions are compared by, and class sets."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from hyma_mllm.data.class_sets import PLAIN_TEMPLATES, ClassSet, class_sets
from hyma_mllm.data.rows import Row
from hyma_mllm.data.splits import joined_concepts, split_by_concept, split_by_key
from hyma_mllm.data.words import caption_key, listed
from hyma_mllm.errors import HymaError


def row(key: str, concept: str, *texts: str) -> Row:
    return Row(key, b"", texts or (concept,), concept)


MANY = [row(f"{style}/{number}", f"thing {number}") for style in "abc" for number in range(400)]
PAIRS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=60)


@given(seed=st.integers(0, 2**32))
def test_shares_and_styles(seed: int) -> None:
    split = split_by_concept(MANY, seed)
    assert sorted(split.train + split.validation + split.test) == list(range(1200))
    parts = [{MANY[number].concept for number in part} for part in (split.train, split.validation, split.test)]
    assert sum(map(len, parts)) == 400
    assert 0.03 < len(parts[1]) / 400 < 0.19
    assert 0.07 < len(parts[2]) / 400 < 0.25
    assert split == split_by_concept(MANY, seed)


def test_another_seed_is_another_split() -> None:
    assert split_by_concept(MANY, 0) != split_by_concept(MANY, 1)


def test_added_rows_move_nothing() -> None:
    before = split_by_concept(MANY, 0)
    after = split_by_concept([*MANY, *(row(f"d/{number}", f"new {number}") for number in range(200))], 0)
    assert [number for number in after.test if number < 1200] == before.test
    assert [number for number in after.validation if number < 1200] == before.validation


@given(pairs=PAIRS)
def test_chains_are_never_parted(pairs: list[tuple[int, int]]) -> None:
    names = joined_concepts([row(str(number), f"c{a}", f"The c{b}!") for number, (a, b) in enumerate(pairs)])
    first, second = np.array(pairs).T
    graph = coo_array((np.ones(len(pairs)), (first, second)), shape=(31, 31))
    _, part = connected_components(graph, directed=False)
    for a, b in itertools.combinations(range(len(pairs)), 2):
        assert (names[a] == names[b]) == (part[first[a]] == part[first[b]])
    assert all(name <= f"c{a}" for name, (a, _) in zip(names, pairs, strict=True))


def test_the_same_caption_joins_sources() -> None:
    rows = [row("fluent/1", "dog"), row("tuxpaint/1", "hound", "A dog."), row("clip/1", "cat", "Cat", "a hound")]
    assert joined_concepts([*rows, row("x", "horse")]) == ["cat", "cat", "cat", "horse"]


def test_split_errors() -> None:
    with pytest.raises(HymaError, match="too few: none fell to the"):
        split_by_concept([row("a", "a"), row("b", "b")], 0)
    with pytest.raises(HymaError, match="no part for training"):
        split_by_concept(MANY, 0, 0.5, 0.5)
    whole = split_by_concept([row("a", "a")], 0, 0.0, 0.0)
    assert (whole.train, whole.validation, whole.test) == ([0], [], [])


@pytest.mark.parametrize(
    ("caption", "key"),
    [
        ("A frog.", "frog"),
        ("Frogs!", "frog"),
        ("Some cherries.", "cherry"),
        ("The cactus", "cactus"),
        ("woman’s hat", "woman hat"),
        ("digital_camera", "digital camera"),
        ("A", "a"),
        ("...", "..."),
        ("Straße 7", "strasse 7"),
        ("狗", "狗"),
    ],
)
def test_caption_keys(caption: str, key: str) -> None:
    assert caption_key(caption) == key


@given(st.text(min_size=1).filter(str.strip))
def test_a_caption_key_is_never_empty(caption: str) -> None:
    assert caption_key(caption)


def test_lists_of_words() -> None:
    assert [listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_class_sets_hold_what_occurs() -> None:
    rows = [
        Row("1", b"", ("t",), "c", "owl", "tuxpaint"),
        Row("2", b"", ("t",), "c", "bird", "tuxpaint"),
        Row("3", b"", ("t",), "c", "owl", "own"),
        Row("4", b"", ("t",), "c", "bird", "tuxpaint"),
        Row("5", b"", ("t",), "c"),
    ]
    found = class_sets(rows)
    assert list(found) == ["own", "tuxpaint"]
    assert found["tuxpaint"].classes == ("bird", "owl")
    assert found["own"] == ClassSet("own", ("owl",), PLAIN_TEMPLATES)
    assert all("{}" in template for template in found["tuxpaint"].templates)
    assert ClassSet("x", ("owl", "bird"), ("{}", "a picture of a {}.")).prompts() == [
        ["owl", "a picture of an owl."],
        ["bird", "a picture of a bird."],
    ]
    assert class_sets(rows[4:]) == {}


def test_a_row_stays_in_its_part_when_rows_are_added() -> None:
    keys = [f"k{number}" for number in range(4000)]
    few, many = split_by_key(keys[:2000], 3, 0.1, 0.2), split_by_key(keys, 3, 0.1, 0.2)
    assert set(few.test) <= set(many.test) and set(few.validation) <= set(many.validation)
    for part, share in ((many.train, 0.7), (many.validation, 0.1), (many.test, 0.2)):
        assert abs(len(part) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert split_by_key(keys, 4, 0.1, 0.2) != many
    with pytest.raises(HymaError, match="none fell to the"):
        split_by_key(keys[:2], 0, 0.1, 0.1)

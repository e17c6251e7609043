"""Questions drawn from the metadata of the caption corpora."""

from collections import Counter, defaultdict

import pytest

from hyma_mllm.data.corpora import load_corpus
from hyma_mllm.data.corpus_questions import CAPTION_REQUEST, TYPES, corpus_captions, corpus_questions
from hyma_mllm.data.corpus_questions_names import alike, keywords_of, short_name, there_is, with_article
from hyma_mllm.data.questions import SplitShares, open_questions
from hyma_mllm.data.questions_balance import right_answer
from hyma_mllm.data.rows import Row
from hyma_mllm.data.splits import split_by_concept
from hyma_mllm.metrics.vqa import accuracy, score
from hyma_mllm.metrics.vqa_prior import prior_answers


def corpus_row(number, name, label, texts=None, concept=None):
    return Row(f"c/{number}", b"x", texts or (name,), concept or name, label, "set" if label else None)


@pytest.mark.parametrize(
    ("caption", "concept", "name"),
    [
        ("A frog.", "frog", "frog"),
        ("construction worker", "construction worker", "construction worker"),
        ("Remember to flush the toilet and wash your hands!", "toilet", "toilet"),
        ("There are two rabbits on this lawn.", "rabbit", "rabbits"),
        ("person: blond hair", "blond hair", "blond hair"),
        ("“Give Way” means you have to let others go.", "give way means you", None),
        ("2 dead frogs", "2 dead frog", None),
    ],
)
def test_short_names(caption, concept, name):
    assert short_name(Row("k", b"x", (caption,), concept)) == name


def test_keywords_come_from_the_second_caption():
    texts = ("person: beard", "person: beard: an emoji for man, facial-hair, X-ray 3 and bearded")
    assert keywords_of(Row("k", b"x", texts, "beard")) == ("man", "facial-hair", "bearded")


def test_articles():
    words = ("owl", "unicorn", "hourglass", "glasses", "bus", "cactus", "dress", "one-eyed man")
    assert [with_article(word) for word in words] == [
        "an owl", "a unicorn", "an hourglass", "glasses", "a bus", "a cactus", "a dress", "a one-eyed man",
    ]  # fmt: skip
    assert there_is("dog") == "Is there a dog in the picture?"
    assert there_is("tennis shoes") == "Are there tennis shoes in the picture?"


def test_words_that_are_alike():
    assert alike("person doing sport", "person moving")
    assert alike("dogs", "hot dog")
    assert not alike("piece of clothing", "piece of tableware")


@pytest.fixture
def rows():
    kinds = {"mammal": 20, "fruit": 12, "insect or snail": 9, "tool": 7}
    return [
        corpus_row(f"{kind}{n}", f"{kind[:2]}{chr(97 + n)}x", kind) for kind, many in kinds.items() for n in range(many)
    ]


def test_every_word_is_right_as_often_as_wrong_and_yes_as_often_as_no(rows):
    (asked,) = corpus_questions(rows, [range(len(rows))], 0)
    by_type = defaultdict(list)
    for row in asked:
        by_type[row.question_type].append(row)
    assert tuple(by_type) == TYPES
    for kind in ("either name", "either kind"):
        balance, first = Counter(), 0
        for row in by_type[kind]:
            wrong = next(choice for choice in row.choices if choice != right_answer(row))
            balance[right_answer(row)] += 1
            balance[wrong] -= 1
            first += row.choices[0] == right_answer(row)
        assert set(balance.values()) == {0}
        assert first == len(by_type[kind]) // 2
    for kind in ("exists name", "exists kind"):
        balance = Counter()
        for row in by_type[kind]:
            balance[row.question] += 1 if right_answer(row) == "yes" else -1
        assert set(balance.values()) == {0}
    assert len({row.key for row in asked}) == len(asked)


def test_a_class_of_two_words_may_be_answered_by_either_and_a_keyword_earns_a_part():
    row = corpus_row(0, "taxi", "car or truck", ("taxi", "taxi: a drawing of cab and vehicle"))
    (asked,) = corpus_questions([row], [[0]], 0)
    what, kind = asked[0], asked[1]
    assert (right_answer(what), right_answer(kind)) == ("taxi", "car or truck")
    assert [score(said, what.answers) for said in ("taxi", "cab", "boat")] == pytest.approx([1, 0.3, 0])
    assert [score(said, kind.answers) for said in ("a car", "truck")] == pytest.approx([0.6, 0.6])
    # Alone in its part, there is nothing to choose from.
    assert len(asked) == 2


def test_a_class_that_leaves_too_few_partners_is_asked_less_but_still_balanced():
    rows = [corpus_row(n, f"a{chr(97 + n)}x", "mammal") for n in range(9)] + [corpus_row(9, "zzx", "tool")]
    (asked,) = corpus_questions(rows, [range(10)], 0)
    either = [row for row in asked if row.question_type == "either kind"]
    assert Counter(map(right_answer, either)) == {"mammal": 1, "tool": 1}


def test_captions_ask_for_the_first_caption():
    (row,) = corpus_captions([corpus_row(0, "taxi", None, ("A taxi.", "taxi: a drawing of cab"))])
    assert (row.turns, row.question_type, row.key) == (((CAPTION_REQUEST, "A taxi."),), "caption", "c/0#caption")


@pytest.mark.corpus
def test_the_emoji_split_as_the_corpus_itself_and_held_out_names_are_never_heard_in_training():
    source = open_questions("questions:corpora+fluent", SplitShares(seed=3))
    rows = list(load_corpus("fluent").rows())
    split = split_by_concept(rows, 3, 0.1, 0.15)
    pictures = {part: {row.image for row in asked} for part, asked in source.parts.items()}
    for part, numbers in (("train", split.train), ("validation", split.validation), ("test", split.test)):
        assert pictures[part] <= {rows[number].image for number in numbers}
        assert len(pictures[part]) > 0.9 * len(numbers)

    def names(part):
        named = [row for row in source.parts[part] if row.question_type in ("what", "either name")]
        return {right_answer(row) for row in named} | {choice for row in named for choice in row.choices}

    assert not names("train") & names("test")
    captions = open_questions("questions:captions+fluent/train", SplitShares(seed=3))
    assert {row.image for row in captions.rows()} == {rows[number].image for number in split.train}


@pytest.mark.corpus
def test_no_language_prior_over_the_emoji_questions():
    parts = open_questions("questions:corpora+fluent").parts
    test = parts["test"]
    blind = accuracy(
        prior_answers(parts["train"], test), [r.answers for r in test], question_types=[r.question_type for r in test]
    )
    scores = {kind: held["accuracy"] for kind, held in blind["by_type"].items()}
    assert set(scores) == set(TYPES)
    assert scores["exists name"] == scores["exists kind"] == 50
    assert scores["either name"] == pytest.approx(50, abs=1)
    assert scores["either kind"] < 65
    assert scores["what"] < 5
    assert scores["kind"] < 15

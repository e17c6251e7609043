"""Rows that are longer than their room: what is cut, and what is refused."""

import pytest
from tiny_prompts import EVERY, PROMPTERS, TEMPLATES, labelled_runs, tokenizer_of

from hyma_mllm.data.prompts import IGNORE, SHORT_ANSWER, Prompter, Turn
from hyma_mllm.errors import HymaError

QUESTION, ANSWER = "What is this? " * 20 + SHORT_ANSWER, "a red kite, " * 10 + "yes"


def limited(kind: str, template: str, room: int) -> Prompter:
    """A prompter with so many tokens for `after`."""
    before = len(PROMPTERS[kind, template].before)
    return Prompter(tokenizer_of(kind, TEMPLATES[template]), "tiny", before + 9 + room, 9)


@EVERY
@pytest.mark.parametrize("turns", [1, 2])
def test_truncation_takes_questions_first_and_keeps_the_rest(kind: str, template: str, turns: int) -> None:
    rows = [Turn(QUESTION, ANSWER)] * turns
    whole = PROMPTERS[kind, template].encode("row", rows)
    short = limited(kind, template, len(whole.after) - 40).encode("row", rows)
    assert len(short.after) <= len(whole.after) - 40
    assert short.cut == len(whole.after) - len(short.after)
    assert 40 <= short.cut < 60
    assert labelled_runs(short) == labelled_runs(whole)
    unlabelled = PROMPTERS[kind, template].decode(
        [t for t, label in zip(short.after, short.labels, strict=True) if label == IGNORE]
    )
    assert unlabelled.count(SHORT_ANSWER.strip()) == turns, "the instruction is kept"


@EVERY
def test_truncation_then_takes_the_answers_tail(kind: str, template: str) -> None:
    prompter = PROMPTERS[kind, template]
    rows = [Turn(QUESTION, ANSWER), Turn("What?", ANSWER)]
    bare = prompter.encode("row", [Turn("", ANSWER), Turn("", ANSWER)])
    short = limited(kind, template, len(bare.after) - 20).encode("row", rows)
    assert short.cut == len(prompter.encode("row", rows).after) - len(short.after)
    first, second = labelled_runs(short)
    assert first == labelled_runs(bare)[0]
    assert second[-1] == prompter.end_id
    assert len(second) == len(labelled_runs(bare)[1]) - 20
    assert second[:-1] == labelled_runs(bare)[1][: len(second) - 1]
    assert ANSWER.startswith(prompter.decode(second))


def test_what_cannot_be_cut_to_fit_is_refused() -> None:
    tight = limited("byte", "chatml", 40)
    with pytest.raises(HymaError, match=r"The answer in turn 1 of row a/5 takes \d+ tokens of tiny"):
        tight.encode("a/5", [Turn("What?", "kite " * 200)])
    with pytest.raises(HymaError, match="The 9 turns of row a/6 do not fit"):
        tight.encode("a/6", [Turn("What?", "kite")] * 9)
    with pytest.raises(HymaError, match="leaves no room for an answer"):
        tight.prompt("What is this? " * 30)
    with pytest.raises(HymaError, match="A picture of 9 tokens and the chat template of tiny need"):
        limited("byte", "chatml", 5)

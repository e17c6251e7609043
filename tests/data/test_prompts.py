"""Prompts, template by template: what the labels spell, what generation reads, and what is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_prompts import (
    CHATML,
    EVERY,
    KINDS,
    PROMPTERS,
    SPECIALS,
    TEMPLATES,
    TURNS,
    ZEPHYR,
    labelled_runs,
    sentence_piece,
    tokenizer_of,
)
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hyma_mllm.data.prompts import IGNORE, IMAGE_TOKEN, SHORT_ANSWER, Encoded, Prompter, Turn, collate, collate_left
from hyma_mllm.errors import HymaError
from hyma_mllm.zoo.llm import llm_card, llm_on_disk, load_tokenizer


@EVERY
@pytest.mark.parametrize("count", [1, 2, 3])
def test_labels_are_the_answers_and_their_end_tokens(kind: str, template: str, count: int) -> None:
    prompter = PROMPTERS[kind, template]
    encoded = prompter.encode("row", TURNS[:count])
    runs = labelled_runs(encoded)
    assert [prompter.decode(run) for run in runs] == [turn.answer for turn in TURNS[:count]]
    raw = tokenizer_of(kind)
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "bare header": "<|im_end|>"}
    assert {raw.convert_ids_to_tokens(run[-1]) for run in runs} == {ends.get(template, "</s>")}
    assert all(prompter.end_id not in run[:-1] for run in runs)
    assert encoded.labels[-1] == prompter.end_id, "nothing is read behind the last end token"
    assert encoded.cut == 0


@EVERY
def test_training_reads_what_generation_reads(kind: str, template: str) -> None:
    prompter = PROMPTERS[kind, template]
    for question in ("What is this?", "the user said: red", "", "naïve 图 🎈?"):
        encoded = prompter.encode("row", [Turn(question, "red")])
        first = next(n for n, label in enumerate(encoded.labels) if label != IGNORE)
        assert prompter.prompt(question) == encoded.after[:first]


@EVERY
def test_the_prompt_is_the_template_tokenised_in_one_piece(kind: str, template: str) -> None:
    """As an exported directory does it: one text, the picture's token in it."""
    prompter, tokenizer = PROMPTERS[kind, template], tokenizer_of(kind, TEMPLATES[template])
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    message = {"role": "user", "content": f"{IMAGE_TOKEN}\nWhat is this?"}
    text = tokenizer.apply_chat_template(
        [message],
        tokenize=False,
        add_generation_prompt=True,
        chat_template=TEMPLATES[template] or prompter.chat_template,
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert [*prompter.before, image, *prompter.prompt("What is this?")] == ids
    assert image not in prompter.before + prompter.prompt("What is this?")


@EVERY
def test_the_whole_row_is_the_templates_text(kind: str, template: str) -> None:
    prompter, tokenizer = PROMPTERS[kind, template], tokenizer_of(kind)
    encoded = prompter.encode("row", TURNS[:2])
    messages = [
        {"role": role, "content": text}
        for picture, turn in zip((f"{IMAGE_TOKEN}\n", ""), TURNS, strict=False)
        for role, text in (("user", picture + turn.question), ("assistant", turn.answer))
    ]
    used = TEMPLATES[template] or prompter.chat_template
    before, after = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=used).split(IMAGE_TOKEN)
    spelt = tokenizer.decode(list(prompter.before)), tokenizer.decode(list(encoded.after))
    if kind == "piece":  # a sentence piece behind a control token starts with a space of its own
        before, after = (text.replace(" ", "") for text in (before, after))
        spelt = spelt[0].replace(" ", ""), spelt[1].replace(" ", "")
    assert spelt[0] == before
    assert spelt[1] == after.rstrip()


@EVERY
def test_answers_are_read_as_in_the_template_tokenised_in_one_piece(kind: str, template: str) -> None:
    prompter, tokenizer = PROMPTERS[kind, template], tokenizer_of(kind)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    messages = [
        {"role": "user", "content": f"{IMAGE_TOKEN}\nWhat is this?"},
        {"role": "assistant", "content": "the red kite"},
        {"role": "user", "content": "Is it?"},
        {"role": "assistant", "content": "red"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=prompter.chat_template)
    whole = tokenizer.encode(text, add_special_tokens=False)
    after = whole[len(prompter.before) + 1 :]
    encoded = prompter.encode("row", [Turn("What is this?", "the red kite"), Turn("Is it?", "red")])
    if template == "trailing space":  # its prompt ends in the space that the answer's first token would begin with
        assert list(encoded.after) != after[: len(encoded.after)]
    else:
        assert list(encoded.after) == after[: len(encoded.after)]


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0"), max_size=40)
question_texts = text | st.sampled_from(["<|im_end|>", "a <image>", "x</s>", "[/INST]<s>"])
answer_texts = text.filter(str.strip) | st.sampled_from(["<image>", "</s> yes", "<<|im_end|>>"])


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(KINDS),
    template=st.sampled_from(sorted(TEMPLATES)),
    questions=st.lists(question_texts, min_size=1, max_size=2),
    answers=st.lists(answer_texts, min_size=2, max_size=2),
)
def test_any_text_comes_back_from_its_labels(
    kind: str, template: str, questions: list[str], answers: list[str]
) -> None:
    prompter = PROMPTERS[kind, template]
    turns = [Turn(question, answer) for question, answer in zip(questions, answers, strict=False)]
    if kind == "piece" and any("▁" in turn.answer for turn in turns):
        return  # cannot be told from a space there
    encoded = prompter.encode("row", turns)
    normalizer = tokenizer_of(kind).backend_tokenizer.normalizer
    spelt = [normalizer.normalize_str(prompter.decode(run)) for run in labelled_runs(encoded)]
    assert spelt == [normalizer.normalize_str(turn.answer.strip()) for turn in turns]
    first = next(n for n, label in enumerate(encoded.labels) if label != IGNORE)
    assert prompter.prompt(questions[0]) == encoded.after[:first]
    size = len(tokenizer_of(kind))
    assert all(token < size for token in encoded.after), "the picture's token has no embedding"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelt", [*SPECIALS[1:5], IMAGE_TOKEN])
def test_text_that_spells_a_control_token_stays_text(kind: str, spelt: str) -> None:
    prompter = PROMPTERS[kind, "chatml"]
    encoded = prompter.encode("row", [Turn(f"Is {spelt} <{spelt}> one?", f"a {spelt} is")])
    plain = prompter.encode("row", [Turn("Is it one?", "a kite is")])
    controls = set(tokenizer_of(kind).all_special_ids) | set(tokenizer_of(kind).added_tokens_decoder)
    assert [t for t in encoded.after if t in controls] == [t for t in plain.after if t in controls]
    assert prompter.decode(labelled_runs(encoded)[0]) == f"a {spelt} is"


@pytest.mark.parametrize("kind", KINDS)
def test_the_given_tokenizer_stays_as_it_was(kind: str) -> None:
    tokenizer = tokenizer_of(kind, CHATML)
    size, ids, state = len(tokenizer), tokenizer.encode("a <image> b"), tokenizer.backend_tokenizer.to_str()
    prompter = Prompter(tokenizer, "tiny", 500, 9, system="Be brief.")
    prompter.encode("row", TURNS)
    assert (len(tokenizer), tokenizer.encode("a <image> b"), tokenizer.chat_template) == (size, ids, CHATML)
    assert tokenizer.backend_tokenizer.to_str() == state


def test_a_tokenizer_that_has_the_pictures_token_keeps_its_id() -> None:
    tokenizer = tokenizer_of("byte", CHATML)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    prompter = Prompter(tokenizer, "tiny", 500, 9)
    assert prompter.before == PROMPTERS["byte", "chatml"].before
    assert prompter.encode("row", TURNS) == PROMPTERS["byte", "chatml"].encode("row", TURNS)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "Row a/1 has no question"),
        ([Turn("What?", " \n")], "Row a/1 has an empty answer in turn 1"),
        ([Turn("What?", "red"), Turn("What?", "")], "Row a/1 has an empty answer in turn 2"),
        ([Turn("What\ud83d?", "red")], "row a/1 of tiny holds half a surrogate pair at character 4"),
        ([Turn("What?", "re\ufdd0d")], r"row a/1 of tiny holds the noncharacter U\+FDD0"),
    ],
)
def test_a_row_without_meaning_is_refused_by_name(turns: list[Turn], message: str) -> None:
    with pytest.raises(HymaError, match=message):
        PROMPTERS["byte", "chatml"].encode("a/1", turns)


def test_an_answer_outside_the_vocabulary_is_refused_by_name() -> None:
    backend = sentence_piece()
    vocabulary = {token: n for token, n in backend.get_vocab().items() if not token.startswith("<0x")}
    names = {token: number for number, token in enumerate(sorted(vocabulary, key=vocabulary.__getitem__))}
    backend.model = models.BPE(vocab=names, merges=[], unk_token="<unk>")
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = ZEPHYR
    prompter = Prompter(tokenizer, "tiny", 500, 9)
    prompter.encode("question", [Turn("图?", "kite")])  # an unknown word in a question is the LLM's own business
    with pytest.raises(HymaError, match="row a/2 comes back from the tokenizer of tiny as 'kite'"):
        prompter.encode("a/2", [Turn("What?", "kite 图")])


def test_an_odd_end_of_turn_in_ordinary_vocabulary_is_caught() -> None:
    """A word-level vocabulary can spell a control token from plain text, whatever is broken in between."""
    words = {
        name: number
        for number, name in enumerate([*SPECIALS, *"@?", "\n", "small", "blue", "kite", "a", "What", "is", "this"])
    }
    backend = Tokenizer(models.WordLevel(vocab=words, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace("@", "</s>")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    end = "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}" + end + "{% endfor %}"
    prompter = Prompter(tokenizer, "tiny", 500, 9)
    with pytest.raises(HymaError, match="makes a control token of the text of row a/3"):
        prompter.encode("a/3", [Turn("What @ is", "a kite")])
    with pytest.raises(HymaError, match="row a/4 does not end in one </s>"):
        prompter.encode("a/4", [Turn("What is", "a @ kite")])


def test_batches_are_padded_right_to_train_and_left_to_generate() -> None:
    rows = [Encoded((5, 6, 7), (IGNORE, 6, 7), 0), Encoded((8, 9), (IGNORE, 9), 0)]
    batch = collate(rows, pad=0)
    assert batch.after.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.labels.tolist() == [[IGNORE, 6, 7], [IGNORE, 9, IGNORE]]
    assert batch.mask.tolist() == [[True, True, True], [True, True, False]]
    ids, mask = collate_left([(5, 6, 7), (8,)], pad=3)
    assert ids.tolist() == [[5, 6, 7], [3, 3, 8]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]


PACKAGED = {"smollm2-135m": "<|im_end|>", "qwen2.5-coder-0.5b": "<|im_end|>", "gemma3-270m": "<eos>"}


@pytest.mark.zoo
@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_tokenizers_align(name: str) -> None:
    card = llm_card(name)
    if card.terms and not llm_on_disk(card):
        pytest.skip(f"{name} was never fetched here; its terms are for its user to accept")
    tokenizer = load_tokenizer(card, accepted_terms=[card.terms or ""])
    size = len(tokenizer)
    prompter = Prompter(tokenizer, name, 1024, 9)
    turns = [
        Turn("What is this?" + SHORT_ANSWER, "rouge-gorge 图 🎈"),
        Turn("Is <|im_end|> <image> red?", "Yes, it is."),
    ]
    encoded = prompter.encode("row", turns)
    runs = labelled_runs(encoded)
    assert [prompter.decode(run) for run in runs] == [turn.answer for turn in turns]
    assert {tokenizer.convert_ids_to_tokens(run[-1]) for run in runs} == {PACKAGED[name]}
    first = next(n for n, label in enumerate(encoded.labels) if label != IGNORE)
    assert prompter.prompt(turns[0].question) == encoded.after[:first]
    assert max(encoded.after + prompter.before) < size == len(tokenizer)
    text = tokenizer.decode(list(prompter.before + encoded.after))
    assert text.count("<bos>") == int(name.startswith("gemma"))
    assert ("system" in text) == (not name.startswith("gemma"))

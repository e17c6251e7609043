"""Prompts, template by template: what the labels spell, what generation reads, and what is refused."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hyma_mllm.data.prompts import (
    IGNORE,
    IMAGE_TOKEN,
    SHORT_ANSWER,
    Encoded,
    Prompter,
    Turn,
    collate,
    collate_left,
)
from hyma_mllm.errors import HymaError
from hyma_mllm.zoo.llm import llm_card, llm_on_disk, load_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for message in rest %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
BARE_HEADER = (  # a control token right in front of the answer, as Phi-4 has it
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
TRAILING_SPACE = VICUNA.replace("'ASSISTANT:'", "'ASSISTANT: '")
TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "zephyr": ZEPHYR,
    "vicuna": VICUNA,
    "bare header": BARE_HEADER,
    "trailing space": TRAILING_SPACE,
    "plain": None,
}
SPECIALS = [
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
WORDS = ["the", "user", "assistant", "What", "is", "this", "red", "Question", "Answer", "INST", "ASSIST", "ANT", "USER"]


LLAMA3_WORDS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def words_and_merges(alphabet: list[str], words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary that spells each word from its left end."""
    tokens, merges = list(dict.fromkeys([*SPECIALS, *alphabet])), []
    for word in words:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            tokens.append(word[:end])
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, list(dict.fromkeys(merges))


def byte_level() -> Tokenizer:
    """GPT-2's kind."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Merges over the ends of question marks and lines, which real vocabularies have too.
    vocabulary, merges = words_and_merges(alphabet, [*("Ġ" + word for word in WORDS), *WORDS, "?Ċ", "ĊĊ", ".Ċ"])
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=LLAMA3_WORDS, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Llama 2's kind: a space in front of every text, bytes for what the vocabulary lacks."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁"] + [chr(code) for code in range(33, 127)]
    vocabulary, merges = words_and_merges(alphabet, [*("▁" + word for word in WORDS), *WORDS])
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def tokenizer_of(kind: str, template: str | None = None, bos: bool = False) -> PreTrainedTokenizerBase:
    backend = {"byte": byte_level, "piece": sentence_piece}[kind]()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def prompter_of(kind: str, template: str | None = CHATML, room: int = 2000, **options: Any) -> Prompter:
    return Prompter(tokenizer_of(kind, template), "tiny", room, 9, **options)


KINDS = ["byte", "piece"]
EVERY = pytest.mark.parametrize(("kind", "template"), [(k, t) for k in KINDS for t in TEMPLATES])
CACHE = {(kind, name): prompter_of(kind, template) for kind in KINDS for name, template in TEMPLATES.items()}


def labelled_runs(encoded: Encoded) -> list[list[int]]:
    """The labels in runs, the IGNORE between them left out; labels must repeat the ids."""
    assert len(encoded.after) == len(encoded.labels)
    runs, inside = list[list[int]](), False
    for token, label in zip(encoded.after, encoded.labels, strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            runs += [[]] if not inside else []
            runs[-1].append(label)
        inside = label != IGNORE
    return runs


TURNS = [Turn("What is this?", "the red kite"), Turn("Is it  a 'kite'?\nSay yes or no.", "yes!"), Turn("", "I")]


@EVERY
@pytest.mark.parametrize("count", [1, 2, 3])
def test_labels_are_the_answers_and_their_end_tokens(kind: str, template: str, count: int) -> None:
    prompter = CACHE[kind, template]
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
    prompter = CACHE[kind, template]
    for question in ("What is this?", "the user said: red", "", "naïve 图 🎈?"):
        encoded = prompter.encode("row", [Turn(question, "red")])
        first = next(n for n, label in enumerate(encoded.labels) if label != IGNORE)
        assert prompter.prompt(question) == encoded.after[:first]


@EVERY
def test_the_prompt_is_the_template_tokenised_in_one_piece(kind: str, template: str) -> None:
    """As an exported directory does it: one text, the picture's token in it."""
    prompter, tokenizer = CACHE[kind, template], tokenizer_of(kind, TEMPLATES[template])
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
    prompter, tokenizer = CACHE[kind, template], tokenizer_of(kind)
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
    prompter, tokenizer = CACHE[kind, template], tokenizer_of(kind)
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
    prompter = CACHE[kind, template]
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
    prompter = CACHE[kind, "chatml"]
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
    assert prompter.before == CACHE["byte", "chatml"].before
    assert prompter.encode("row", TURNS) == CACHE["byte", "chatml"].encode("row", TURNS)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("adds", [True, False])
def test_bos_stands_first_exactly_once(template: str, adds: bool) -> None:
    tokenizer = tokenizer_of("piece", TEMPLATES[template], bos=adds)
    prompter = Prompter(tokenizer, "tiny", 500, 9)
    own = template in ("llama2", "llama3", "gemma")
    bos = [token == tokenizer.bos_token_id for token in prompter.before + prompter.prompt("What?")]
    assert sum(bos) == int(adds or own)
    assert bos[0] == (adds or own)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "gemma"])
def test_the_system_prompt_stands_in_front_of_the_picture(kind: str, template: str) -> None:
    system = """Say "it's" {{ x }} %} — 🎈."""
    prompter = prompter_of(kind, TEMPLATES[template], system=system)
    tokenizer = tokenizer_of(kind)
    assert system in tokenizer.decode(list(prompter.before))
    assert system not in tokenizer.decode(list(CACHE[kind, template].before))
    assert prompter.prompt("What?") == CACHE[kind, template].prompt("What?")


@EVERY
def test_the_exported_template_reads_contents_in_parts(kind: str, template: str) -> None:
    prompter, tokenizer = CACHE[kind, template], tokenizer_of(kind)
    plain = [{"role": "user", "content": f"{IMAGE_TOKEN}\nWhat?"}, {"role": "assistant", "content": "red"}]
    parts = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    rendered = [
        tokenizer.apply_chat_template(messages, chat_template=prompter.chat_template, tokenize=False)
        for messages in (plain, parts)
    ]
    assert rendered[0] == rendered[1]
    assert rendered[0].count(IMAGE_TOKEN) == 1


def test_templates_of_the_day_and_of_thought_are_fixed() -> None:
    day = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    today = day + "{{ 'Today: ' + date_string + '\n' }}"
    think = "{% if add_generation_prompt and enable_thinking is not defined %}{{ '<think>' }}{% endif %}"
    prompter = prompter_of("byte", today + CHATML + think)
    assert "Today: 26 Jul 2024" in tokenizer_of("byte").decode(list(prompter.before))
    assert "<think>" not in tokenizer_of("byte").decode(list(prompter.prompt("What?")))


CONTENT = "message['content']"
UPPER = "(message['content'] | upper if message['role'] == 'assistant' else message['content'])"
WELL = "('Well: ' if message['role'] == 'assistant' else '') + message['content']"
BAD_TEMPLATES = {
    "drops the question": CHATML.replace(CONTENT, "'<image>'"),
    "reorders or rewrites turns": CHATML.replace("in messages %}", "in messages | reverse %}"),
    "writes the picture 2 times": CHATML.replace(CONTENT, f"{CONTENT} + {CONTENT}"),
    "writes the picture 0 times": CHATML.replace(CONTENT, f"{CONTENT} | replace('<image>', '')"),
    "no end token behind an answer": CHATML.replace("+ '<|im_end|>' + '\n'", "+ '###\n'"),
    "drops or changes the answer": CHATML.replace(CONTENT, UPPER),
    "puts 'Well:' in front of the answer": CHATML.replace(CONTENT, WELL),
    "refuses a conversation of user": CHATML + "{{ raise_exception('no') }}",
}


@pytest.mark.parametrize("fault", BAD_TEMPLATES)
def test_a_template_that_does_not_align_is_refused(fault: str) -> None:
    with pytest.raises(HymaError, match="chat template of tiny") as caught:
        prompter_of("byte", BAD_TEMPLATES[fault])
    assert fault in str(caught.value)
    assert str(caught.value).count(". ") == 0, "one sentence"


@pytest.mark.parametrize("template", [GEMMA, CHATML.replace("for message in messages", "for message in messages[-2:]")])
def test_a_system_prompt_that_the_template_does_not_take_is_refused(template: str) -> None:
    with pytest.raises(HymaError, match=r"chat template of tiny (refuses .*System role|drops the system prompt)"):
        prompter_of("byte", template.replace("[-2:]", " if message['role'] != 'system'"), system="Be brief.")


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_row() -> None:
    template = CHATML.replace(
        "message['content'] +", "(message['content'] if loop.index0 > messages | length - 3 else 'x') +"
    )
    prompter = prompter_of("byte", template)
    prompter.encode("fine", TURNS[:1])
    with pytest.raises(HymaError, match=r"tiny reorders or rewrites turn 1 of row bad/7"):
        prompter.encode("bad/7", TURNS[:2])


def test_several_templates_need_a_default() -> None:
    tokenizer = tokenizer_of("byte")
    tokenizer.chat_template = {"tools": CHATML, "rag": CHATML}
    with pytest.raises(HymaError, match="chat templates rag, tools and no default"):
        Prompter(tokenizer, "tiny", 500, 9)
    tokenizer.chat_template = {"tools": "", "default": CHATML}
    assert Prompter(tokenizer, "tiny", 500, 9).before == CACHE["byte", "chatml"].before


def test_a_base_model_needs_an_end_token() -> None:
    tokenizer = tokenizer_of("byte")
    tokenizer.eos_token = None
    with pytest.raises(HymaError, match="neither a chat template nor an end token"):
        Prompter(tokenizer, "tiny", 500, 9)


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
        CACHE["byte", "chatml"].encode("a/1", turns)


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


QUESTION, ANSWER = "What is this? " * 20 + SHORT_ANSWER, "a red kite, " * 10 + "yes"


def limited(kind: str, template: str, room: int) -> Prompter:
    """A prompter with so many tokens for `after`."""
    before = len(CACHE[kind, template].before)
    return Prompter(tokenizer_of(kind, TEMPLATES[template]), "tiny", before + 9 + room, 9)


@EVERY
@pytest.mark.parametrize("turns", [1, 2])
def test_truncation_takes_questions_first_and_keeps_the_rest(kind: str, template: str, turns: int) -> None:
    rows = [Turn(QUESTION, ANSWER)] * turns
    whole = CACHE[kind, template].encode("row", rows)
    short = limited(kind, template, len(whole.after) - 40).encode("row", rows)
    assert len(short.after) <= len(whole.after) - 40
    assert short.cut == len(whole.after) - len(short.after)
    assert 40 <= short.cut < 60
    assert labelled_runs(short) == labelled_runs(whole)
    unlabelled = CACHE[kind, template].decode(
        [t for t, label in zip(short.after, short.labels, strict=True) if label == IGNORE]
    )
    assert unlabelled.count(SHORT_ANSWER.strip()) == turns, "the instruction is kept"


@EVERY
def test_truncation_then_takes_the_answers_tail(kind: str, template: str) -> None:
    prompter = CACHE[kind, template]
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

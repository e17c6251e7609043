"""Chat templates of the known families, tokenizers of two kinds with a tiny vocabulary, and their prompters."""

from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hyma_mllm.data.prompts import IGNORE, Encoded, Prompter, Turn

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
TURNS = [Turn("What is this?", "the red kite"), Turn("Is it  a 'kite'?\nSay yes or no.", "yes!"), Turn("", "I")]
KINDS = ["byte", "piece"]
EVERY = pytest.mark.parametrize(("kind", "template"), [(k, t) for k in KINDS for t in TEMPLATES])


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


PROMPTERS = {(kind, name): prompter_of(kind, template) for kind in KINDS for name, template in TEMPLATES.items()}


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

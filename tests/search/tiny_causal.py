"""A tiny causal task: random vision tokens, two random LLMs of a few words, questions about a colour."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.data.prompts import Prompter
from hyma_mllm.data.rows import Row
from hyma_mllm.pairs import PairGrid
from hyma_mllm.search.mllm_parts import Reader, Tower, facts_of
from hyma_mllm.search.mllm_prepare import encode_rows
from hyma_mllm.search.mllm_score import score_answers
from hyma_mllm.search.mllm_task import MLLMTask
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.llm import LanguageModel

SPEC = ConnectorSpec.named("mlp1", hidden=0, activation="gelu")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<end>")
WORDS = (
    "Question",
    "Answer",
    ":",
    "What",
    "this?",
    "a",
    "small",
    "kite",
    "is",
    "it",
    "red",
    "blue",
    "round",
    "square",
    "what",
    "colour",
    "shape",
    "?",
)
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}Question : {{ m.content }} {% else %}"
    "Answer : {{ m.content }}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}Answer : {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.add_special_tokens(list(SPECIAL))
    found = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    found.chat_template = TEMPLATE
    return found


def llm(name: str, width: int, seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=width, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, initializer_range=0.3, bos_token_id=1, eos_token_id=4,
        pad_token_id=0,
    )  # fmt: skip
    card = ModelCard(name, "llm", "here", "0", width, 1, "none")
    return LanguageModel(card, LlamaForCausalLM(config).double(), tokenizer())


def make_task(questions: int = 48, double: bool = True) -> MLLMTask:
    """Three towers (two widths, two token counts) and two LLMs; the colour of a picture is its first channel."""
    draw = torch.Generator().manual_seed(5)
    colour = torch.randint(0, 2, (12,), generator=draw)
    towers = []
    for count, width in ((4, 6), (2, 6), (3, 8)):
        tokens = torch.randn(12, count, width, generator=draw, dtype=torch.float64)
        tokens[..., 0] = 3.0 * (2 * colour[:, None] - 1)
        tokens = tokens if double else tokens.float()
        towers.append(Tower(tokens, count, tokens.mean((0, 1)), tokens.std((0, 1))))
    picture = torch.arange(questions) % 12
    rows = [
        Row(f"q{number}", Path("x.png"), (), "c", question="what colour ?" if number % 3 else "what is it colour ?",
            answers=("red" if colour[number % 12] else "blue",) * 10, question_type="colour")
        for number in range(questions)
    ]  # fmt: skip
    readers = {}
    for number, (name, width, seed) in enumerate((("a", 12, 1), ("b", 16, 2))):
        model = llm(name, width, seed)
        if not double:
            model.model.float()
        prompter = Prompter(model.tokenizer, name, 64, 4)
        encoded = encode_rows(prompter, rows, name)
        readers[number] = Reader(model, prompter, model.prefix(torch.tensor(prompter.before)), encoded)
    grid = PairGrid(("t0", "t1", "t2"), (6, 6, 8), ("a", "b"), (12, 16), "vision_to_text")
    split = torch.arange(questions).split([questions - 24, 12, 12])
    facts = [facts_of(readers[number], range(questions - 24)) for number in (0, 1)]
    parts = (split[0], split[1], {"held out": split[2]}, 5, 4)
    return MLLMTask(
        grid, towers, readers, facts, rows, picture, *parts, open_reader=readers.__getitem__, scorer=score_answers
    )

"""What the causal search's task is made of: towers as it reads them, LLMs with the questions in their own words."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

import torch
from torch import Tensor, nn

from hyma_mllm.data.prompts import IGNORE, Encoded, Prompter, TextBatch, collate
from hyma_mllm.data.rows import Row
from hyma_mllm.zoo.llm import LanguageModel, Prefix


class Tokens(Protocol):
    """The vision tokens of one tower over all pictures."""

    def __getitem__(self, rows: Tensor) -> Tensor:
        """[rows, tokens, width] float32."""


@dataclass
class Tower:
    """One vision tower as a search reads it.

    Attributes:
        tokens: of all pictures, raw.
        count: tokens of a picture.
        mean, spread: [width] of each channel over the training pictures; what a connector reads is standardised.
    """

    tokens: Tokens
    count: int
    mean: Tensor
    spread: Tensor

    def read(self, pictures: Tensor) -> Tensor:
        """Standardised tokens [pictures, tokens, width] float32."""
        raw = self.tokens[pictures]
        return (raw - self.mean) / self.spread


@dataclass
class Reader:
    """One LLM with the questions in its own words.

    Attributes:
        model: the LLM.
        prompter: its chat template.
        prefix: keys and values of what stands in front of every picture.
        encoded: every row, with its answers; the labels stand on answers and end tokens only.
    """

    model: LanguageModel
    prompter: Prompter
    prefix: Prefix
    encoded: Sequence[Encoded]

    @property
    def pad(self) -> int:
        """Id that fills up a batch."""
        return int(self.model.tokenizer.pad_token_id)

    @property
    def device(self) -> torch.device:
        """Where the LLM is."""
        return self.model.head().weight.device

    def texts(self, questions: Iterable[int]) -> TextBatch:
        """The rows of a batch, padded on the right."""
        return collate([self.encoded[row] for row in questions], self.pad)


@dataclass(frozen=True)
class LLMFacts:
    """What every process knows of an LLM, whether it holds it or not.

    Attributes:
        embedding_rms: root mean square of its input embeddings.
        mean_embedding: [width] their mean, float32.
        body_weights: of its products, without embeddings and head.
        attention_width: layers times the width of all heads.
        head_weights: vocabulary times width.
        before: tokens in front of the picture.
        text, supervised: tokens of a row behind the picture up to its last label, and those that are learnt; means over
            training rows.
    """

    embedding_rms: float
    mean_embedding: Tensor
    body_weights: int
    attention_width: int
    head_weights: int
    before: int
    text: float
    supervised: float


def facts_of(reader: Reader, train: Iterable[int]) -> LLMFacts:
    """The facts of a loaded LLM, lengths taken over these rows."""
    model = reader.model.model
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    heads = config.num_attention_heads
    rows = [reader.encoded[row] for row in train]
    return LLMFacts(
        embedding_rms=reader.model.embedding_rms,
        mean_embedding=model.get_input_embeddings().weight.detach().mean(0, dtype=torch.float32).cpu(),
        body_weights=sum(layer.in_features * layer.out_features for layer in layers),
        attention_width=config.num_hidden_layers
        * heads
        * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        head_weights=reader.model.vocabulary * reader.model.width,
        before=len(reader.prompter.before),
        text=fmean(row.passed for row in rows),
        supervised=fmean(sum(label != IGNORE for label in row.labels) for row in rows),
    )


@dataclass
class QuestionBatch:
    """Some questions.

    Attributes:
        questions: [batch] int64 row numbers.
        whole: [batch over all processes] int64, of which `questions` is one process's share.
    """

    questions: Tensor
    whole: Tensor


class Scorer(Protocol):
    """Measures of some answers, in percent."""

    def __call__(self, rows: Sequence[Row], answers: Sequence[str]) -> Mapping[str, float]:
        """The accuracy first, then further measures."""

"""A frozen LLM that reads embeddings: gradient flows through it to them, never into it."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from hyma_mllm.errors import HymaError
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.llm_prefix import Prefix, compact, growing, keep_rows, push_right
from hyma_mllm.zoo.llm_widen import linear

# Placeholders of pictures, which have no meaning in written text; a base Gemma likes to write the first.
NEVER_WRITTEN = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
_SLICE = 8192  # vocabulary rows at a time
_READABLE_LAYERS = {"full_attention", "sliding_attention"}


class Head(NamedTuple):
    """The output layer: logits = softcap(scale * (hidden @ weight.T + bias)), softcap(x) = c tanh(x / c).

    Attributes:
        weight: [vocabulary, width], frozen.
        bias: [vocabulary] or None.
        softcap: c (Gemma 2, arXiv 2408.00118, section 2), or None for none.
        scale: a constant factor, 1 in most models.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float


class LanguageModel(nn.Module):
    """A causal LLM, frozen for good: always in eval mode, no parameter has a gradient.

    Attributes:
        card: what it is.
        model: the transformers causal LM.
        tokenizer: its tokenizer, with a padding token.
        width: of its input embeddings.
        vocabulary: number of logits.
        context: tokens that it was made for, None where it has no limit.
        embedding_rms: root mean square of `embed` over the vocabulary: how large an image token should be.
        end_ids: ids that end an answer: those of the model's config and the chat template's end of turn.
        banned_ids: ids that `generate` never writes.
    """

    def __init__(
        self, card: ModelCard, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.card = card
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        config = model.config.get_text_config()
        unreadable = set(getattr(config, "layer_types", None) or ()) - _READABLE_LAYERS
        if unreadable or bool(getattr(config, "num_kv_shared_layers", None)):
            what = ", ".join(sorted(unreadable)) or "shared keys and values"
            raise HymaError(
                f"{card.id} has layers with {what}, whose beginning cannot be kept for many rows; choose an LLM whose "
                "layers are all full or sliding-window attention."
            )
        self.width = int(model.get_input_embeddings().weight.shape[1])
        self.vocabulary = int(self.head().weight.shape[0])
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.embedding_rms = self._embedding_rms()
        self.end_ids = end_ids(model, tokenizer)
        words = tokenizer.get_vocab()
        self.banned_ids = tuple(words[word] for word in NEVER_WRITTEN if word in words)
        self._takes_positions = "position_ids" in inspect.signature(model.get_decoder().forward).parameters
        if checkpointing:
            recompute_layers(card, model)

    def train(self, mode: bool = True) -> "LanguageModel":
        """Stays in eval mode, whatever the module around it does."""
        return super().train(False)

    def embed(self, ids: Tensor) -> Tensor:
        """The input embeddings [..., width] of ids, in the model's dtype, the model's own scaling included."""
        layer = self.model.get_input_embeddings()
        embeddings: Tensor = layer(ids.to(layer.weight.device))
        return embeddings

    def prefix(self, ids: Tensor) -> Prefix:
        """Keys and values of the beginning that all rows share.

        Args:
            ids: [length] int64; may be empty.

        Returns:
            What `hidden` and `generate` take, for any batch size, as often as wanted.
        """
        if ids.numel() == 0:
            return Prefix((), (), 0)
        self._check_length(ids.numel(), 0)
        cache = growing(None, 1)
        with torch.no_grad():
            self._decode(self.embed(ids[None]), cache)
        layers = cache.layers
        return Prefix(tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers), ids.numel())

    def hidden(self, embeddings: Tensor, mask: Tensor, prefix: Prefix | None = None) -> Tensor:
        """The last hidden states, behind the final norm.

        Padding may stand anywhere in a row. Positions count real tokens only, from the prefix on.

        Args:
            embeddings: [batch, length, width] behind the prefix.
            mask: [batch, length], 1 or True for a token and 0 for padding.
            prefix: the shared beginning.

        Returns:
            [batch, length, width] in the model's dtype, zero at padding; gradient flows to `embeddings`.

        Raises:
            HymaError: the longest row is longer than the model's context.
        """
        prefix = prefix if prefix and prefix.length else None
        rows = compact(embeddings, mask)
        if rows.embeddings.shape[1] == 0:
            return torch.zeros_like(embeddings)
        self._check_length(rows.embeddings.shape[1], prefix.length if prefix else 0)
        hidden = self._decode(rows.embeddings, prefix.read_only() if prefix else None)
        return rows.restore(hidden, embeddings.shape[1])

    def head(self) -> Head:
        """The output layer in parts, for losses that never make all logits."""
        layer, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
        if not torch.is_floating_point(layer.weight):
            raise HymaError(f"The output layer of {self.card.id} is quantised; leave it out of the quantisation.")
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1)
        return Head(layer.weight, layer.bias, getattr(config, "final_logit_softcapping", None), scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [..., vocabulary] in float32 of hidden states [..., width]."""
        head = self.head()
        logits = head.scale * linear(hidden, head.weight, head.bias).float()
        return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)

    @torch.no_grad()
    def generate(
        self,
        embeddings: Tensor,
        mask: Tensor,
        max_new_tokens: int,
        prefix: Prefix | None = None,
        banned: Sequence[int] = (),
    ) -> list[list[int]]:
        """Greedy answers.

        Args:
            embeddings: [batch, length, width] behind the prefix; every row needs at least one token.
            mask: [batch, length], 0 for padding, which may stand anywhere (left padding is the custom).
            max_new_tokens: at most so many ids a row.
            prefix: the shared beginning.
            banned: ids never written, besides `banned_ids`.

        Returns:
            The ids of each row, without the one that ended it.

        Raises:
            HymaError: prompt and answer may become longer than the model's context.
        """
        prefix = prefix if prefix and prefix.length else None
        batch, before = embeddings.shape[0], prefix.length if prefix else 0
        rows = compact(embeddings, mask)
        if batch == 0 or max_new_tokens < 1:
            return [[] for _ in range(batch)]
        if int(rows.lengths.min()) == 0:
            raise ValueError("every row needs at least one token to answer to")
        self._check_length(rows.embeddings.shape[1] + max_new_tokens, before)
        cache = growing(prefix, batch)
        hidden = self._decode(rows.embeddings, cache)
        last = hidden[torch.arange(batch, device=hidden.device), rows.lengths - 1]
        # A growing answer must follow its prompt without a gap, so now the padding goes to the left end.
        gaps = rows.embeddings.shape[1] - rows.lengths
        push_right(cache, gaps)
        return self._continue(cache, last, gaps, before + rows.lengths, max_new_tokens, {*banned, *self.banned_ids})

    def _continue(
        self, cache: Cache, last: Tensor, gaps: Tensor, positions: Tensor, max_new_tokens: int, banned: set[int]
    ) -> list[list[int]]:
        """The greedy loop; rows leave the batch as they end.

        `last` [batch, width] are the states that the first id is read from, `positions` [batch] its positions.
        """
        answers: list[list[int]] = [[] for _ in range(last.shape[0])]
        open_rows = torch.arange(last.shape[0], device=last.device)
        never = torch.tensor(sorted(banned), dtype=torch.int64, device=last.device)
        ends = torch.tensor(self.end_ids, dtype=torch.int64, device=last.device)
        for step in range(max_new_tokens):
            logits = self.logits(last).index_fill(1, never, -math.inf)
            ids = logits.argmax(1)
            going = (~torch.isin(ids, ends)).nonzero()[:, 0]
            if len(going) < len(ids):
                keep_rows(cache, going)
                open_rows, ids, gaps, positions = open_rows[going], ids[going], gaps[going], positions[going]
            for row, word in zip(open_rows.tolist(), ids.tolist(), strict=True):
                answers[row].append(word)
            if not len(ids) or step + 1 == max_new_tokens:
                break
            slots = torch.arange(cache.get_seq_length() + 1, device=last.device)
            shown = slots >= gaps[:, None]
            last = self._decode(self.embed(ids[:, None]), cache, shown, positions[:, None])[:, 0]
            positions = positions + 1
        return answers

    def _decode(
        self, embeddings: Tensor, cache: Cache | None, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """The decoder's last hidden states; without a mask every row is full and positions count on from the cache."""
        options: dict[str, Any] = {"position_ids": positions} if self._takes_positions else {}
        output = self.model.get_decoder()(
            inputs_embeds=embeddings, attention_mask=mask, past_key_values=cache, use_cache=cache is not None, **options
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _check_length(self, length: int, before: int) -> None:
        if self.context is not None and before + length > self.context:
            raise HymaError(
                f"A row of {before + length} tokens does not fit into the context of {self.card.id}, {self.context} "
                "tokens; shorten the texts or take fewer image tokens."
            )

    @torch.no_grad()
    def _embedding_rms(self) -> float:
        count = self.model.get_input_embeddings().weight.shape[0]
        device = self.model.get_input_embeddings().weight.device
        total = 0.0
        for start in range(0, count, _SLICE):
            ids = torch.arange(start, min(start + _SLICE, count), device=device)
            total += float(self.embed(ids).float().square().sum())
        return math.sqrt(total / (count * self.width))


def recompute_layers(card: ModelCard, model: PreTrainedModel) -> None:
    """Gradient checkpointing (arXiv 1604.06174) of every decoder layer, in eval mode and over a prefix.

    transformers' own switch works in training mode only, where dropout would run, and drops the cache. Here each layer
    is recomputed as it is, which is exact because the cache it reads stores nothing.

    Raises:
        HymaError: the architecture has no layers that transformers calls recomputable.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise HymaError(f"{card.id} has no layers that can be recomputed; load it without checkpointing.")
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end an answer: of the tokenizer, of the model's two configs, and the template's end of turn."""
    found: set[int] = set()
    for stated in (tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id):
        found.update([stated] if isinstance(stated, int) else stated or ())
    closing = _end_of_turn(tokenizer)
    if closing is not None:
        found.add(closing)
    return tuple(sorted(found))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token that the chat template puts behind an answer, None where there is none."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError:  # a template with other wishes; whoever builds the prompts will say so
        return None
    behind = tokenizer(text.rpartition("answer")[2], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    return next((int(word) for word in behind if word in special), None)

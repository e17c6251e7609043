"""The next-token loss on answers, per pair, without logits for anything else.

Notable: hidden states of supervised positions are gathered before the vocabulary product; that product runs over
chunks of the vocabulary's rows with an online log-sum-exp, so that no [tokens, vocabulary] tensor exists; backward
makes the chunks again from the vector of log-sum-exps; the head is frozen and gets no gradient; 16-bit factors are
multiplied as such and summed in float32; Liger's fused kernel takes over on a GPU where it is installed.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hyma_mllm.errors import HymaError
from hyma_mllm.objectives.tiled_infonce import accumulation_dtype

IGNORE = -100
"""The label of a token that is not learned; torch's `ignore_index`."""

CHUNK = 2048
"""On one CPU core (49,152 words, width 576, bfloat16) as fast as any smaller, 1.6 times as fast as a single chunk."""


class Head(Protocol):
    """A frozen output layer: logits = softcap(scale * (h @ weight^T + bias)), softcap(x) = cap * tanh(x / cap).

    Attributes:
        weight: [vocabulary, width], floating.
        bias: [vocabulary] or None.
        softcap: the cap, or None for none (Gemma 2, arXiv 2408.00118, section 2).
        scale: what some families multiply logits by; 1 for most.
    """

    @property
    def weight(self) -> Tensor:
        """See the class."""

    @property
    def bias(self) -> Tensor | None:
        """See the class."""

    @property
    def softcap(self) -> float | None:
        """See the class."""

    @property
    def scale(self) -> float:
        """See the class."""


@dataclass
class CausalConfig:
    """How the next-token loss is computed; its value does not depend on it.

    Attributes:
        vocabulary_chunk: words of the vocabulary whose logits are held at once; memory is 4 bytes x this x tokens.
        liger: use Liger's fused kernel on a GPU when the package liger-kernel is installed.

    Raises:
        HymaError: for a chunk that holds no word.
    """

    vocabulary_chunk: int = CHUNK
    liger: bool = True

    def __post_init__(self) -> None:
        if self.vocabulary_chunk < 1:
            raise HymaError(f"The vocabulary chunk {self.vocabulary_chunk} is not positive; write {CHUNK}, say.")


def _product(rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """`rows @ columns` accumulated and returned in `dtype`; on a GPU, where it pays, half factors stay half."""
    if rows.dtype == columns.dtype == dtype:
        return rows @ columns
    if rows.is_cuda and dtype == torch.float32 and columns.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(rows.to(columns.dtype), columns, out_dtype=dtype)
    return rows.to(dtype) @ columns.to(dtype)


@contextmanager
def _bfloat16_factors(wanted: bool) -> Iterator[None]:
    """Let a CPU take the factors of float32 products in bfloat16 and sum in float32, where it has units for that.

    torch multiplies bfloat16 into float32 on a GPU only; this is the way to the same on a CPU, three times as fast.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if wanted:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class _ChunkedLoss(torch.autograd.Function):
    """-log p(target) per row, see `token_losses`; `apply(hidden, weight, targets, bias, softcap, scale, chunk)`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        scale: float,
        chunk: int,
    ) -> Tensor:
        dtype = accumulation_dtype(hidden)
        ctx.softcap, ctx.scale, ctx.chunk = softcap, scale, chunk
        lse = hidden.new_full((len(hidden),), -torch.inf, dtype=dtype)
        narrow = hidden.dtype == weight.dtype == torch.bfloat16
        with torch.autocast(hidden.device.type, enabled=False), _bfloat16_factors(narrow):
            for start in range(0, len(weight), chunk):
                rows = slice(start, start + chunk)
                logits = _logits(hidden, weight[rows], None if bias is None else bias[rows], softcap, scale, dtype)
                lse = torch.logaddexp(lse, logits.logsumexp(1))
            positives = (hidden.to(dtype) * weight[targets].to(dtype)).sum(1)
            if bias is not None:
                positives += bias[targets].to(dtype)
            positives = _capped(positives.mul_(scale), softcap)
        ctx.save_for_backward(hidden, weight, targets, bias, lse)
        return lse - positives

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """(softmax - one hot) @ weight through scale and cap, chunk by chunk; nothing for the frozen head."""
        hidden, weight, targets, bias, lse = ctx.saved_tensors
        dtype = lse.dtype
        pulled = torch.zeros_like(hidden, dtype=dtype)
        share = (gradient.to(dtype) * ctx.scale)[:, None]
        narrow = hidden.dtype == weight.dtype == torch.bfloat16
        with torch.autocast(hidden.device.type, enabled=False), _bfloat16_factors(narrow):
            for start in range(0, len(weight), ctx.chunk):
                rows = slice(start, start + ctx.chunk)
                part = weight[rows]
                logits = _logits(hidden, part, None if bias is None else bias[rows], ctx.softcap, ctx.scale, dtype)
                slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square_()
                weights = logits.sub_(lse[:, None]).exp_()
                # One off at the target while still in float32: for a sure token the two nearly cancel.
                inside = (targets >= start) & (targets < start + len(part))
                place = (targets - start).clamp_(0, len(part) - 1)
                weights.scatter_add_(1, place[:, None], -inside[:, None].to(dtype))
                if slope is not None:
                    weights *= slope
                pulled += _product(weights.mul_(share), part, dtype)
        return pulled.to(hidden.dtype), *(None,) * 6


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    """In place."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float, dtype: torch.dtype
) -> Tensor:
    """[tokens, words of the chunk] in `dtype`."""
    logits = _product(hidden, weight.t(), dtype)
    if bias is not None:
        logits += bias.to(dtype)
    return _capped(logits if scale == 1 else logits.mul_(scale), softcap)


def token_losses(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int = CHUNK,
) -> Tensor:
    """-log p(target) of every token, `F.cross_entropy(logits, targets, reduction="none")` with no logits kept.

    Gradient flows to `hidden` only.

    Args:
        hidden: [tokens, width] last hidden states, floating.
        head_weight: [vocabulary, width], frozen.
        targets: [tokens] int64 in [0, vocabulary).
        bias: [vocabulary], frozen, or None.
        softcap: see `Head`.
        scale: see `Head`.
        chunk: words of the vocabulary whose logits are held at once.

    Returns:
        [tokens] float32 nats (float64 if `hidden` is).
    """
    losses: Tensor = _ChunkedLoss.apply(hidden, head_weight, targets, bias, softcap, scale, chunk)
    return losses


@functools.cache
def _liger() -> Callable[..., Any] | None:
    """Liger's fused linear cross-entropy (arXiv 2410.10989), a module class, where a GPU and the package are there."""
    if not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        return None
    kernel: Callable[..., Any] = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    return kernel


def _liger_means(kernel: Callable[..., Any], hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Mean loss of every pair by the fused kernel: hidden [pairs, tokens, width], targets [tokens] -> [pairs].

    A sum each: the kernel's gradients are made in its forward pass, and only a sum's can be scaled in the backward
    pass of every release.
    """
    fused = kernel(reduction="sum", softcap=head.softcap)
    bias = None if head.bias is None else head.bias * head.scale
    sums = [fused(head.weight, rows if head.scale == 1 else rows * head.scale, targets, bias) for rows in hidden]
    return torch.stack(sums).float() / len(targets)


def supervised(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the loss reads: the hidden state at position t predicts the label at t + 1.

    Args:
        labels: [batch, length] int64, IGNORE where nothing is learned.

    Returns:
        rows [tokens], positions [tokens] of the predicting hidden states, and targets [tokens], all int64.
    """
    rows, positions = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    return rows, positions, labels[rows, positions + 1]


class CausalObjective(nn.Module):
    """The next-token loss of every pair, mean over the batch's supervised tokens, which is transformers' convention."""

    def __init__(self, config: CausalConfig | None = None) -> None:
        super().__init__()
        self.config = config or CausalConfig()

    def forward(self, hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
        """The loss of every pair.

        Args:
            hidden: [pairs, batch, length, width] last hidden states, floating. The first label is predicted by what
                stands in front of it, so include at least the last image token, with the label IGNORE.
            labels: [batch, length] int64, the same for all pairs.
            head: of the LLM.

        Returns:
            [pairs] float32 nats a token (float64 if `hidden` is).

        Raises:
            HymaError: if nothing is supervised.
        """
        rows, positions, targets = supervised(labels)
        if not len(targets):
            raise HymaError(
                f"None of the {labels.numel()} labels of a batch of {len(labels)} rows is supervised; its answers are "
                "empty or were cut off."
            )
        picked = hidden[:, rows, positions]
        kernel = _liger() if self.config.liger and hidden.is_cuda else None
        if kernel is not None and picked.dtype == head.weight.dtype != torch.float64:
            return _liger_means(kernel, picked, targets, head)
        losses = token_losses(
            picked.flatten(0, 1),
            head.weight,
            targets.repeat(len(picked)),
            bias=head.bias,
            softcap=head.softcap,
            scale=head.scale,
            chunk=self.config.vocabulary_chunk,
        )
        return losses.view(len(picked), -1).mean(1)

"""What a search costs in time, from FLOPs, bytes moved, and rates of a machine.

time = FLOPs of products / rate of products + bytes moved by everything else / rate of memory + logits / rate of logits.
FLOPs come from `search.flops` and `search.causal_flops`; bytes are counted here, operation by operation. Rates are
measured on single operations, never on a search, so that a search may be compared with what they predict.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import torch
from torch.nn import functional

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.objectives.contrastive import info_nce
from hyma_mllm.planning.training import FLOAT
from hyma_mllm.zoo.llm_shape import LLMShape

SIDE = 1024
"""Rows and columns of the plain product that is timed."""

STACK = (4, 512, 768)
"""Pairs, samples and widths of the stacked layer that is timed."""

LOGITS = (2, 512, 32)
"""Pairs, samples and width of the loss that is timed; so narrow that its products hardly count."""

LAYERS = 4
"""An LLM's layers whose products are timed one after the other."""

STREAM = 64_000_000
"""Bytes of the tensors that are added to time memory: more than caches hold."""

UPDATE_PASSES = 10
"""Times that a trained weight's bytes move in place in a step: its gradient is read for the norm and scaled (3), AdamW
reads four and writes three."""

GRADIENT_PASSES = 4
"""Times that a trained weight's bytes move to make its gradient: read forward and backward, the gradient written into
new memory (2)."""

PREDICTED_PASSES = 14
"""Times that a predicted weight's bytes move: base copied (2), delta added (3), read by its product forward and for the
input's gradient (2), its gradient written (1), and added, split and gathered on the way back to head and base (6)."""

KEPT_PASSES = 5
"""Times that a kept activation's bytes move: written and read going forward; read again, and its gradient written and
read, going back."""

WIDTH_PASSES = 63
"""Times that a token's width moves through a layer of an LLM, forward and back: two RMS norms (14 and 28), two sums (6
and 6), and gradients that are added up where three and two products read one input (9)."""

INNER_PASSES = 14
"""The same of the MLP's inner width: SiLU and a product with the gate (5), and their gradients (9)."""

ROTARY_PASSES = 22
"""The same of queries and of keys: halves turned round, scaled by cosine and sine and summed (10), and back (12)."""

ATTENTION_PASSES = 16
"""The same of all heads: read and written by the fused kernel (4, and 8 back), and the result laid out again (2, 2)."""

REPEAT_PASSES = 4
"""The same of keys and values together with their copies for all heads (2, and 2 back)."""

BLOCK_PASSES = 30
"""Times that a token's width moves through a frozen block: two norms (4), attention with what goes in (8), two sums
(6), and the four widths of the MLP through GELU (12)."""


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        flops: floating point operations of plain products.
        stacked: the same of a stack of layers with their gradients, as connectors are trained.
        updates: bytes read or written by operations in place.
        bytes: read or written by operations whose result is new memory.
        logits: entries of InfoNCE's logits, forward and backward, without their products.
    """

    flops: float
    stacked: float
    updates: float
    bytes: float
    logits: float

    def best(self, other: "Rates") -> "Rates":
        """The better of two measurements of each: what else a machine did makes it slower for a while only."""
        return Rates(*(max(one, two) for one, two in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Work:
    """What a step does.

    Attributes:
        flops: of plain products.
        stacked: FLOPs of stacked layers and of InfoNCE's products.
        updates: bytes that move in place.
        bytes: that move otherwise.
        logits: of InfoNCE, all pairs.
    """

    flops: float = 0.0
    stacked: float = 0.0
    updates: float = 0.0
    bytes: float = 0.0
    logits: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """Time of all of it, one after the other."""
        return float(sum(amount / rate for amount, rate in zip(astuple(self), astuple(rates), strict=True)))


def measured_rates(device: torch.device | str = "cpu", rounds: int = 5) -> Rates:
    """The rates of this machine in float32, with the threads that torch has now.

    Args:
        device: what to measure.
        rounds: times each is taken; the best counts.
    """
    left, right = (torch.randn(SIDE, SIDE, device=device) for _ in range(2))
    first, second = (torch.randn(STREAM // FLOAT, device=device) for _ in range(2))
    plain = 2.0 * SIDE**3 / _best(lambda: left @ right, device, rounds)
    updates = 3.0 * STREAM / _best(lambda: torch.add(first, second, out=second), device, rounds)
    fresh = 3.0 * STREAM / _best(lambda: first + second, device, rounds)
    return Rates(plain, _stacked_rate(device, rounds), updates, fresh, _logit_rate(plain, device, rounds))


def frozen_rate(shape: LLMShape, rows: int, device: torch.device | str = "cpu", rounds: int = 5) -> float:
    """FLOPs a second of the products of an LLM's frozen layers in float32, forward and backward to their inputs.

    Args:
        shape: of the LLM; all products of a layer count, for narrow ones are slower.
        rows: tokens that pass together; few make slow products.
        device: what to measure.
        rounds: times it is taken; the best counts.
    """
    width, heads, keys, inner = shape.width, shape.heads_width, shape.kv_width, shape.inner
    fans = [
        (width, heads),
        (width, keys),
        (width, keys),
        (heads, width),
        (width, inner),
        (width, inner),
        (inner, width),
    ]
    inputs = {fan: torch.randn(rows, fan, device=device, requires_grad=True) for fan, _ in fans}
    pulls = {fan: torch.randn(rows, fan, device=device) for _, fan in fans}
    # More layers than one, so that their weights come from memory and not from a cache.
    weights = [torch.randn(fan_out, fan_in, device=device) for _ in range(LAYERS) for fan_in, fan_out in fans]

    def work() -> None:
        for weight in weights:
            fan_out, fan_in = weight.shape
            x = inputs[fan_in]
            torch.autograd.grad(functional.linear(x, weight), x, pulls[fan_out])

    return 4.0 * rows * sum(weight.numel() for weight in weights) / _best(work, device, rounds)


def _stacked_rate(device: torch.device | str, rounds: int) -> float:
    """FLOPs a second of one stacked layer, forward and backward to input and weight."""
    pairs, batch, width = STACK
    spec = ConnectorSpec(depth=0)
    x = torch.randn(pairs, batch, width, device=device, requires_grad=True)
    made = connectors.initial(spec, (width, width), pairs, torch.Generator().manual_seed(0))
    params = {name: value.to(device).requires_grad_() for name, value in made.items()}
    pull = torch.randn(pairs, batch, width, device=device)
    wanted = [x, *params.values()]

    def work() -> object:
        return torch.autograd.grad(connectors.apply(spec, params, x), wanted, pull)

    return 6.0 * pairs * batch * width**2 / _best(work, device, rounds)


def _logit_rate(flops: float, device: torch.device | str, rounds: int) -> float:
    """Logits a second of the tiled loss, its products' time taken off."""
    pairs, batch, width = LOGITS
    images, texts = (torch.randn(pairs, batch, width, device=device) / width**0.5 for _ in range(2))
    texts.requires_grad_()

    def work() -> object:
        return torch.autograd.grad(info_nce(images, texts, 30.0).sum(), texts)

    seconds, count = _best(work, device, rounds), pairs * batch**2
    return count / max(seconds - 6.0 * count * width / flops, seconds / 10)


def contrastive_work(
    spec: ConnectorSpec, shapes: Sequence[tuple[int, int]], batch: int, trained: int, products: tuple[float, float]
) -> Work:
    """One optimiser step of a hypernetwork that visits all pairs at once.

    Args:
        spec: the family of connectors.
        shapes: (d_in, d_out) of every pair that the step visits.
        batch: samples a pair.
        trained: weights of the hypernetwork.
        products: FLOPs of the task's loss, and of the hypernetwork.
    """
    weights = sum(spec.parameters(*shape) for shape in shapes)
    moved = GRADIENT_PASSES * trained + PREDICTED_PASSES * weights
    for d_in, d_out in shapes:
        hidden = sum(layer.fan_out for layer in spec.layers(d_in, d_out)[:-1])
        moved += KEPT_PASSES * batch * (d_in // 2 + 2 * hidden + 3 * d_out)
    task, own = products
    return Work(
        flops=own,
        stacked=task,
        updates=float(UPDATE_PASSES * trained * FLOAT),
        bytes=float(moved * FLOAT),
        logits=float(len(shapes) * batch**2),
    )


def causal_moved(shape: LLMShape, rows: int, length: int, before: int, element: int) -> float:
    """Bytes moved by forward and backward of some rows through a frozen Llama-like LLM, products left out.

    Operation by operation as eager torch runs them; the weights are read twice.

    Args:
        shape: of the LLM.
        rows: questions times pairs.
        length: tokens of a row behind the prefix.
        before: tokens of the prefix.
        element: bytes of an entry.
    """
    token = WIDTH_PASSES * shape.width + INNER_PASSES * shape.inner
    token += ROTARY_PASSES * (shape.heads_width + shape.kv_width) + ATTENTION_PASSES * shape.heads_width
    # Keys and values are written once for each group of heads that shares them, those of the prefix too.
    shared = REPEAT_PASSES * (shape.heads_width + shape.kv_width)
    entries = rows * (length * token + (length + before) * shared)
    return float(element * (shape.layers * entries + 2 * shape.parameters))


def transformer_moved(items: int, tokens: int, width: int, layers: int) -> float:
    """Bytes moved by a forward pass of a frozen vision transformer in float32, products left out.

    Args:
        items: pictures.
        tokens: of each, those that are dropped later included.
        width: of a token.
        layers: blocks.
    """
    return items * tokens * width * layers * BLOCK_PASSES * float(FLOAT)


def _best(work: Callable[[], object], device: torch.device | str, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):  # the first one warms up
        began = time.perf_counter()
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])

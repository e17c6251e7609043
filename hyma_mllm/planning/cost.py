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
from hyma_mllm.planning.training import FLOAT, layer_activations
from hyma_mllm.zoo.llm_shape import LLMShape

SIDE = 1024
"""Rows and columns of the plain product that is timed."""

STACK = (4, 512, 768)
"""Pairs, samples and widths of the stacked layer that is timed."""

LOGITS = (2, 512, 32)
"""Pairs, samples and width of the loss that is timed; so narrow that its products hardly count."""

LAYERS = 12
"""Frozen layers that are timed one after the other."""

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


def frozen_rate(rows: int, fan_in: int, fan_out: int, device: torch.device | str = "cpu", rounds: int = 5) -> float:
    """FLOPs a second of a frozen layer in float32, forward and backward to its input, as an LLM is passed.

    Args:
        rows: that pass together; few rows make a slow product.
        fan_in: width of the layer's input.
        fan_out: width of its output.
        device: what to measure.
        rounds: times it is taken; the best counts.
    """
    x = torch.randn(rows, fan_in, device=device, requires_grad=True)
    # More layers than one, so that their weights come from memory and not from a cache.
    layers = [torch.randn(fan_out, fan_in, device=device) for _ in range(LAYERS)]
    pull = torch.randn(rows, fan_out, device=device)

    def work() -> object:
        return [torch.autograd.grad(functional.linear(x, weight), x, pull) for weight in layers]

    return LAYERS * 4.0 * rows * fan_in * fan_out / _best(work, device, rounds)


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
    """Bytes moved within the LLM by forward and backward of some rows, products left out; its weights are read twice.

    Args:
        shape: of the LLM.
        rows: questions times pairs.
        length: tokens of a row behind the prefix.
        before: tokens of the prefix.
        element: bytes of an entry.
    """
    kept = layer_activations(shape, rows * length, before / max(length, 1), element, element) * shape.layers
    return KEPT_PASSES * kept + 2 * shape.parameters * element


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

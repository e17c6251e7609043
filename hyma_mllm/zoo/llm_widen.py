"""LLMs whose weights stay in 16 bits and are widened layer by layer where they are used.

Half the memory of float32 weights. Exact for an LLM that was published in 16 bits: widening rounds nothing, and all
products are taken in the dtype of what comes in. For processors that multiply 16-bit numbers slowly.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

_SLICE = 8192  # rows of a weight that are widened at once: a vocabulary is never wide as a whole


class _Widened(torch.autograd.Function):
    """`x @ weight^T` in the dtype of x, with a narrower frozen weight; backward widens it again and keeps no copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        parts = [F.linear(x, part.to(x.dtype)) for part in torch.split(weight, _SLICE)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        parts = zip(torch.split(gradient, _SLICE, -1), torch.split(weight, _SLICE), strict=True)
        first, *rest = (grad @ part.to(grad.dtype) for grad, part in parts)
        return sum(rest, first), None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight^T + bias`, computed and returned in the wider dtype of the two.

    Args:
        x: [..., in], floating.
        weight: [out, in], frozen.
        bias: [out] or None, frozen.
    """
    if weight.dtype.itemsize >= x.dtype.itemsize:
        return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
    product: Tensor = _Widened.apply(x, weight)
    return product if bias is None else product + bias.to(x.dtype)


def narrow(model: PreTrainedModel) -> PreTrainedModel:
    """Keep the weights of linear layers and embeddings in bfloat16, and compute in what they had; in place.

    Loading the other way round would take a family's own constants, a scale of embeddings for one, for 16 bits.

    Args:
        model: loaded in the dtype that it shall compute in, frozen.
    """
    dtype = model.get_input_embeddings().weight.dtype
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(_linear_layer, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.Embedding):
            module.padding_idx = None  # only a gradient asks for it, and it would bind the number of rows
            module.forward = partial(_embedding_layer, module, module.forward, dtype)  # type: ignore[method-assign]
        else:
            continue
        module.weight.data = module.weight.data.to(torch.bfloat16)
    return model


def _linear_layer(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _embedding_layer(layer: nn.Embedding, forward: Any, dtype: torch.dtype, ids: Tensor) -> Tensor:
    """The rows that are asked for, wide, through the layer's own forward: some families scale what they look up."""
    wanted, places = torch.unique(ids, return_inverse=True)
    kept = layer._parameters["weight"]
    assert kept is not None
    try:
        layer._parameters["weight"] = nn.Parameter(kept[wanted].to(dtype), requires_grad=False)
        found: Tensor = forward(places)
    finally:
        layer._parameters["weight"] = kept
    return found

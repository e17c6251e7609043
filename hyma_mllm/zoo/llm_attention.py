"""Attention in float32 inside a 16-bit LLM on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_float32"


def widen_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Compute attention in float32, all else as before; models with another attention than torch's stay as they are.

    torch's fused attention takes one small 16-bit product after the other on a CPU: its backward alone is slower than
    everything else in the layer, and three times slower than in float32.
    """
    if model.config.get_text_config()._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, _float32_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
    return model


def _float32_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own; a mask of additions follows, a mask of booleans stays."""
    mask = attention_mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    out, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)
    return out.to(query.dtype), weights

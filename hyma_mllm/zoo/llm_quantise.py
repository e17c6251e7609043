"""LLMs in 8 or 4 bits by bitsandbytes, with the trap closed that falsifies gradients on some CPUs."""

import importlib.util
import logging
from typing import Literal

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from hyma_mllm.errors import HymaError


def quantisation_config(kind: Literal["int8", "nf4"], dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers needs to quantise while loading.

    int8 is LLM.int8() (arXiv 2208.07339, section 3), nf4 the 4-bit NormalFloat of QLoRA (arXiv 2305.14314, section 3).

    Raises:
        HymaError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise HymaError(f"{kind} needs bitsandbytes, which is not installed; run `pip install 'hyma_mllm[quant]'`.")
    if kind == "int8":
        # It says at every matrix product of every layer that it computes in float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def close_repacking(model: PreTrainedModel) -> PreTrainedModel:
    """Keep the weights of 4-bit layers as they are; call right after loading, before any forward pass.

    On CPUs with AVX512-BF16, bitsandbytes re-packs a layer's weight at the first forward pass without gradient, for
    good. Later backward passes read the new order as the old one and give wrong gradients without a word.
    """
    from bitsandbytes.nn.modules import Linear4bit  # an optional package

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model

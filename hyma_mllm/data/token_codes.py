"""Vision tokens as they are stored: plain numbers, or bytes with a scale for every block of channels.

`int8` keeps round(127 x / s) and `fp8` keeps 448 x / s in torch's float8_e4m3fn, s being the largest magnitude of a
block of `BLOCK` neighbouring channels of one token. One scale for a whole token would let the few channels that towers
blow up (DINOv2 has some) take the digits of all others; so they take those of their own block only. A row of a store
is one picture: the codes of all its tokens, then all scales as little-endian float32.

The largest error of a value is s / 254 in int8. In fp8 it is 1/16 of the value, which is s / 28 for the largest and
less for small ones.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from hyma_mllm.data.manifest import STORED_DTYPES

TokenDtype = Literal["fp32", "fp16", "bf16", "fp8", "int8"]

BLOCK = 64
"""Channels that share a scale, which costs 4 bytes: 1/16 of a byte for each channel."""

LARGEST = {"int8": 127.0, "fp8": 448.0}
"""The largest code of each coded form."""


def row_entries(form: TokenDtype, tokens: int, width: int) -> int:
    """Entries of one stored row, each of `STORED_DTYPES[form]`."""
    return tokens * (width + 4 * _blocks(width)) if form in LARGEST else tokens * width


def row_bytes(form: TokenDtype, tokens: int, width: int) -> int:
    """Bytes of one picture's tokens."""
    return row_entries(form, tokens, width) * STORED_DTYPES[form].itemsize


def encode(tokens: Tensor, form: TokenDtype) -> Tensor:
    """Tokens as rows of a store.

    Args:
        tokens: [pictures, tokens, width] floating, finite.
        form: what to store them as.

    Returns:
        [pictures, `row_entries`] of `STORED_DTYPES[form]`, on the device of the tokens. A value beyond the range of
        `fp16` becomes infinite there; the coded forms hold any.
    """
    if form not in LARGEST:
        return tokens.flatten(1).to(STORED_DTYPES[form])
    blocks = _in_blocks(tokens.float())
    scales = blocks.abs().amax(-1, keepdim=True)
    shares = blocks / torch.where(scales > 0, scales, 1.0) * LARGEST[form]
    codes = shares.round().to(torch.int8) if form == "int8" else shares.to(torch.float8_e4m3fn)
    flat = codes.view(torch.uint8).flatten(-2)[..., : tokens.shape[-1]].flatten(1)
    return torch.cat([flat, scales[..., 0].flatten(1).contiguous().view(torch.uint8)], 1)


def decode(rows: Tensor, form: TokenDtype, tokens: int, width: int) -> Tensor:
    """Rows of a store as tokens; the inverse of `encode` up to the rounding of the form.

    Args:
        rows: [pictures, `row_entries`] of `STORED_DTYPES[form]`.
        form: what they are stored as.
        tokens: of one picture.
        width: of a token.

    Returns:
        [pictures, tokens, width] float32.
    """
    if form not in LARGEST:
        return rows.float().view(len(rows), tokens, width)
    blocks = _blocks(width)
    codes, scales = torch.split(rows, [tokens * width, 4 * tokens * blocks], dim=1)
    values = codes.contiguous().view(torch.int8 if form == "int8" else torch.float8_e4m3fn).float()
    # A slice may lie where no float32 may begin, so the scales are copied.
    factors = scales.clone(memory_format=torch.contiguous_format).view(torch.float32) / LARGEST[form]
    shaped = _in_blocks(values.view(len(rows), tokens, width)) * factors.view(len(rows), tokens, blocks, 1)
    return shaped.flatten(-2)[..., :width]


def as_features(tokens: Tensor, form: TokenDtype) -> Tensor:
    """Tokens as what `embedding.embed` stores under this form, which casts float32 rows to the stored dtype.

    Args:
        tokens: [pictures, tokens, width] floating.
        form: what to store them as.

    Returns:
        [pictures, `row_entries`] float32: the values themselves, or the bytes of their codes. A picture with a value
        that is not finite has no code; its row is not a number, by which the store refuses it and names its key.
    """
    if form not in LARGEST:
        return tokens.flatten(1).float()
    finite = torch.isfinite(tokens).flatten(1).all(1)
    rows = encode(torch.where(finite[:, None, None], tokens, 0.0), form).float()
    return torch.where(finite[:, None], rows, torch.nan)


def _blocks(width: int) -> int:
    return -(-width // BLOCK)


def _in_blocks(values: Tensor) -> Tensor:
    """[..., width] as [..., blocks, BLOCK], filled up with zeros."""
    width = values.shape[-1]
    filled = functional.pad(values, (0, _blocks(width) * BLOCK - width))
    return filled.view(*values.shape[:-1], _blocks(width), BLOCK)

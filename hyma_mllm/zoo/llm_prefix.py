"""Keys and values of a beginning that all rows share, and rows laid out so that they need no mask."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


@dataclass(frozen=True)
class Prefix:
    """What each layer of one LLM keeps of a shared beginning; reading it never changes it.

    Attributes:
        keys, values: one tensor [1, heads, length, head width] for each layer, without gradient.
        length: tokens.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    length: int

    def read_only(self) -> Cache:
        """A cache that shows the prefix in front of whatever a layer adds, and stores nothing.

        So one forward may run over it twice (gradient checkpointing does) and the next batch finds it as it was.
        """
        return Cache(layers=[_ReadOnlyLayer(key, value) for key, value in zip(self.keys, self.values, strict=True)])


class _ReadOnlyLayer(DynamicLayer):  # type: ignore[misc]
    """A layer's share of the prefix. Layers with a sliding window keep all of it: their mask does the windowing."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Prefix and new states together, [batch, heads, length + new, head width]; gradient flows to the new ones."""
        batch = key_states.shape[0]
        keys = torch.cat([self.keys.expand(batch, -1, -1, -1), key_states], dim=-2)
        return keys, torch.cat([self.values.expand(batch, -1, -1, -1), value_states], dim=-2)


def growing(prefix: Prefix | None, batch: int) -> Cache:
    """A cache for generation: the prefix once for each row, and all that is added later.

    No layer forgets what lies outside its sliding window: the mask hides it, and prompt and answer are short.
    """
    if prefix is None:
        return Cache(layer_class_to_replicate=DynamicLayer)
    layers = []
    for keys, values in zip(prefix.keys, prefix.values, strict=True):
        layer = DynamicLayer()
        layer.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1))
        layers.append(layer)
    return Cache(layers=layers)


@dataclass(frozen=True)
class Compact:
    """Rows moved to the left end, so that only right padding is left.

    A causal model never looks to the right: real tokens need no mask, positions count up by one from the prefix, and
    the distance in the sequence is the distance in positions, which sliding windows rely on.

    Attributes:
        embeddings: [batch, longest, width].
        order: [batch, longest] int64, where each slot was in the original row.
        lengths: [batch] int64, real tokens.
    """

    embeddings: Tensor
    order: Tensor
    lengths: Tensor

    def restore(self, hidden: Tensor, length: int) -> Tensor:
        """Hidden states [batch, longest, width] at their original places [batch, length, width]; padding is zero."""
        real = torch.arange(self.order.shape[1], device=hidden.device) < self.lengths[:, None]
        zeros = hidden.new_zeros(hidden.shape[0], length, hidden.shape[2])
        index = self.order[..., None].expand(-1, -1, hidden.shape[2])
        return zeros.scatter(1, index, torch.where(real[..., None], hidden, 0))


def compact(embeddings: Tensor, mask: Tensor) -> Compact:
    """Move the real tokens of every row to its left end, in order.

    Args:
        embeddings: [batch, length, width].
        mask: [batch, length], True or 1 for a real token.
    """
    if mask.shape != embeddings.shape[:2]:
        raise ValueError(f"a mask {tuple(mask.shape)} for embeddings {tuple(embeddings.shape)}")
    mask = mask.to(device=embeddings.device, dtype=torch.bool)
    lengths = mask.sum(1)
    longest = int(lengths.max()) if lengths.numel() else 0
    order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)[:, :longest]
    moved = embeddings.gather(1, order[..., None].expand(-1, -1, embeddings.shape[2]))
    return Compact(moved, order, lengths)


def push_right(cache: Cache, gaps: Tensor) -> None:
    """Roll every row of a growing cache by its number of padding slots, so that padding stands at the left end.

    Args:
        cache: right-padded rows; changed in place.
        gaps: [batch] int64, padding slots at the right end of each row.
    """
    for layer in cache.layers:
        length = layer.keys.shape[-2]
        index = (torch.arange(length, device=gaps.device) - gaps[:, None]) % length
        index = index[:, None, :, None].to(layer.keys.device)
        layer.keys = layer.keys.gather(2, index.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
        layer.values = layer.values.gather(2, index.expand(-1, layer.values.shape[1], -1, layer.values.shape[3]))


def keep_rows(cache: Cache, rows: Tensor) -> None:
    """Drop all rows of a growing cache but these ([kept] int64); changed in place."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[rows], layer.values[rows]

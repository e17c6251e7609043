"""Vision towers of the MLLM case: an image encoder read as tokens, the way the exported model will read them.

Names are those of image encoders with `:112px` (a smaller input), `:pool2` (mean over 2 x 2 tokens) or `:shuffle2`
(2 x 2 tokens side by side) behind the blocks: `dinov2-small@11:56px`, `efficientnet-lite0:128px`, `hf:/dir@-2#2`.

- A transformer is read at `hidden_states[-2]`, before the final norm, without its class token (LLaVA, Liu et al. 2023,
  section 4.1, and its `vision_feature_select_strategy` "default"); registers stay. A tower without a class token
  (SigLIP) is read whole at its last block ("full").
- A plain timm ViT is converted to transformers' ViTModel, which is exact.
- A convolutional network is read at its last grid, as FastVLM does (Vasu et al. 2024, section 3).
- A smaller side interpolates the position embeddings (`positions.py`), so the exported model stays a vanilla one;
  pooled, shuffled, inner-stage and other tokens need this package's own class (`form` "own").
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel

from hyma_mllm.errors import HymaError
from hyma_mllm.zoo.backbones import Backbone, TimmBackbone, Tower, TransformersBackbone
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.packaged_vision import PACKAGED, packaged_card
from hyma_mllm.zoo.positions import at_side, refuse_uneven
from hyma_mllm.zoo.timm_to_hf import is_plain_vit, to_hf_vit
from hyma_mllm.zoo.towers import processed
from hyma_mllm.zoo.vision import image_card, image_on_disk, open_network
from hyma_mllm.zoo.vision_names import Reduction, TowerName, parse_tower_name

DEFAULT_TOWER_IDS: tuple[str, ...] = ("efficientnet-lite0:128px", "mobilenetv2:128px", "dinov2-small@8:56px")


@dataclass(frozen=True)
class LlavaReading:
    """How an exported directory reads the same tokens.

    Attributes:
        form: `llava` (LlavaForConditionalGeneration), `fastvlm` (FastVlmForConditionalGeneration over a timm network),
            or `own` (this package's class).
        layers: `vision_feature_layer`; more than one are concatenated along the width. For `own` the backbone's block
            numbers, 0 its output.
        strategy: `vision_feature_select_strategy`: `default` drops the class token, `full` drops nothing.
        side: input side in pixels.
        patch: pixels along one token, for the processor: (side // patch)^2 is the number of grid tokens.
        extra_tokens: `num_additional_image_tokens` of the processor: class token and registers.
    """

    form: Literal["llava", "fastvlm", "own"]
    layers: tuple[int, ...]
    strategy: Literal["default", "full"]
    side: int
    patch: int
    extra_tokens: int


class VisionTower(nn.Module):
    """A frozen image encoder that gives tokens: eval mode, no gradient.

    Attributes:
        card: its card; `tokens`, `width` and `resolution` are those of `tokens`.
        network: the frozen backbone, at the tower's side.
        processor: the transformers image processor that makes the pixels.
        preprocess: an RGB picture to pixels [3, side, side] float32, by `processor`; light to send to a worker.
        llava: how an exported directory reads the same tokens.
    """

    def __init__(
        self, card: ModelCard, network: nn.Module, reading: LlavaReading, processor: BaseImageProcessor
    ) -> None:
        super().__init__()
        self.card, self.network, self.llava, self.processor = card, network, reading, processor
        self.preprocess: Callable[[Image.Image], Tensor] = partial(processed, processor)
        self._layout = torch.channels_last if _backbone(network).convolutional else torch.contiguous_format
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "VisionTower":
        """Stays in eval mode, whatever the model around it does."""
        return super().train(False)

    def tokens(self, pixels: Tensor) -> Tensor:
        """Tokens [batch, tokens, width] of pixels [batch, 3, side, side], in the tower's dtype."""
        like = next(self.network.parameters())
        moved = pixels.to(device=like.device, dtype=like.dtype, memory_format=self._layout)
        return read_tokens(self.network, moved, self.llava, self.card.id)


def tower_card(name: str) -> ModelCard:
    """The card of a vision tower; no weights are downloaded, read or made for it (local ones are hashed).

    Raises:
        HymaError: an unknown name or block, a checkpoint that cannot be read, a side that the network cannot take, or
            a grid that cannot be pooled as asked.
    """
    parsed = parse_tower_name(name)
    if parsed.base in PACKAGED:
        tokens, width, side = _packaged_shape(name, parsed)
        return replace(packaged_card(parsed.base), id=name, tokens=tokens, width=width, resolution=side)
    card = image_card(parsed.base)
    side = parsed.side or card.resolution or 0
    tokens, width = _shape(name, side, card.revision)
    return replace(card, id=name, tokens=tokens, width=width, resolution=side)


@lru_cache(maxsize=256)
def _shape(name: str, side: int, revision: str) -> tuple[int, int]:
    """Tokens and width of a tower; found once in a process, for a configuration asks for its cards again and again.

    Args:
        name: of the tower.
        side: of its pictures.
        revision: of its files, so that others behind the same name are looked at again.

    Raises:
        HymaError: as `tower_card`.
    """
    parsed = parse_tower_name(name)
    tower = open_network(parsed.base, weights=False)
    tower.processor(side)  # refuses pictures that no processor makes, before any weights are fetched
    network = _at_side(tower, name, side)
    found = read_tokens(network, _blank(network, side), _reading(network, name, parsed, side), name)
    return found.shape[1], found.shape[2]


def load_tower(
    name: str | ModelCard, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> VisionTower:
    """Open a vision tower, frozen.

    Args:
        name: its name, or its card.
        device: where it runs.
        dtype: float32, bfloat16 or float16.

    Raises:
        HymaError: as `tower_card`, or weights that cannot be had or are no longer those of the card.
    """
    card = tower_card(name if isinstance(name, str) else name.id)
    if isinstance(name, ModelCard) and name.revision != card.revision:
        raise HymaError(
            f"The weights of {card.id} are at revision {card.revision[:12]} and no longer at {name.revision[:12]}; "
            "compute the tokens again with the new ones, or put the old ones back."
        )
    parsed = parse_tower_name(card.id)
    tower = open_network(parsed.base)
    side = card.resolution or 0
    network = _at_side(tower, card.id, side)
    reading = _reading(network, card.id, parsed, side)
    # Batch norms are not folded, as in a pooled encoder: an exported tower is not either, and rounding would differ.
    layout = torch.channels_last if _backbone(network).convolutional else torch.contiguous_format
    # Module.to puts the memory format on four-dimensional weights only.
    network.to(device=device, dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
    return VisionTower(card, network, reading, tower.processor(side))


def image_processor(name: str | ModelCard | VisionTower) -> BaseImageProcessor:
    """The transformers image processor of a tower: its pixels are those of `VisionTower.preprocess`.

    Raises:
        HymaError: as `load_tower`.
    """
    return name.processor if isinstance(name, VisionTower) else load_tower(name).processor


def transformers_tower(name: str | ModelCard) -> PreTrainedModel:
    """The tower as the transformers model that goes into an exported directory, float32 on the CPU.

    A ViT, CLIP, SigLIP or DINOv2 model with `config.image_size` = the tower's side and its position table resized to
    it, or, for the form `fastvlm`, a TimmWrapperModel without pooling whose `config.hidden_size` is the tower's width.

    Raises:
        HymaError: as `load_tower`, or a tower of the form `own`.
    """
    card = tower_card(name) if isinstance(name, str) else name
    parsed = parse_tower_name(card.id)
    side = card.resolution or 0
    network = _at_side(open_network(parsed.base), card.id, side)
    reading = _reading(network, card.id, parsed, side)
    if reading.form == "own":
        raise HymaError(
            f"{card.id} gives tokens that no class of transformers reads; export it with this package's own class, or "
            "choose a tower without pooling and inner stages."
        )
    if isinstance(network, TransformersBackbone):
        model: PreTrainedModel = network.model
        return model
    return _wrapped(network, card)  # type: ignore[arg-type]  # the form fastvlm is a TimmBackbone


def tower_on_disk(card: ModelCard) -> bool:
    """Whether the tower opens without a download."""
    return image_on_disk(replace(card, id=parse_tower_name(card.id).base))


@torch.no_grad()
def read_tokens(network: nn.Module, pixels: Tensor, reading: LlavaReading, name: str) -> Tensor:
    """Tokens [batch, tokens, width] of pixels [batch, 3, side, side], in the dtype of both.

    Args:
        network: a backbone at the tower's side.
        pixels: of the tower's image processor.
        reading: of the tower.
        name: of the tower; says how tokens are made fewer.
    """
    parsed = parse_tower_name(name)
    return pool_grid(_grid(network, pixels, reading), parsed.reduction, parsed.factor)


def pool_grid(tokens: Tensor, reduction: Reduction, factor: int) -> Tensor:
    """Fewer tokens: [batch, grid^2, width] -> [batch, (grid / factor)^2, width, or width * factor^2 when shuffled].

    Args:
        tokens: a square grid, rows from top to bottom, any floating dtype.
        reduction: `pool` is the mean over squares; `shuffle` puts the tokens of a square side by side (the pixel
            shuffle of InternVL 1.5, Chen et al. 2024, section 3.1): entry `channel * factor^2 + row * factor + column`;
            `none` leaves them.
        factor: side of a square, in tokens.

    Raises:
        HymaError: the tokens are no square grid, or the factor does not divide its side.
    """
    if reduction == "none":
        return tokens
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1] or side % factor:
        raise HymaError(
            f"A grid of {tokens.shape[1]} tokens cannot go through {reduction}{factor}; choose a side in pixels whose "
            f"grid is a multiple of {factor}, or another factor."
        )
    grid = tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)
    small = F.avg_pool2d(grid, factor) if reduction == "pool" else F.pixel_unshuffle(grid, factor)
    return small.flatten(2).transpose(1, 2)


def _wrapped(network: TimmBackbone, card: ModelCard) -> PreTrainedModel:
    from transformers import TimmWrapperConfig, TimmWrapperModel

    config = TimmWrapperConfig(
        architecture=network.architecture,
        model_args=network.arguments or None,
        do_pooling=False,
        hidden_size=card.width,
        num_labels=0,
    )
    wrapper = TimmWrapperModel(config)
    inner: Any = wrapper.timm_model
    wanted = inner.state_dict().keys()
    inner.load_state_dict({key: value for key, value in network.model.state_dict().items() if key in wanted})
    return wrapper.eval()


def _backbone(network: nn.Module) -> Backbone:
    return network  # type: ignore[return-value]


def _at_side(tower: Tower, name: str, side: int) -> nn.Module:
    """The tower's network for inputs of this side, a plain timm ViT as transformers' one."""
    network = tower.network
    if isinstance(network, TimmBackbone) and is_plain_vit(network.model):
        vit = to_hf_vit(network.model)
        network = TransformersBackbone(vit, vit.config.patch_size)
    if isinstance(network, TransformersBackbone):
        network = TransformersBackbone(at_side(network.model, side, network.patch_size, name), network.patch_size)
    elif isinstance(network, TimmBackbone) and hasattr(network.model, "set_input_size"):
        refuse_uneven(name, side, max(network.model.patch_embed.patch_size))
        network.model.set_input_size(img_size=(side, side))
    return network.eval()


def _reading(network: nn.Module, name: str, parsed: TowerName, side: int) -> LlavaReading:
    """How the tokens of this network are read; one empty picture goes through it to find its grid."""
    depth = _backbone(network).depth
    if isinstance(network, TransformersBackbone):
        prefix = _prefix(network, side)
        layers = parsed.blocks or ((-2,) if prefix else (-1,))
        _refuse_unknown_block(name, layers, depth)
        form: Literal["llava", "own"] = "llava" if parsed.reduction == "none" else "own"
        patch = network.patch_size * parsed.factor
        return LlavaReading(form, layers, "default" if prefix else "full", side, patch, prefix)
    _refuse_unknown_block(name, parsed.blocks, depth)
    transformer = isinstance(network, TimmBackbone) and network.transformer
    default = (depth - 1,) if transformer else (0,)
    blocks = tuple(depth + 1 + block if block < 0 else block for block in parsed.blocks) or default
    plain = isinstance(network, TimmBackbone) and network.convolutional and blocks == (0,) and _channels_first(network)
    reading = LlavaReading("own", blocks, "full", side, 1, 0)
    grid = _root(name, read_tokens(network, _blank(network, side), reading, name).shape[1])
    patch = side // grid
    if plain and parsed.reduction == "none" and side // patch == grid:
        return LlavaReading("fastvlm", (-1,), "full", side, patch, 0)
    return replace(reading, patch=patch)


def _channels_first(network: TimmBackbone) -> bool:
    return not str(getattr(network.model, "output_fmt", "NCHW")).endswith("NHWC")


@torch.no_grad()
def _prefix(network: TransformersBackbone, side: int) -> int:
    """Class and register tokens in front of the grid."""
    state = network.model(pixel_values=_blank(network, side), output_hidden_states=True).hidden_states[0]
    return int(state.shape[1]) - (side // network.patch_size) ** 2


def _blank(network: nn.Module, side: int) -> Tensor:
    like = next(network.parameters())
    return torch.zeros(1, 3, side, side, device=like.device, dtype=like.dtype)


def _grid(network: nn.Module, pixels: Tensor, reading: LlavaReading) -> Tensor:
    """Tokens [batch, tokens, width] before any reduction, blocks concatenated along the width.

    A vanilla model has the registers in front; tokens that are to be pooled are the bare grid.
    """
    if isinstance(network, TransformersBackbone):
        states = network.model(pixel_values=pixels, output_hidden_states=True).hidden_states
        vanilla = 1 if reading.strategy == "default" else 0
        first = reading.extra_tokens if reading.form == "own" else vanilla
        return torch.cat([states[layer][:, first:] for layer in reading.layers], dim=2)
    # The form `fastvlm` says -1 where a backbone says 0: its output.
    blocks = [max(layer, 0) for layer in reading.layers]
    readings = _backbone(network).read(pixels, sorted(set(blocks)))
    grids = [readings[block].tokens for block in blocks]
    if len({grid.shape[1] for grid in grids}) > 1:
        raise HymaError(
            f"Stages {' and '.join(map(str, blocks))} have grids of different sizes, so they cannot be joined into "
            "tokens; name one stage."
        )
    return torch.cat(grids, dim=2)


def _packaged_shape(name: str, parsed: TowerName) -> tuple[int, int, int]:
    """(tokens, width, side) of a packaged tower, by arithmetic: its weights need not be there."""
    packaged = PACKAGED[parsed.base]
    native = packaged.card.resolution or 0
    side, depth = parsed.side or native, len(packaged.block_widths)
    _refuse_unknown_block(name, parsed.blocks, depth)
    blocks = tuple(depth + 1 + block if block < 0 else block for block in parsed.blocks)
    if packaged.patch:
        refuse_uneven(name, side, packaged.patch)
        grid, width = side // packaged.patch, sum(packaged.block_widths[block - 1] for block in blocks or (depth,))
    elif not depth:
        if side != native:
            raise HymaError(f"{parsed.base} is read at {native} px only, not at {side} px; leave the side out.")
        grid, width = _root(name, packaged.card.tokens or 0), packaged.card.width
    else:
        if len(blocks) > 1:
            raise HymaError(f"{name} joins stages with grids of different sizes; name one stage.")
        # "SAME" padding rounds every stride up.
        grid = -(-side // (2 ** blocks[0] if blocks else 32))
        width = packaged.block_widths[blocks[0] - 1] if blocks else packaged.card.width
    shape = pool_grid(torch.empty(1, grid * grid, width, device="meta"), parsed.reduction, parsed.factor).shape
    return shape[1], shape[2], side


def _refuse_unknown_block(name: str, blocks: tuple[int, ...], depth: int) -> None:
    for block in blocks:
        if not 1 <= abs(block) <= depth:
            known = f"blocks 1 to {depth} (or -1 to -{depth})" if depth else "no blocks to read, only its output"
            raise HymaError(f"{name} has {known}; {block} is not one of them.")


def _root(name: str, tokens: int) -> int:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise HymaError(f"{name} gives {tokens} tokens, which are no square grid; name another tower.")
    return side

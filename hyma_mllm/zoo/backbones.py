"""Backbones: one way to read a timm, transformers or torchvision network at any of its blocks.

`read(pixels, blocks)` runs the network once and returns, for each block number, a pooled vector and a grid of tokens.
Block 0 is the network's own output; 1 is its first block (transformer) or stage (convolutional network). What "pooled"
and "tokens" mean:

- transformer, block 0: the network's pooled output (the class token after the final norm, or its attention pool);
- transformer, block n: the class token of block n (the mean patch without one) after the final norm, as DINOv2's linear
  evaluation reads it (Oquab et al. 2023, section 7.1);
- convolutional network: the mean over the grid, after the head convolution for block 0;
- tokens: the grid without class and register tokens. Transformers models give `hidden_states[n]`, block 0 the last of
  them: what a LLaVA model's `vision_feature_layer` reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Reading:
    """What one block gives.

    Attributes:
        pooled: [batch, width].
        tokens: [batch, tokens, width], rows of the grid from top to bottom.
    """

    pooled: Tensor
    tokens: Tensor


class Backbone(Protocol):
    """A frozen network that can be read at its blocks.

    Attributes:
        depth: number of the last block.
        convolutional: True when channels-last memory makes it faster.
    """

    depth: int
    convolutional: bool

    def read(self, pixels: Tensor, blocks: Sequence[int]) -> dict[int, Reading]:
        """Readings by block number, from one forward pass over [batch, 3, height, width]."""
        ...


@dataclass(frozen=True)
class Tower:
    """A network and the transform that belongs to it.

    Attributes:
        network: the frozen module, which is a `Backbone`.
        transform: RGB picture -> [3, height, width] float32.
        parameters: number of parameters, before any folding.
        processor: side in pixels -> the transformers image processor that does what `transform` does, at that side.
    """

    network: nn.Module
    transform: Transform
    parameters: int
    processor: Callable[[int], "BaseImageProcessor"]

    @property
    def backbone(self) -> Backbone:
        """The network as what it can do."""
        return self.network  # type: ignore[return-value]


class TimmBackbone(nn.Module):
    """A timm model, convolutional or transformer.

    Attributes:
        architecture: timm's name of it, without a tag.
        arguments: what `timm.create_model` took beside the name.
    """

    def __init__(self, model: nn.Module, architecture: str, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.architecture, self.arguments = architecture, arguments
        self.model: Any = model
        self.convolutional = not hasattr(model, "patch_embed")
        self.transformer = hasattr(model, "num_prefix_tokens") and hasattr(model, "blocks")
        self.depth = len(model.blocks) if self.transformer else len(model.feature_info)  # type: ignore[arg-type]

    def read(self, pixels: Tensor, blocks: Sequence[int]) -> dict[int, Reading]:
        """Readings by block number; see the module's docstring."""
        inner = sorted({block for block in blocks if block and not self._is_output(block)})
        readings: dict[int, Reading] = {}
        if not inner:
            features = self.model.forward_features(pixels)
        elif len(inner) < len(set(blocks)):
            features, found = self._intermediates(pixels, inner, only=False)
            readings |= found
        else:
            return self._intermediates(pixels, inner, only=True)[1]
        output = Reading(self.model.forward_head(features, pre_logits=True), self._grid(features))
        return readings | {block: output for block in blocks if self._is_output(block)}

    def _is_output(self, block: int) -> bool:
        return block == 0 or (self.transformer and block == self.depth)

    def _intermediates(self, pixels: Tensor, inner: list[int], only: bool) -> tuple[Any, dict[int, Reading]]:
        options: dict[str, Any] = {"indices": [block - 1 for block in inner], "intermediates_only": only}
        if self.transformer:
            options |= {"output_fmt": "NLC", "return_prefix_tokens": True}
        found = self.model.forward_intermediates(pixels, stop_early=only, **options)
        features, found = (None, found) if only else found
        read = self._transformer_block if self.transformer else _stage
        return features, {block: read(item) for block, item in zip(inner, found, strict=True)}

    def _transformer_block(self, found: Any) -> Reading:
        patches, prefix = found if isinstance(found, tuple) else (found, None)
        with_class = prefix is not None and prefix.shape[1] > 0
        pooled = self.model.norm(prefix[:, :1])[:, 0] if with_class else self.model.norm(patches).mean(1)
        return Reading(pooled, patches)

    def _grid(self, features: Tensor) -> Tensor:
        if features.ndim == 3:
            return features[:, getattr(self.model, "num_prefix_tokens", 0) :]
        if str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC"):
            return features.flatten(1, 2)
        return features.flatten(2).transpose(1, 2)


class TransformersBackbone(nn.Module):
    """A vision model of transformers: CLIP and SigLIP towers, DINOv2, ViT and what resembles them."""

    def __init__(self, model: nn.Module, patch_size: int) -> None:
        super().__init__()
        self.model: Any = model
        self.patch_size = patch_size
        self.convolutional = False
        config: Any = model.config
        self.depth: int = config.num_hidden_layers

    def read(self, pixels: Tensor, blocks: Sequence[int]) -> dict[int, Reading]:
        """Readings by block number; see the module's docstring."""
        output = self.model(pixel_values=pixels, output_hidden_states=True)
        states = output.hidden_states
        patches = (pixels.shape[-2] // self.patch_size) * (pixels.shape[-1] // self.patch_size)
        prefix = states[-1].shape[1] - patches
        readings = {}
        for block in blocks:
            if block in (0, self.depth):
                readings[block] = Reading(self._pooled_output(output), states[-1][:, prefix:])
            else:
                readings[block] = Reading(self._pooled_block(states[block], prefix), states[block][:, prefix:])
        return readings

    def _pooled_output(self, output: Any) -> Tensor:
        # ViT's pooler is a dense layer with tanh, trained for one classifier and often not stored at all.
        pooled = output.pooler_output if not hasattr(getattr(self.model, "pooler", None), "dense") else None
        result: Tensor = output.last_hidden_state[:, 0] if pooled is None else pooled
        return result

    def _pooled_block(self, state: Tensor, prefix: int) -> Tensor:
        tower = getattr(self.model, "vision_model", self.model)
        norm = next(getattr(tower, name) for name in ("layernorm", "post_layernorm") if hasattr(tower, name))
        normed: Tensor = norm(state)
        if callable(getattr(tower, "head", None)):
            return tower.head(normed)  # type: ignore[no-any-return]
        return normed[:, 0] if prefix else normed.mean(1)


class TorchvisionBackbone(nn.Module):
    """The convolutions of a torchvision network, read at their last grid only.

    Attributes:
        blue_first: the weights expect the channels in the order blue, green, red.
    """

    def __init__(self, model: nn.Module, blue_first: bool = False) -> None:
        super().__init__()
        self.blue_first = blue_first
        self.model: Any = model
        self.convolutional = True
        self.depth = 0

    def read(self, pixels: Tensor, blocks: Sequence[int]) -> dict[int, Reading]:
        """Readings by block number, which can only be 0."""
        return dict.fromkeys(blocks, _stage(self.model.features(pixels.flip(1) if self.blue_first else pixels)))


def _stage(features: Tensor) -> Reading:
    """The reading of a grid [batch, channels, height, width]."""
    return Reading(features.mean((2, 3)), features.flatten(2).transpose(1, 2))


def fold_where_exact(network: nn.Module) -> None:
    """Fold the batch norms of a backbone of the families that `fold_batch_norms` is exact for; leave others alone."""
    from timm.models.efficientnet import EfficientNet

    if isinstance(network, TimmBackbone) and isinstance(network.model, EfficientNet):
        fold_batch_norms(network.model.eval())


def fold_batch_norms(model: nn.Module) -> None:
    """Fold the batch norms of a timm EfficientNet or MobileNet in eval mode into its convolutions, in place.

    Exact up to rounding, and about a quarter faster. In these two families each norm stands right behind its
    convolution; other families may only list them in that order, so they are left alone.
    """
    from timm.layers import BatchNormAct2d

    for parent in list(model.modules()):
        before: tuple[str, nn.Conv2d] | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, BatchNormAct2d) and before is not None:
                setattr(parent, before[0], fuse_conv_bn_eval(before[1], child))
                setattr(parent, name, child.act)
            before = (name, child) if isinstance(child, nn.Conv2d) else None

"""Image encoders: found by name, opened frozen, read as pooled features and as tokens.

Names: a packaged id (`efficientnet-lite0`), `timm:<name>` (pretrained, from the hub), `timm:<name>@<file or directory>`
(local weights), `hf:<hub id or directory>` (CLIP, SigLIP, DINOv2, ViT). Behind any of them `@8` reads block 8, `@8+11`
concatenates two blocks, and `#2` gives the same encoder a second id, as a control.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.packages import sha256_once
from hyma_mllm.zoo.backbones import Backbone, Reading, Tower, fold_where_exact
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.converted import WEIGHTS, converted_dir
from hyma_mllm.zoo.packaged_vision import (
    DEFAULT_IMAGE_IDS,
    IMAGE_CARDS,
    PACKAGED,
    open_packaged,
    packaged_card,
)
from hyma_mllm.zoo.towers import commit_of, open_timm, open_transformers
from hyma_mllm.zoo.vision_names import parse_image_name

__all__ = [
    "DEFAULT_IMAGE_IDS",
    "IMAGE_CARDS",
    "VisionEncoder",
    "image_card",
    "image_on_disk",
    "load_image_encoder",
    "share_weights",
]

_SIDECARS = ("config.json", "preprocessor_config.json")


class VisionEncoder(nn.Module):
    """A frozen image encoder: eval mode, no gradient, one forward pass for all its cards.

    Attributes:
        cards: whose features it gives; more than one when blocks of one checkpoint share the forward pass.
        network: the frozen network.
        preprocess: what `transform` calls; unlike the encoder itself it is light to send to a worker process.
    """

    def __init__(
        self, cards: Sequence[ModelCard], tower: Tower, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.cards = tuple(cards)
        self.preprocess = tower.transform
        self.network = tower.network
        self._blocks = {card.id: parse_image_name(card.id).blocks for card in self.cards}
        for name, blocks in self._blocks.items():
            _refuse_unknown_block(name, blocks, self._backbone)
        self._layout = torch.channels_last if self._backbone.convolutional else torch.contiguous_format
        # Module.to puts the memory format on four-dimensional weights only.
        self.network.to(device=device, dtype=dtype, memory_format=self._layout)  # type: ignore[call-overload]
        self.requires_grad_(False)
        self.eval()

    @property
    def _backbone(self) -> Backbone:
        return self.network  # type: ignore[return-value]

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Stays in eval mode, whatever the model around it does."""
        return super().train(False)

    def transform(self, picture: Image.Image) -> Tensor:
        """The model's own eval transform: an RGB picture to pixels [3, height, width], float32."""
        return self.preprocess(picture)

    def pooled(self, pixels: Tensor) -> dict[str, Tensor]:
        """Card id -> pooled features [batch, width] of pixels [batch, 3, height, width], in the encoder's dtype."""
        readings = self._read(pixels, sorted({block for blocks in self._blocks.values() for block in blocks}))
        # Tensors made in inference mode may not enter an autograd graph; what cat copies outside of it may.
        return {
            name: torch.cat([readings[block].pooled for block in blocks], 1) for name, blocks in self._blocks.items()
        }

    def tokens(self, pixels: Tensor) -> Tensor:
        """Tokens [batch, tokens, width] of the first card: its grid, without class and register tokens.

        The blocks of a card like `dinov2-small@8+11` are concatenated along the width, as LLaVA does with a list of
        `vision_feature_layer`s.

        Raises:
            HymaError: the card concatenates stages of a convolutional network, whose grids differ in size.
        """
        card = self.cards[0]
        blocks = self._blocks[card.id]
        readings = self._read(pixels, sorted(set(blocks)))
        grids = [readings[block].tokens for block in blocks]
        if len({grid.shape[1] for grid in grids}) > 1:
            raise HymaError(
                f"{card.id} joins stages with grids of different sizes, so it has no tokens; name one stage."
            )
        return torch.cat(grids, dim=2)

    def _read(self, pixels: Tensor, blocks: Sequence[int]) -> dict[int, Reading]:
        like = next(self.network.parameters())
        with torch.inference_mode():
            moved = pixels.to(device=like.device, dtype=like.dtype, memory_format=self._layout)
            return self._backbone.read(moved, blocks)


def image_card(name: str) -> ModelCard:
    """The card of an image encoder; no weights are downloaded, read or made for it (local ones are hashed).

    Raises:
        HymaError: an unknown name, an unknown block, or a checkpoint that cannot be read.
    """
    base = parse_image_name(name).base
    if base in PACKAGED:
        return packaged_card(name)
    if not base.startswith(("timm:", "hf:")):
        raise HymaError(
            f"There is no image encoder {name}; {near_names(base, [*IMAGE_CARDS, *PACKAGED])} "
            "Others are named timm:<name> or hf:<hub id or directory>."
        )
    return _outside_card(name, _revision(*_parts(base)))


def load_image_encoder(
    *names: str | ModelCard, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> VisionEncoder:
    """Open an image encoder, frozen.

    Args:
        names: one card or id, or several that share their weights.
        device: where it runs.
        dtype: float32, bfloat16 or float16.

    Raises:
        HymaError: unknown name, names that do not share weights, weights that cannot be had or that are no longer
            those of the card.
    """
    cards = [image_card(name if isinstance(name, str) else name.id) for name in names]
    if not cards:
        raise HymaError("No image encoder was named; name at least one.")
    bases = {parse_image_name(card.id).base for card in cards}
    if len(bases) > 1:
        raise HymaError(f"{' and '.join(sorted(bases))} do not share weights; load them one by one.")
    for asked, card in zip(names, cards, strict=True):
        if isinstance(asked, ModelCard) and asked.revision != card.revision:
            raise HymaError(
                f"The weights of {card.id} are at revision {card.revision[:12]} and no longer at "
                f"{asked.revision[:12]}; embed again with the new ones, or put the old ones back."
            )
    tower = open_network(bases.pop())
    fold_where_exact(tower.network)
    return VisionEncoder(cards, tower, device, dtype)


def share_weights(cards: Sequence[ModelCard]) -> list[list[ModelCard]]:
    """Cards grouped by weights, in order of first appearance: one `load_image_encoder(*group)` serves each group."""
    groups: dict[str, list[ModelCard]] = {}
    for card in cards:
        groups.setdefault(parse_image_name(card.id).base, []).append(card)
    return list(groups.values())


def image_on_disk(card: ModelCard) -> bool:
    """Whether the encoder opens without a download."""
    base = parse_image_name(card.id).base
    if base in PACKAGED:
        return converted_dir(base, card.revision).is_dir()
    source, path = _parts(base)
    if path is not None:
        return path.exists()
    if source.startswith("timm:"):
        import timm

        config = timm.get_pretrained_cfg(source.removeprefix("timm:"), allow_unregistered=False)
        return bool(config and config.hf_hub_id and _in_hub_cache(config.hf_hub_id))
    return _in_hub_cache(source.removeprefix("hf:"))


def _parts(base: str) -> tuple[str, Path | None]:
    """(`timm:name` or `hf:id`, local path or None) of a base name."""
    if base.startswith("timm:"):
        name, _, path = base.partition("@")
        return name, Path(path).expanduser() if path else None
    directory = Path(base.removeprefix("hf:")).expanduser()
    return base, directory if directory.is_dir() else None


def open_network(base: str, weights: bool = True) -> Tower:
    """Network and transform of a base name; `weights=False` (not for packaged ones) builds it on the meta device."""
    if base in PACKAGED:
        return open_packaged(base)
    source, path = _parts(base)
    if source.startswith("timm:"):
        return open_timm(source.removeprefix("timm:"), path, weights)
    return open_transformers(str(path) if path else source.removeprefix("hf:"), weights)


@lru_cache(maxsize=256)
def _outside_card(name: str, revision: str) -> ModelCard:
    """The card of a timm or transformers model: a meta-device forward pass tells every shape.

    Made once in a process, for a configuration asks for its cards again and again; `revision` makes the card of older
    files void.
    """
    parsed = parse_image_name(name)
    source, path = _parts(parsed.base)
    tower = open_network(parsed.base, weights=False)
    _refuse_unknown_block(name, parsed.blocks, tower.backbone)
    side = tower.transform(Image.new("RGB", (64, 64))).shape[-1]
    tower.network.eval()
    with torch.inference_mode():
        readings = tower.backbone.read(torch.empty(1, 3, side, side, device="meta"), parsed.blocks)
    return ModelCard(
        id=name,
        kind="image",
        source=f"{path} (local)" if path else f"{source} (hub)",
        revision=revision,
        width=sum(readings[block].pooled.shape[1] for block in parsed.blocks),
        parameters=tower.parameters,
        licence="see its model card",
        tokens=readings[parsed.blocks[-1]].tokens.shape[1],
        resolution=side,
    )


def _revision(source: str, path: Path | None) -> str:
    """What pins the weights: the hash of local files, a hub commit, or timm's name with its tag."""
    if path is not None:
        files = (
            [path] if path.is_file() else [*(path / name for name in _SIDECARS), *sorted(path.glob("*.safetensors"))]
        )
        digest = hashlib.sha256()
        for file in files:
            if file.is_file():
                digest.update(f"{file.name} {sha256_once(file)}\n".encode())
        return digest.hexdigest()
    if source.startswith("timm:"):
        import timm

        config = timm.get_pretrained_cfg(source.removeprefix("timm:"))
        return f"{config.architecture}.{config.tag}" if config and config.tag else source
    return commit_of(source.removeprefix("hf:"))


def _refuse_unknown_block(name: str, blocks: Sequence[int], backbone: Backbone) -> None:
    if blocks == (0,):
        return
    for block in blocks:
        if not 1 <= block <= backbone.depth:
            known = f"blocks 1 to {backbone.depth}" if backbone.depth else "no blocks to read, only its output"
            raise HymaError(f"{name} has {known}; {block} is not one of them.")


def _in_hub_cache(repository: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, WEIGHTS), str)

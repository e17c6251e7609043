"""Eval transforms as transformers image processors, at any input side.

A stitched model is read by people who only have transformers, so its pictures must go through one of its processors.
The encoder's own mean, standard deviation, interpolation and crop share stay; only the sides are scaled.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import BaseImageProcessor, CLIPImageProcessor

from hyma_mllm.errors import HymaError

_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""Pillow's numbers, which is how transformers writes an interpolation down."""


def processor_of_timm(name: str, pictures: Mapping[str, Any], side: int) -> BaseImageProcessor:
    """The processor of a timm model.

    Args:
        name: timm's name of the model, for messages.
        pictures: `timm.data.resolve_model_data_config` of the model.
        side: of the input, in pixels; the picture is resized to floor(side / crop_pct) first, as timm does.

    Raises:
        HymaError: the model's pictures are padded with a border, which no processor here does.
    """
    if pictures["crop_mode"] not in ("center", "squash"):
        raise HymaError(
            f"timm:{name} crops its pictures in mode {pictures['crop_mode']}, which transformers has no processor for; "
            "name a tower with crop mode center or squash."
        )
    resized = math.floor(side / pictures["crop_pct"])
    size = {"shortest_edge": resized}
    if pictures["crop_mode"] == "squash":
        size = {"height": resized, "width": resized}
    return _processor(size, side, _RESAMPLING[pictures["interpolation"]], pictures["mean"], pictures["std"])


def processor_of_torchvision(
    margin: float, mean: Sequence[float], std: Sequence[float], side: int
) -> BaseImageProcessor:
    """The processor of torchvision's eval transform: shortest edge margin * side, bilinear, centre crop of `side`."""
    return _processor({"shortest_edge": round(margin * side)}, side, _RESAMPLING["bilinear"], mean, std)


def resized_processor(source: str, processor: BaseImageProcessor, side: int) -> BaseImageProcessor:
    """A copy of a checkpoint's own processor that gives `side` x `side` pixels.

    Where the checkpoint resizes to more than it crops, both shrink by the same ratio; where it only resizes its
    shortest edge, the centre is cropped, since a tower with position embeddings takes squares.

    Args:
        source: the checkpoint, for messages.
        processor: its own processor.
        side: of the input, in pixels.

    Raises:
        HymaError: the processor states its size in another way than by edges.
    """
    settings = processor.to_dict()
    size = {key: value for key, value in dict(settings["size"]).items() if value is not None}
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    if not size.keys() <= {"shortest_edge", "height", "width"} or not size:
        raise HymaError(
            f"The image processor of {source} states its size as {size}; name a tower whose processor has a shortest "
            "edge, or a height and a width."
        )
    if "height" in size and crop is None:
        settings["size"] = {"height": side, "width": side}
    else:
        native = dict(crop)["height"] if crop else size["shortest_edge"]
        settings["size"] = {key: round(value * side / native) for key, value in size.items()}
        settings["crop_size"] = {"height": side, "width": side}
        settings["do_center_crop"] = True
    resized: BaseImageProcessor = type(processor).from_dict(settings)
    return resized


def _processor(
    size: dict[str, int], side: int, resample: int, mean: Sequence[float], std: Sequence[float]
) -> BaseImageProcessor:
    return CLIPImageProcessor(
        do_convert_rgb=True,
        size=size,
        resample=resample,
        crop_size={"height": side, "width": side},
        image_mean=list(mean),
        image_std=list(std),
    )

"""Open a network with its weights and transform: a timm name, a transformers checkpoint, a torchvision directory."""

import json
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.foreign import UNREADABLE, parse_json, reason
from hyma_mllm.zoo.backbones import (
    TimmBackbone,
    TorchvisionBackbone,
    Tower,
    TransformersBackbone,
)
from hyma_mllm.zoo.converted import WEIGHTS
from hyma_mllm.zoo.image_processors import processor_of_timm, processor_of_torchvision, resized_processor

_CROP, _RESIZED = 224, 256

_UNREAD_POOLERS = ("vit", "deit")
"""Transformers models whose pooler, a dense layer with tanh that many checkpoints lack, is never read."""

TIMM_RESERVED = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "features_only",
    "scriptable",
    "exportable",
    "no_jit",
)

_UNREADABLE = (HTTPError, *UNREADABLE)
"""What transformers and timm raise on a checkpoint that cannot be fetched or read, or does not fit its config."""


def open_timm(name: str, path: Path | None = None, weights: bool = True) -> Tower:
    """A timm model.

    Args:
        name: timm's name, with or without its tag.
        path: a safetensors file with its weights, or a directory in timm's layout (`config.json` and
            `model.safetensors`); None fetches the pretrained weights of that name.
        weights: False builds the network on the meta device, without any weights.

    Raises:
        HymaError: unknown name, weights that cannot be fetched, read or do not fit.
    """
    import timm
    from timm.data import create_transform, resolve_model_data_config

    if not timm.is_model(name):
        raise HymaError(f"timm has no model {name}; {near_names(name, timm.list_models())}")
    options: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    if path is not None and path.is_dir():
        config = _timm_config(path, name)
        options = {"num_classes": config.get("num_classes"), "pretrained_cfg_overlay": config.get("pretrained_cfg")}
        arguments = config.get("model_args", {})
        options |= arguments
    try:
        if path is None and weights:
            model = _timm_from_hub(name)
        else:
            with torch.device("cpu" if weights else "meta"):
                model = timm.create_model(name, **options)
        pictures = resolve_model_data_config(model)
        transform = create_transform(**pictures, is_training=False)
    except UNREADABLE as error:
        where = f"as {path / 'config.json'} says" if options and path else "by timm"
        raise HymaError(f"timm:{name} cannot be built {where} ({reason(error)}); save the model again.") from error
    if path is not None and weights:
        _fill(model, path / WEIGHTS if path.is_dir() else path, name)
    parameters = _count(model)
    network = TimmBackbone(model, name.split(".")[0], arguments)
    return Tower(network, transform, parameters, partial(processor_of_timm, name, pictures))


def open_transformers(source: str, weights: bool = True) -> Tower:
    """The vision tower of a transformers checkpoint.

    Args:
        source: hub id or local directory with config, image processor and safetensors weights.
        weights: False builds the network on the meta device, without any weights.

    Raises:
        HymaError: the checkpoint cannot be read, or has no vision tower with square patches.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        config = getattr(config, "vision_config", config)
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        patch = getattr(config, "patch_size", None)
        if not isinstance(patch, int) or not hasattr(config, "num_hidden_layers"):
            raise HymaError(
                f"hf:{source} is a {config.model_type} model without square patches and blocks; "
                "name a CLIP, SigLIP, DINOv2 or ViT checkpoint, or timm:<name>."
            )
        options = {"add_pooling_layer": False} if config.model_type in _UNREAD_POOLERS else {}
        if weights:
            with _without_load_report():
                model, report = AutoModel.from_pretrained(
                    source,
                    config=config,
                    dtype=torch.float32,
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **options,
                )
            _refuse_missing(source, report["missing_keys"])
        else:
            with torch.device("meta"):
                model = AutoModel.from_config(config, **options)
    except _UNREADABLE as error:
        raise HymaError(
            f"hf:{source} cannot be read by transformers ({_said(error)}); check the id or the path."
        ) from error
    return Tower(
        TransformersBackbone(model, patch),
        partial(processed, processor),
        _count(model),
        partial(resized_processor, source, processor),
    )


def open_torchvision(path: Path) -> Tower:
    """A torchvision network from a directory of `convert_small_cnns`; only its convolutions must be there."""
    import torchvision
    from torchvision.transforms import v2

    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    model = getattr(torchvision.models, config["architecture"])(weights=None)
    state = load_file(path / WEIGHTS)
    if not any(name.startswith("classifier.") for name in state):
        del model.classifier
    model.load_state_dict(state)
    steps: list[Any] = [v2.Resize(_RESIZED, antialias=True), v2.CenterCrop(_CROP), v2.PILToTensor()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
    processor = partial(processor_of_torchvision, _RESIZED / _CROP, config["mean"], config["std"])
    return Tower(TorchvisionBackbone(model, config["blue_first"]), v2.Compose(steps), _count(model), processor)


def commit_of(source: str) -> str:
    """The hub commit of a transformers checkpoint that is read from the hub, `unknown` where the hub names none."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except _UNREADABLE as error:
        raise HymaError(
            f"hf:{source} cannot be read by transformers ({_said(error)}); check the id or the path."
        ) from error
    return getattr(config, "_commit_hash", None) or "unknown"


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers from printing what a checkpoint holds beside its tower; what it lacks is refused anyway."""
    # A quiet loader makes it look through its plans for several devices, of which there is none here.
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "distributed.tensor_parallel")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _said(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _refuse_missing(source: str, missing: Collection[str]) -> None:
    """A weight that the checkpoint does not hold would be random; a pooler that is never read may be missing."""
    lacking = sorted(name for name in missing if not name.startswith("pooler."))
    if lacking:
        raise HymaError(
            f"hf:{source} lacks {len(lacking)} weights of its vision tower, the first is {lacking[0]}; "
            "give a complete checkpoint."
        )


def processed(processor: Any, picture: Image.Image) -> Tensor:
    """Pixels [3, height, width] of one RGB picture by a transformers image processor."""
    pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"]
    return pixels[0]


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _timm_config(path: Path, name: str) -> dict[str, Any]:
    if not (path / "config.json").is_file():
        raise HymaError(f"{path} has no config.json; give a directory in timm's layout, or the weights file itself.")
    try:
        config: dict[str, Any] = parse_json((path / "config.json").read_bytes())
        architecture, arguments = config.get("architecture"), config.get("model_args", {})
        # What timm takes beside the model's own options: where to fetch weights from, and code to fetch them with.
        if reserved := {*TIMM_RESERVED} & {*arguments.keys()}:
            raise ValueError(f"model_args may not hold {min(reserved)}")
    except (OSError, ValueError, AttributeError) as error:
        raise HymaError(f"{path / 'config.json'} cannot be used ({reason(error)}); save the model again.") from error
    if architecture != name.split(".")[0]:
        raise HymaError(f"{path} holds a {architecture!r:.80}, not a {name}; name the one that it holds.")
    return config


def _timm_from_hub(name: str) -> nn.Module:
    import timm

    try:
        model: nn.Module = timm.create_model(name, pretrained=True)
    except _UNREADABLE as error:
        raise HymaError(
            f"The pretrained weights of timm:{name} cannot be fetched ({_said(error)}); check the network, "
            f"or give a local file as timm:{name}@/path/to/model.safetensors."
        ) from error
    return model


def _fill(model: nn.Module, path: Path, name: str) -> None:
    if not path.is_file():
        raise HymaError(f"timm:{name} has no weights at {path}; give a safetensors file or the directory of one.")
    try:
        model.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise HymaError(f"{path} is not a safetensors file ({error}); convert it first.") from error
    except RuntimeError as error:
        said = " ".join(str(error).strip().splitlines()[1:2]).strip()
        raise HymaError(f"The weights in {path} are not those of a {name} ({said[:200]}); name their model.") from error

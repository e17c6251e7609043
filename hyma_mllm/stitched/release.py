"""The connectors that the paper's authors published, in every layout in which they stand.

A file `{image}_mlp{depth}_{text}.pt` holds the state dict of Linear, ReLU, Linear, ... Its keys come in these layouts:

- depth 0: `weight`, `bias` (or `0.weight`, `0.bias`);
- depth 1: `0.*`, `2.*`;
- depth 2: `0.*`, `2.*`, `4.*`, or the older `0.*`, `2.*`, `3.*`, which stands for the same three layers
  with a ReLU between each;
- any of these under the prefix `layers.`, and any of these wrapped in a dict under `model` or `model_state_dict`.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hyma_mllm.connectors import ConnectorSpec, module
from hyma_mllm.data.standardise import Standardiser
from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.foreign import reason
from hyma_mllm.foreign_tensors import check_plain, load_tensors
from hyma_mllm.stitched.config import StitchedConfig
from hyma_mllm.stitched.vlm import StitchedVLM
from hyma_mllm.zoo.release_names import RELEASE_IMAGE_NAMES, RELEASE_TEXT_NAMES, release_zoo_id
from hyma_mllm.zoo.text import load_text_encoder, text_card
from hyma_mllm.zoo.vision import image_card, load_image_encoder

_NAME = re.compile(r"(?P<image>.+)_mlp(?P<depth>\d{1,3})_(?P<text>.+)")
_KEY = re.compile(r"(?:layers\.)?(?:(?P<index>\d{1,3})\.)?(?P<part>weight|bias)")
_WRAPPERS = ("model", "model_state_dict")


@dataclass(frozen=True)
class ReleaseConnector:
    """One published connector.

    Attributes:
        image: short name of its image encoder, e.g. `vit_s16`.
        image_name: the timm name of that encoder.
        text: short name of its text encoder, e.g. `minilm`.
        text_name: the sentence-transformers name of that encoder.
        spec: depth, hidden width and activation (always ReLU in the release).
        shape: (d_text, d_image), what the connector reads and writes.
        module: the connector, float32, in evaluation mode; [batch, d_text] -> [batch, d_image], not normalised.
    """

    image: str
    image_name: str
    text: str
    text_name: str
    spec: ConnectorSpec
    shape: tuple[int, int]
    module: nn.Sequential


def load_release_connector(path: Path) -> ReleaseConnector:
    """Load one published connector file; the names of its encoders are read from the file name.

    Args:
        path: `{image}_mlp{depth}_{text}.pt` (`.pth`, `.safetensors`) in one of the layouts of this module's docstring.

    Raises:
        HymaError: if the name does not follow that form or names no model of the release, if the file is not readable
            as plain tensors, or if its keys, shapes or depth are not those of a connector.
    """
    image, depth, text = _names(path)
    layers = _layers(path, _state(path))
    spec, shape = _spec(path, layers)
    if spec.depth != depth:
        raise HymaError(f"{path}: the file name says mlp{depth} but its keys are those of mlp{spec.depth}; rename it.")
    connector = module(spec, shape).float()
    state = {f"{2 * position}.{part}": t for position, layer in enumerate(layers) for part, t in layer.items()}
    connector.load_state_dict(state, strict=True)
    return ReleaseConnector(
        image, RELEASE_IMAGE_NAMES[image], text, RELEASE_TEXT_NAMES[text], spec, shape, connector.eval()
    )


def stitch_release(path: Path, device: str | torch.device = "cpu") -> StitchedVLM:
    """A published connector with its two encoders, fetched from the hub, as a model to use or to save.

    Image features go unchanged, but for the L2 norm; so do text features.

    Args:
        path: as for `load_release_connector`.
        device: where the model computes.

    Raises:
        HymaError: as `load_release_connector` does, an encoder cannot be fetched, or the connector does not fit it.
    """
    loaded = load_release_connector(path)
    vision, text = image_card(release_zoo_id(loaded.image)), text_card(release_zoo_id(loaded.text))
    if loaded.shape != (text.width, vision.width):
        raise HymaError(
            f"{path} maps width {loaded.shape[0]} to {loaded.shape[1]}, but {text.id} has width {text.width} and "
            f"{vision.id} has {vision.width}; name the file after the encoders that it was made for."
        )
    return StitchedVLM.from_parts(
        load_image_encoder(vision, device=device),
        load_text_encoder(text, device=device),
        loaded.module,
        Standardiser(vision.width),
        StitchedConfig(vision, text, loaded.spec),
    ).to(device)


def _names(path: Path) -> tuple[str, int, str]:
    match = _NAME.fullmatch(path.stem)
    if match is None:
        raise HymaError(f"{path}: its name is not IMAGE_mlpDEPTH_TEXT, e.g. vit_s16_mlp1_minilm.pt; rename it.")
    for part, known in (("image", RELEASE_IMAGE_NAMES), ("text", RELEASE_TEXT_NAMES)):
        if match[part] not in known:
            raise HymaError(
                f"{path}: no {part} encoder of the release is called {match[part]}; {near_names(match[part], known)}"
            )
    return match["image"], int(match["depth"]), match["text"]


def _state(path: Path) -> dict[str, Tensor]:
    """The tensors of the file, unwrapped; no other pickled object is ever built."""
    if not path.is_file():
        raise HymaError(f"{path}: there is no such connector file.")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else load_tensors(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise HymaError(f"{path} cannot be read as plain tensors ({reason(error)}); fetch it again.") from error
    if isinstance(state, dict):
        for wrapper in _WRAPPERS:
            if isinstance(state.get(wrapper), dict):
                state = state[wrapper]
                break
    if not isinstance(state, dict) or not state:
        raise HymaError(f"{path} holds a {type(state).__name__}, not a connector's state dict.")
    wrong = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if wrong:
        raise HymaError(f"{path}: {', '.join(wrong[:9])} is no tensor; a connector holds weights and biases only.")
    for key, value in state.items():
        try:
            check_plain(value)
        except ValueError as error:
            raise HymaError(f"{path}: {key} is no plain tensor, {error}; a connector holds no other.") from error
    return {str(key): value for key, value in state.items()}


def _layers(path: Path, state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Weight and bias of each Linear in order, each float32; the keys must be exactly one known layout."""
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is not None:
            layers.setdefault(int(match["index"] or 0), {})[match["part"]] = tensor.float()
    indices = sorted(layers)
    regular = indices == list(range(0, 2 * len(indices), 2)) or indices == [0, 2, 3]
    if not regular or sum(map(len, layers.values())) != len(state) or any(len(layer) != 2 for layer in layers.values()):
        raise HymaError(f"{path}: the keys {', '.join(sorted(state))} are no known layout of a connector.")
    return [layers[index] for index in indices]


def _spec(path: Path, layers: list[dict[str, Tensor]]) -> tuple[ConnectorSpec, tuple[int, int]]:
    shapes = [tuple(layer["weight"].shape) for layer in layers]
    fits = all(len(s) == 2 and layer["bias"].shape == s[:1] for s, layer in zip(shapes, layers, strict=True))
    if not fits or any(before[0] != after[1] for before, after in pairwise(shapes)):
        raise HymaError(f"{path}: weights of shape {', '.join(map(str, shapes))} do not follow each other.")
    hidden = {shape[0] for shape in shapes[:-1]}
    if len(hidden) > 1:
        raise HymaError(f"{path}: hidden layers of widths {sorted(hidden)}; a connector has one hidden width.")
    if not all(bool(tensor.isfinite().all()) for layer in layers for tensor in layer.values()):
        raise HymaError(f"{path} holds values that are not finite; fetch it again.")
    spec = ConnectorSpec(depth=len(layers) - 1, activation="relu")
    if hidden:
        spec.hidden = hidden.pop()
    return spec, (shapes[0][1], shapes[-1][0])

"""A transformers vision model at another input side: its table of position embeddings resized once, and kept.

An exported LLaVA calls its tower without `interpolate_pos_encoding`, which CLIP, SigLIP and ViT need for another side
than their own (DINOv2 interpolates always). So the table is resized here by the model's own `interpolate_pos_encoding`
and becomes part of the weights, with `config.image_size` to match: what is read while training is what is saved.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hyma_mllm.errors import HymaError


def at_side(model: PreTrainedModel, side: int, patch: int, name: str) -> PreTrainedModel:
    """The model for pictures of `side` x `side` pixels; the model itself when that is its own side.

    Args:
        model: a vision model with square patches; on the meta device the result is there too.
        side: in pixels.
        patch: side of a patch in pixels.
        name: of the tower, for messages.

    Raises:
        HymaError: the side is not a multiple of the patch.
    """
    refuse_uneven(name, side, patch)
    if _side_of(model) == side:
        return model
    config = copy.deepcopy(model.config)
    config.image_size = side
    device = next(model.parameters()).device
    options: dict[str, Any] = {}
    if hasattr(model, "pooler") and model.pooler is None:
        options = {"add_pooling_layer": False}
    with device:
        resized = type(model)(config, **options)
    state = model.state_dict()
    for prefix, embeddings in model.named_modules():
        if hasattr(embeddings, "interpolate_pos_encoding"):
            key = next(name for name in state if name.startswith(f"{prefix}.position_embedding"))
            state[key] = _resized_table(embeddings, state[key], _side_of(model) // patch, side).view_as(
                resized.state_dict()[key]
            )
    resized.load_state_dict(state)
    return resized.to(next(model.parameters()).dtype).train(model.training)


def _side_of(model: PreTrainedModel) -> int:
    """The model's own input side in pixels; some configurations give height and width."""
    size: Any = model.config.image_size
    return int(size if isinstance(size, int) else size[0])


def refuse_uneven(name: str, side: int, patch: int) -> None:
    """Refuse a side that is not a multiple of the patch, both in pixels.

    Raises:
        HymaError: naming the two nearest sides that are.
    """
    if side % patch:
        below = max(side // patch, 1) * patch
        raise HymaError(
            f"{name} asks for {side} px, which is not a multiple of its patches of {patch} px; "
            f"take {below}px or {below + patch}px."
        )


def _resized_table(embeddings: nn.Module, table: Tensor, grid: int, side: int) -> Tensor:
    """The table that the model would interpolate in a forward pass: [1, positions, width]."""
    prefix = table.shape[-2] - grid * grid
    module: Any = embeddings
    # The method only looks at the number of the patches and at their width; any other number than that of the table
    # makes it interpolate.
    patches = torch.empty(1, prefix, table.shape[-1], device=table.device)
    with torch.no_grad():
        result: Tensor = module.interpolate_pos_encoding(patches, side, side)
    return result

"""A timm ViT as transformers' ViTModel, exactly: what a vanilla LLaVA directory can hold."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

_PLAIN = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|(norm|fc_norm|head)\.(weight|bias)"
    r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"
)
"""The parameters of a plain ViT; layer scales, registers, query norms, distillation tokens and gates are not there."""


def is_plain_vit(model: nn.Module) -> bool:
    """Whether `to_hf_vit` can convert this timm model: a plain ViT or DeiT with a class token and exact GELU."""
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    if type(model) is not VisionTransformer or not model.has_class_token or model.pos_embed is None:
        return False
    source: Any = model
    # Newer timm keeps one attention class per variant; a subclass may compute something else.
    plain_blocks = all(
        type(block) is Block
        and type(block.attn) is Attention
        and isinstance(block.mlp.act, nn.GELU)
        and block.mlp.act.approximate == "none"
        and isinstance(block.norm1, nn.LayerNorm)
        and block.attn.head_dim * block.attn.num_heads == source.embed_dim
        for block in source.blocks
    )
    plain_names = all(_PLAIN.fullmatch(name) for name in model.state_dict())
    height, width = source.patch_embed.grid_size
    squares = height == width and len(set(source.patch_embed.patch_size)) == 1
    whole = source.pos_embed.shape[1] == height * width + 1
    return bool(plain_blocks and plain_names and squares and whole)


def to_hf_vit(model: nn.Module) -> ViTModel:
    """The same network as a ViTModel without a pooling layer; `hidden_states[n]` is the output of block n.

    Args:
        model: a timm model that `is_plain_vit` accepts; on the meta device the result is there too.
    """
    source: Any = model
    block = source.blocks[0]
    config = ViTConfig(
        hidden_size=source.embed_dim,
        num_hidden_layers=len(source.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=block.norm1.eps,
        image_size=source.patch_embed.img_size[0],
        patch_size=source.patch_embed.patch_size[0],
        num_channels=source.patch_embed.proj.in_channels,
        qkv_bias=block.attn.qkv.bias is not None,
    )
    with source.pos_embed.device:
        target = ViTModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for to, values in _pairs(source, target):
            to.copy_(values)
    return target.eval()


def _pairs(source: Any, target: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter of the ViTModel, its values) for every parameter."""
    embeddings = target.embeddings
    yield embeddings.cls_token, source.cls_token
    yield embeddings.position_embeddings, source.pos_embed
    yield from _both(embeddings.patch_embeddings.projection, source.patch_embed.proj)
    # With mean pooling timm norms behind the pooling; the grid itself is then left as it is, in both.
    final = source.norm if isinstance(source.norm, nn.LayerNorm) else source.fc_norm
    if isinstance(final, nn.LayerNorm):
        yield from _both(target.layernorm, final)
    layers = next(module for module in target.modules() if isinstance(module, nn.ModuleList))
    for layer, block in zip(layers, source.blocks, strict=True):
        # transformers renamed these modules between its releases; their order of registration is the same in all.
        query, key, value, out, first, second = (part for part in layer.modules() if isinstance(part, nn.Linear))
        split = zip((query, key, value), block.attn.qkv.weight.chunk(3), strict=True)
        yield from ((linear.weight, weight) for linear, weight in split)
        if block.attn.qkv.bias is not None:
            biases = zip((query, key, value), block.attn.qkv.bias.chunk(3), strict=True)
            yield from ((linear.bias, bias) for linear, bias in biases)
        yield from _both(out, block.attn.proj)
        yield from _both(first, block.mlp.fc1)
        yield from _both(second, block.mlp.fc2)
        yield from _both(layer.layernorm_before, block.norm1)
        yield from _both(layer.layernorm_after, block.norm2)


def _both(to: Any, source: Any) -> Iterator[tuple[Tensor, Tensor]]:
    yield to.weight, source.weight
    yield to.bias, source.bias

"""A timm ViT and its conversion are the same function, block by block."""

from typing import Any

import pytest
import timm
import torch
from transformers import ViTModel

from hyma_mllm.zoo.timm_to_hf import is_plain_vit, to_hf_vit


def made(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **options).eval()
    for parameter in model.parameters():  # zeros and ones would hide a swapped bias or norm
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"depth": 3}),
        ("deit_tiny_patch16_224", {"depth": 3}),
        ("vit_tiny_patch16_224", {"depth": 2, "qkv_bias": False, "img_size": 96}),
        ("vit_tiny_patch16_224", {"depth": 2, "global_pool": "avg", "img_size": 96}),
    ],
)
def test_every_hidden_state_is_timms(name: str, options: dict[str, Any]) -> None:
    source = made(name, **options)
    assert is_plain_vit(source)
    model = to_hf_vit(source)
    assert model.config.layer_norm_eps == 1e-6
    assert model.pooler is None
    side = source.patch_embed.img_size[0]
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        blocks = source.forward_intermediates(
            pixels, norm=False, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
        end = source.forward_features(pixels)
        last = model(pixel_values=pixels).last_hidden_state
    for state, (patches, prefix) in zip(states[1:], blocks, strict=True):
        assert (state - torch.cat([prefix, patches], dim=1)).abs().max() < 1e-5
    if source.global_pool == "token":
        torch.testing.assert_close(last, end, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit3_small_patch16_224", {"depth": 1}),  # layer scale, no position for the class token
        ("vit_tiny_patch16_224", {"depth": 1, "qk_norm": True}),
        ("vit_tiny_patch16_224", {"depth": 1, "reg_tokens": 2}),
        ("vit_base_patch32_clip_quickgelu_224", {"depth": 1}),  # norm before the blocks, another GELU
        ("deit_tiny_distilled_patch16_224", {"depth": 1}),
        ("vit_tiny_patch16_224", {"depth": 1, "class_token": False, "global_pool": "avg"}),
        ("test_efficientnet", {}),
    ],
)
def test_what_is_not_a_plain_vit_is_left_alone(name: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **options)
    assert not is_plain_vit(model)


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        source = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    model = to_hf_vit(source)
    assert isinstance(model, ViTModel)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}

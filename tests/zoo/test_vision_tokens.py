"""Vision towers: their names, sides, pooled grids and pictures, and that an exported LLaVA reads the same tokens."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from hyma_mllm.errors import HymaError
from hyma_mllm.zoo.vision import load_image_encoder
from hyma_mllm.zoo.vision_names import TowerName, parse_tower_name
from hyma_mllm.zoo.vision_tokens import (
    DEFAULT_TOWER_IDS,
    image_processor,
    load_tower,
    pool_grid,
    tower_card,
    tower_on_disk,
    transformers_tower,
)

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, intermediate_size=64)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2)),
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, intermediate_size=64)),
    "vit": lambda: ViTModel(ViTConfig(**SIZES, intermediate_size=64), add_pooling_layer=False),
}
PREFIX = {"clip": 1, "dinov2": 1, "registers": 5, "siglip": 0, "vit": 1}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("towers")
    for name, make in MODELS.items():
        model = make().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(root / name)
        processor: Any = BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56})
        if name == "siglip":
            processor = SiglipImageProcessor(size={"height": 56, "width": 56})
        processor.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def timm_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("timm")
    names = {}
    for name in ("test_vit", "test_efficientnet", "test_vit2", "test_resnet"):
        model = timm.create_model(name)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(state, root / f"{name}.safetensors")
        names[name] = f"timm:{name}@{root / f'{name}.safetensors'}"
    return names


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.fromarray(image) for image in load_sample_images().images]


def pixels_of(tower: Any) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, tower.llava.side, tower.llava.side)


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("dinov2-small", TowerName("dinov2-small")),
        ("dinov2-small@11:112px", TowerName("dinov2-small", (11,), 112)),
        ("efficientnet-lite0:128px:pool2#2", TowerName("efficientnet-lite0", (), 128, "pool", 2)),
        ("hf:/dir@-2", TowerName("hf:/dir", (-2,))),
        ("hf:/a/b@8+-2:shuffle3", TowerName("hf:/a/b", (8, -2), None, "shuffle", 3)),
        ("timm:vit@/a/b.safetensors@3:96px", TowerName("timm:vit@/a/b.safetensors", (3,), 96)),
        ("efficientnet-lite0:pool2:128px", TowerName("efficientnet-lite0:pool2", (), 128)),
    ],
)
def test_names(name: str, parsed: TowerName) -> None:
    assert parse_tower_name(name) == parsed


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dinov2-small:100px", "not a multiple of its patches of 14 px; take 98px or 112px"),
        ("dinov2-small:5px", "take 14px or 28px"),
        ("dinov2-small@13", r"blocks 1 to 12 \(or -1 to -12\); 13"),
        ("dinov2-small@-13:56px", "-13 is not one of them"),
        ("dinov2-small:70px:pool2", "25 tokens cannot go through pool2"),
        ("efficientnet-lite0:96px:shuffle2", "9 tokens cannot go through shuffle2"),
        ("efficientnet-lite0@3+5", "different sizes"),
        ("efficientnet-lite0:pool2:128px", "There is no image encoder"),
        ("vgg16:128px", "at 224 px only"),
        ("efficientnet-lite9:128px", "did you mean efficientnet-lite"),
        ("timm:resnet18@1+2", "cannot be joined"),
        ("timm:test_vit2:100px", "take 96px or 112px"),
    ],
)
def test_bad_names_are_one_sentence(name: str, said: str) -> None:
    with pytest.raises(HymaError, match=said):
        tower_card(name)


def test_default_towers() -> None:
    cards = [tower_card(name) for name in DEFAULT_TOWER_IDS]
    assert len(cards) >= 3
    assert all(9 <= (card.tokens or 0) <= 16 for card in cards)
    assert len({card.revision for card in cards}) >= 3


@pytest.mark.parametrize("side", [56, 28, 84])
@pytest.mark.parametrize("family", sorted(MODELS))
def test_tokens_are_the_penultimate_block_with_interpolated_positions(
    family: str, side: int, checkpoints: Path
) -> None:
    tower = load_tower(f"hf:{checkpoints / family}:{side}px")
    pixels = pixels_of(tower)
    plain = MODELS[family]()
    plain = type(plain).from_pretrained(checkpoints / family)
    flag = {} if family in ("dinov2", "registers") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        states = plain(pixel_values=pixels, output_hidden_states=True, **flag).hidden_states
    expected = states[-1] if family == "siglip" else states[-2][:, 1:]
    torch.testing.assert_close(tower.tokens(pixels), expected, atol=1e-5, rtol=1e-5)
    assert tower.card == tower_card(tower.card.id)
    assert (tower.card.tokens, tower.card.width, tower.card.resolution) == (*expected.shape[1:], side)
    assert tower_on_disk(tower.card)


@pytest.mark.parametrize("suffix", [":28px", "@1+2", "@-3:84px"])
@pytest.mark.parametrize("family", sorted(MODELS))
def test_a_vanilla_llava_reads_the_same_tokens(family: str, suffix: str, checkpoints: Path) -> None:
    tower = load_tower(f"hf:{checkpoints / family}{suffix}")
    reading = tower.llava
    assert reading.form == "llava" and reading.extra_tokens == PREFIX[family]
    vision = transformers_tower(tower.card)
    layers: Any = reading.layers[0] if len(reading.layers) == 1 else list(reading.layers)
    text = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=text,
        vision_feature_layer=layers,
        vision_feature_select_strategy=reading.strategy,
    )
    llava = LlavaForConditionalGeneration(config).eval()
    llava.model.vision_tower.load_state_dict(vision.state_dict(), strict=False)
    llava.model.multi_modal_projector = nn.Identity()
    pixels = pixels_of(tower)
    with torch.no_grad():
        found = llava.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(torch.stack(list(found)), tower.tokens(pixels), atol=1e-5, rtol=1e-5)
    # What LlavaProcessor counts.
    grid = (reading.side // reading.patch) ** 2
    assert grid + reading.extra_tokens - (reading.strategy == "default") == tower.card.tokens


@pytest.mark.parametrize("side", [64, 96, 100])
def test_fastvlm_reads_the_last_grid_of_a_timm_network(side: int, timm_files: dict[str, str]) -> None:
    tower = load_tower(f"{timm_files['test_efficientnet']}:{side}px")
    reading = tower.llava
    assert (reading.form, reading.layers, reading.strategy, reading.extra_tokens) == ("fastvlm", (-1,), "full", 0)
    assert (side // reading.patch) ** 2 == tower.card.tokens
    vision = transformers_tower(tower.card)
    text = Qwen2Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    model = FastVlmForConditionalGeneration(FastVlmConfig(vision_config=vision.config, text_config=text)).eval()
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.multi_modal_projector = nn.Identity()
    pixels = pixels_of(tower)
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pixels).pooler_output
    # The batch norms of ours are folded.
    torch.testing.assert_close(found, tower.tokens(pixels), atol=1e-4, rtol=1e-4)


def test_a_timm_vit_becomes_a_transformers_one(timm_files: dict[str, str]) -> None:
    tower = load_tower(timm_files["test_vit"])
    source = timm.create_model("test_vit").eval()
    source.load_state_dict(load_file(timm_files["test_vit"].split("@", 1)[1]))
    assert tower.llava.form == "llava" and tower.llava.layers == (-2,)
    pixels = pixels_of(tower)
    with torch.no_grad():
        blocks = source.forward_intermediates(pixels, norm=False, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(tower.tokens(pixels), blocks[-2], atol=1e-5, rtol=1e-5)


def test_what_no_transformers_class_reads_is_our_own(timm_files: dict[str, str], checkpoints: Path) -> None:
    names = [
        f"{timm_files['test_vit2']}:96px",  # registers and layer scale
        f"{timm_files['test_efficientnet']}@3:64px",
        f"{timm_files['test_resnet']}:64px:pool2",
        f"hf:{checkpoints / 'registers'}:shuffle2",
    ]
    for name in names:
        tower = load_tower(name)
        assert tower.llava.form == "own"
        found = tower.tokens(pixels_of(tower))
        assert found.shape == (2, tower.card.tokens, tower.card.width)
        assert (tower.llava.side // tower.llava.patch) ** 2 == tower.card.tokens
        with pytest.raises(HymaError, match="own class"):
            transformers_tower(tower.card)


def test_pooled_towers_drop_the_registers(checkpoints: Path) -> None:
    whole = load_tower(f"hf:{checkpoints / 'registers'}")
    pooled = load_tower(f"hf:{checkpoints / 'registers'}:pool2")
    pixels = pixels_of(whole)
    assert (whole.card.tokens, pooled.card.tokens) == (20, 4)
    torch.testing.assert_close(pooled.tokens(pixels), pool_grid(whole.tokens(pixels)[:, 4:], "pool", 2))


def test_pool_and_shuffle_join_neighbours_of_the_grid() -> None:
    tokens = torch.randn(2, 16, 3)
    grid = tokens.view(2, 4, 4, 3)
    pooled, shuffled = pool_grid(tokens, "pool", 2), pool_grid(tokens, "shuffle", 2)
    assert pool_grid(tokens, "none", 1) is tokens
    assert (pooled.shape, shuffled.shape) == ((2, 4, 3), (2, 4, 12))
    for number, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        square = grid[:, row : row + 2, column : column + 2].flatten(1, 2)
        torch.testing.assert_close(pooled[:, number], square.mean(1))
        assert torch.equal(shuffled[:, number], square.transpose(1, 2).flatten(1))


def test_frozen_for_good_and_gradients_may_pass_behind(checkpoints: Path) -> None:
    tower = load_tower(f"hf:{checkpoints / 'vit'}#2").train()
    assert not tower.training and not any(parameter.requires_grad for parameter in tower.parameters())
    weight = torch.ones(32, requires_grad=True)
    (tower.tokens(pixels_of(tower)) * weight).sum().backward()  # fails on tensors of inference mode
    assert weight.grad is not None
    with pytest.raises(HymaError, match="no longer at other"):
        load_tower(replace(tower.card, revision="other"))


@pytest.mark.parametrize("side", [56, 28])
@pytest.mark.parametrize("family", ["dinov2", "siglip"])
def test_the_image_processor_of_a_checkpoint(
    family: str, side: int, checkpoints: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    tower = load_tower(f"hf:{checkpoints / family}:{side}px")
    image_processor(tower).save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    encoder = load_image_encoder(f"hf:{checkpoints / family}")
    for picture in pictures:
        ours = tower.preprocess(picture)
        assert ours.shape == (3, side, side)
        assert (again(images=picture, return_tensors="pt")["pixel_values"][0] - ours).abs().max() < 1e-3
        if side == 56:
            assert torch.equal(ours, encoder.transform(picture))


@pytest.mark.parametrize(
    ("name", "side"), [("test_efficientnet", None), ("test_efficientnet", 152), ("test_vit", None), ("test_vit", 80)]
)
def test_the_image_processor_of_a_timm_network(
    name: str, side: int | None, timm_files: dict[str, str], pictures: list[Image.Image], tmp_path: Path
) -> None:
    tower = load_tower(timm_files[name] + (f":{side}px" if side else ""))
    settings = resolve_model_data_config(timm.create_model(name))
    if side:
        settings["input_size"] = (3, side, side)
    transform: Any = create_transform(**settings, is_training=False)
    image_processor(tower).save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    for picture in pictures:
        # Where the margin of the crop is odd, timm rounds its half to even and transformers down: a shift by one pixel
        # of the resized picture. Squares have an even margin here.
        picture = picture.crop((0, 0, 400, 400))
        ours = tower.preprocess(picture)
        theirs = transform(picture)
        assert ours.shape == theirs.shape
        assert (again(images=picture, return_tensors="pt")["pixel_values"][0] - ours).abs().max() < 1e-3
        # Pillow and torchvision round a resized 8-bit picture differently by one or two levels of 255.
        assert (ours - theirs).abs().max() <= 2.5 / 255 / min(settings["std"])
        assert (ours - theirs).abs().mean() < 0.01


@pytest.mark.zoo
@pytest.mark.parametrize("name", [*DEFAULT_TOWER_IDS, "dinov2-small:56px:pool2", "efficientnet-lite1@3:128px"])
def test_packaged_towers(name: str, pictures: list[Image.Image]) -> None:
    tower = load_tower(name)
    pixels = torch.stack([tower.preprocess(picture) for picture in pictures])
    found = tower.tokens(pixels)
    assert found.shape == (2, tower.card.tokens, tower.card.width)
    assert pixels.shape[-1] == tower.card.resolution == tower.llava.side
    assert torch.isfinite(found).all()
    if tower.llava.form == "fastvlm":
        vision = transformers_tower(name)
        with torch.no_grad():
            last = vision(pixels).last_hidden_state.flatten(2).transpose(1, 2)
        torch.testing.assert_close(last, found, atol=1e-3, rtol=1e-3)

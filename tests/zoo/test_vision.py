"""Names, cards and loaders of image encoders, on tiny models with random weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch
from huggingface_hub.errors import HTTPError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BitImageProcessor,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from hyma_mllm import packages
from hyma_mllm.errors import HymaError
from hyma_mllm.zoo import vision
from hyma_mllm.zoo.backbones import fold_batch_norms
from hyma_mllm.zoo.converted import Converted, convert_once
from hyma_mllm.zoo.towers import open_timm
from hyma_mllm.zoo.vision import (
    DEFAULT_IMAGE_IDS,
    IMAGE_CARDS,
    image_card,
    image_on_disk,
    load_image_encoder,
    share_weights,
)
from hyma_mllm.zoo.vision_names import ImageName, parse_image_name

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
MODELS = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2)),
    "vit": lambda: ViTModel(ViTConfig(**SIZES, intermediate_size=64), add_pooling_layer=False),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, intermediate_size=64)),
    "clip": lambda: CLIPModel(
        CLIPConfig(
            text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
            vision_config={**SIZES, "intermediate_size": 64},
        )
    ),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("checkpoints")
    processor = BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    for name, make in MODELS.items():
        make().eval().save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root


@pytest.mark.parametrize(
    ("name", "base", "blocks"),
    [
        ("dinov2-small", "dinov2-small", (0,)),
        ("dinov2-small@8+11", "dinov2-small", (8, 11)),
        ("efficientnet-lite0@4#2", "efficientnet-lite0", (4,)),
        ("efficientnet-lite0#2", "efficientnet-lite0", (0,)),
        ("timm:resnet18@/a/b.safetensors@3", "timm:resnet18@/a/b.safetensors", (3,)),
        ("hf:/models/clip@2", "hf:/models/clip", (2,)),
    ],
)
def test_names(name: str, base: str, blocks: tuple[int, ...]) -> None:
    assert parse_image_name(name) == ImageName(base, blocks)


def test_default_ids_have_cards_and_distinct_shapes() -> None:
    assert set(DEFAULT_IMAGE_IDS) <= set(IMAGE_CARDS)
    assert len({IMAGE_CARDS[name].width for name in DEFAULT_IMAGE_IDS}) >= 3
    assert not any(IMAGE_CARDS[name].opt_in for name in DEFAULT_IMAGE_IDS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("efficientnet-lite9", "did you mean efficientnet-lite"),
        ("dinov2-small@13", "blocks 1 to 12; 13"),
        ("dinov2-small@0", "There is no image encoder dinov2-small@0; did you mean dinov2-small"),
        ("vgg16@1", "no blocks"),
        ("timm:resnet19", "did you mean"),
        ("hf:/nowhere/at/all", "cannot be read"),
    ],
)
def test_bad_names_are_one_sentence(name: str, said: str) -> None:
    with pytest.raises(HymaError, match=said):
        image_card(name)


@pytest.mark.parametrize("family", sorted(MODELS))
def test_transformers_tower(family: str, checkpoints: Path) -> None:
    names = [f"hf:{checkpoints / family}{suffix}" for suffix in ("", "@2", "@1+2", "@3")]
    cards = [image_card(name) for name in names]
    encoder = load_image_encoder(*cards)
    pixels = torch.stack([encoder.transform(Image.effect_noise((40, 30), sigma).convert("RGB")) for sigma in (30, 90)])
    pooled = encoder.pooled(pixels)
    assert [tuple(pooled[card.id].shape) for card in cards] == [(2, card.width) for card in cards]
    assert [card.width for card in cards] == [32, 32, 64, 32]
    assert torch.equal(pooled[names[0]], pooled[names[3]])
    assert encoder.tokens(pixels).shape == (2, 4, 32)
    assert (cards[0].tokens, cards[0].resolution) == (4, 28)
    assert cards[0].parameters == sum(p.numel() for p in encoder.parameters())
    assert image_on_disk(cards[0])

    model = encoder.network.get_submodule("model")
    with torch.no_grad():
        states = model(pixels, output_hidden_states=True).hidden_states
    prefix = states[2].shape[1] - 4
    torch.testing.assert_close(load_image_encoder(names[1]).tokens(pixels), states[2][:, prefix:])


@pytest.mark.parametrize(
    "family", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"]
)
def test_timm_card_needs_no_weights(family: str) -> None:
    """Their shapes come from a pass on the meta device; compared with timm's own count and widths."""
    card = image_card(f"timm:{family}")
    with torch.device("meta"):
        model = timm.create_model(family)
    assert card.width == model.num_features
    assert card.parameters == sum(p.numel() for p in model.parameters())
    assert card.tokens == (196 if family.startswith("vit") else 49)


@pytest.mark.parametrize("family", ["test_vit", "test_efficientnet", "test_resnet"])
def test_timm_from_a_local_file(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = timm.create_model(family, num_classes=1000).eval()
    file = tmp_path / "w.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in source.state_dict().items()}, file)
    names = [f"timm:{family}@{file}", f"timm:{family}@{file}@2", f"timm:{family}@{file}@2#2"]
    encoder = load_image_encoder(*names)
    side = encoder.cards[0].resolution or 0
    pixels = torch.randn(2, 3, side, side)
    pooled = encoder.pooled(pixels)
    with torch.no_grad():
        features = source.forward_features(pixels)
        expected = source.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled[names[0]], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(pooled[names[1]], pooled[names[2]])
    alone = load_image_encoder(names[1])
    torch.testing.assert_close(alone.pooled(pixels)[names[1]], pooled[names[1]])
    assert alone.tokens(pixels).shape[1:] == (alone.cards[0].tokens, alone.cards[0].width)


def test_encoder_is_frozen_and_its_features_may_be_trained_on(checkpoints: Path) -> None:
    encoder = load_image_encoder(f"hf:{checkpoints / 'dinov2'}")
    assert not encoder.train().training
    assert not any(p.requires_grad for p in encoder.parameters())
    connector = torch.nn.Linear(32, 4)
    pixels = torch.randn(2, 3, 28, 28)
    (connector(encoder.tokens(pixels)).sum() + connector(encoder.pooled(pixels)[encoder.cards[0].id]).sum()).backward()
    assert connector.weight.grad is not None


def test_weights_that_changed_are_refused(checkpoints: Path) -> None:
    card = image_card(f"hf:{checkpoints / 'vit'}")
    with pytest.raises(HymaError, match="no longer at"):
        load_image_encoder(replace(card, revision="0" * 64))


def test_local_files_are_read_again_only_once_they_changed(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(checkpoints / "vit", tmp_path / "vit")
    opened = Mock(side_effect=vision.open_network)
    read = Mock(side_effect=packages.sha256_of)
    monkeypatch.setattr(vision, "open_network", opened)
    monkeypatch.setattr(packages, "sha256_of", read)
    card = image_card(f"hf:{folder}")
    looks = read.call_count
    assert image_card(f"hf:{folder}") == card and (opened.call_count, read.call_count) == (1, looks)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    assert image_card(f"hf:{folder}").revision != card.revision
    assert (opened.call_count, read.call_count) == (2, looks + 1)


@pytest.mark.parametrize("pooled", [True, False])
def test_a_classifier_is_read_without_a_report(pooled: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whether a ViT's checkpoint has its unread pooler changes neither the size nor the features."""
    torch.manual_seed(0)
    config = ViTConfig(**SIZES, intermediate_size=64)
    ViTModel(config, add_pooling_layer=pooled).save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    encoder = load_image_encoder(f"hf:{tmp_path}")
    said = capfd.readouterr()
    assert "LOAD REPORT" not in said.out + said.err
    plain = ViTModel(config, add_pooling_layer=False)
    assert encoder.cards[0].parameters == sum(parameter.numel() for parameter in plain.parameters())


@pytest.mark.parametrize("error", [HTTPError("offline"), OSError("offline"), OSError()])
def test_a_hub_that_fails_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", Mock(side_effect=error))
    with pytest.raises(HymaError, match=r"^hf:some/model cannot be read by transformers \((offline|OSError)\); check"):
        image_card("hf:some/model")
    monkeypatch.setattr(timm, "create_model", Mock(side_effect=error))
    with pytest.raises(HymaError, match=r"^The pretrained weights of timm:resnet18 .* \((offline|OSError)\); check"):
        open_timm("resnet18")


def test_a_checkpoint_with_a_missing_weight_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    state = load_file(checkpoints / "dinov2" / "model.safetensors")
    name = sorted(key for key in state if "mlp.fc1.weight" in key)[0]
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_text((checkpoints / "dinov2" / file).read_text())
    save_file(
        {key: tensor for key, tensor in state.items() if key != name}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(HymaError, match="lacks 1 weights"):
        load_image_encoder(f"hf:{tmp_path}")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(HymaError, match="not those of a test_vit"):
        load_image_encoder(f"timm:test_vit@{file}")
    file.write_bytes(b"no safetensors")
    with pytest.raises(HymaError, match="not a safetensors file"):
        load_image_encoder(f"timm:test_vit@{file}")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet"}))
    with pytest.raises(HymaError, match="holds a 'test_resnet'"):
        load_image_encoder(f"timm:test_vit@{tmp_path}")


def test_groups_share_weights() -> None:
    names = ["dinov2-small@8", "mobilenetv2", "dinov2-small", "mobilenetv2#2"]
    groups = share_weights([image_card(name) for name in names])
    assert [[card.id for card in group] for group in groups] == [names[0::2], names[1::2]]
    with pytest.raises(HymaError, match="do not share weights"):
        load_image_encoder("dinov2-small", "mobilenetv2")


def test_folding_keeps_the_function() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet").train()
    pixels = torch.randn(4, 3, 96, 96)
    model(pixels)
    model.eval()
    with torch.no_grad():
        before = model(pixels)
        fold_batch_norms(model)
        after = model(pixels)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)


def test_conversion_runs_once_and_notices_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYMA_CACHE", str(tmp_path))
    calls = []

    def convert(scratch: Path) -> Converted:
        calls.append(scratch)
        return Converted({"w": torch.arange(4.0).reshape(2, 2).T}, {"config.json": {"a": 1}})

    path = convert_once("m", "abc", convert)
    assert convert_once("m", "abc", convert) == path
    assert len(calls) == 1
    assert load_file(path / "model.safetensors")["w"].tolist() == [[0, 2], [1, 3]]
    with (path / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(HymaError, match="delete that directory"):
        convert_once("m", "abc", convert)


def test_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYMA_CACHE", str(tmp_path))

    def convert(scratch: Path) -> Converted:
        (scratch / "half").write_text("x")
        raise HymaError("broken")

    with pytest.raises(HymaError, match="broken"):
        convert_once("m", "abc", convert)
    assert [path.name for path in (tmp_path / "models").iterdir() if not path.name.endswith(".lock")] == []

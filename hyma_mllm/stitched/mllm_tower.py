"""The vision tower of an exported MLLM: as a transformers model, with its weights, whoever reads its tokens."""

from dataclasses import dataclass

from timm.models.efficientnet import EfficientNet
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel, TimmWrapperConfig, TimmWrapperModel

from hyma_mllm.errors import HymaError
from hyma_mllm.zoo.backbones import TimmBackbone, TransformersBackbone
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.vision_names import parse_tower_name
from hyma_mllm.zoo.vision_tokens import LlavaReading, VisionTower, transformers_tower


@dataclass(frozen=True)
class VisionPart:
    """What an export takes from a tower.

    Attributes:
        model: the transformers model; `TimmWrapperModel` around a timm network.
        card: of the tower.
        reading: how its tokens are read.
        processor: its image processor.
    """

    model: PreTrainedModel
    card: ModelCard
    reading: LlavaReading
    processor: BaseImageProcessor


def vision_part(tower: VisionTower) -> VisionPart:
    """The tower as a transformers model.

    Raises:
        HymaError: no class of transformers holds this network.
    """
    own = tower.llava.form == "own"
    model = _held(tower.network, tower.card) if own else transformers_tower(tower.card)
    return VisionPart(model, tower.card, tower.llava, tower.processor)


def backbone(model: PreTrainedModel) -> nn.Module:
    """The zoo's view of a tower's transformers model, which `read_tokens` takes; it shares the weights.

    Args:
        model: what `vision_part` made of the tower.
    """
    if isinstance(model, TimmWrapperModel):
        return TimmBackbone(model.timm_model, model.config.architecture, model.config.model_args or {})
    return TransformersBackbone(model, model.config.patch_size)


def _held(network: nn.Module, card: ModelCard) -> PreTrainedModel:
    """The model of a tower whose tokens only our own class reads."""
    if isinstance(network, TransformersBackbone):
        model: PreTrainedModel = network.model
        return model
    if not isinstance(network, TimmBackbone):
        raise HymaError(
            f"{card.id} is a torchvision network, which transformers has no class for; export a pair with a timm or "
            "transformers tower."
        )
    if isinstance(network.model, EfficientNet):  # its batch norms are folded here; the file has them as timm has
        return transformers_tower(f"{parse_tower_name(card.id).base}:{card.resolution}px")
    return _wrapped(network, card)


def _wrapped(network: TimmBackbone, card: ModelCard) -> PreTrainedModel:
    arguments = dict(network.arguments)
    if hasattr(network.model, "set_input_size"):
        arguments["img_size"] = card.resolution
    config = TimmWrapperConfig(
        architecture=network.architecture,
        model_args=arguments or None,
        do_pooling=False,
        hidden_size=network.model.num_features,
        num_labels=0,
    )
    model = TimmWrapperModel(config)
    wanted = model.timm_model.state_dict().keys()
    state = {name: tensor for name, tensor in network.model.state_dict().items() if name in wanted}
    model.timm_model.load_state_dict(state)
    return model.eval()

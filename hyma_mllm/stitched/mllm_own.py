"""The exported class for what plain LLaVA cannot say: pooled tokens, deep or wide connectors, other output heads.

Importing this module registers it with `AutoConfig` and `AutoModelForImageTextToText`; everything that it does not
override (the merge of picture and text, generation, caching) is LLaVA's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel, LlavaPreTrainedModel

from hyma_mllm.connectors import ConnectorSpec, module
from hyma_mllm.stitched.mllm_tower import backbone
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.vision_tokens import LlavaReading, read_tokens


class HymaMLLMConfig(LlavaConfig):  # type: ignore[misc]
    """LLaVA's configuration and what it lacks.

    Attributes:
        tower: the tower's card; its id says which blocks are read and how tokens are joined.
        tower_reading: the fields of its `LlavaReading`.
        connector_depth: hidden layers of the connector.
        connector_hidden: width of each hidden layer.
        head_bias: whether the LLM's output head has a bias.
        logit_softcap: logits become `cap * tanh(logits / cap)`; None leaves them.
        logit_scale: what logits are multiplied by, before the softcap.
    """

    model_type = "hyma_mllm"

    tower: dict[str, Any] | None = None
    tower_reading: dict[str, Any] | None = None
    connector_depth: int = 1
    connector_hidden: int = 1024
    head_bias: bool = False
    logit_softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def card(self) -> ModelCard:
        """The tower's card."""
        return ModelCard(**(self.tower or {}))

    @property
    def reading(self) -> LlavaReading:
        """How the tower's tokens are read."""
        fields = self.tower_reading or {}
        return LlavaReading(**fields | {"layers": tuple(fields["layers"])})


class OutputHead(nn.Linear):
    """The LLM's output head with its scale and its softcap (Gemma 2, arXiv 2408.00118, section 2)."""

    def __init__(self, width: int, vocabulary: int, bias: bool, scale: float, softcap: float | None) -> None:
        super().__init__(width, vocabulary, bias=bias)
        self.scale, self.softcap = scale, softcap

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Logits [..., vocabulary] of hidden states [..., width]."""
        logits = self.scale * super().forward(input)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class HymaMLLMModel(LlavaModel):  # type: ignore[misc]
    """Vision tower, connector and the LLM without its head."""

    config: HymaMLLMConfig

    def __init__(self, config: HymaMLLMConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        spec = ConnectorSpec(config.connector_depth, config.connector_hidden, config.projector_hidden_act)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = module(spec, (config.card.width, config.text_config.hidden_size))
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Connected tokens, as `pooler_output` [batch, tokens, LLM width]; layer and strategy are the config's.

        Args:
            pixel_values: [batch, 3, height, width].
            vision_feature_layer: only for LLaVA's signature.
            vision_feature_select_strategy: likewise.
            kwargs: likewise.
        """
        pixels = pixel_values.to(self.vision_tower.dtype)
        tokens = read_tokens(backbone(self.vision_tower), pixels, self.config.reading, self.config.card.id)
        connected = list(self.multi_modal_projector(tokens))  # one entry a picture, as LLaVA has it
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=connected)


class HymaMLLMForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[misc]
    """The whole model: `LlavaForConditionalGeneration` over `HymaMLLMModel` and `OutputHead`."""

    config: HymaMLLMConfig

    def __init__(self, config: HymaMLLMConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = HymaMLLMModel(config)
        text = config.text_config
        self.lm_head = OutputHead(
            text.hidden_size, text.vocab_size, config.head_bias, config.logit_scale, config.logit_softcap
        )
        self.post_init()


AutoConfig.register("hyma_mllm", HymaMLLMConfig)
AutoModelForImageTextToText.register(HymaMLLMConfig, HymaMLLMForConditionalGeneration)

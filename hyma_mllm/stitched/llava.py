"""One pair as a transformers model: plain LLaVA where it has the words, FastVLM for CNN towers, else our own class.

The weights are put into the names of the target class and go through its `from_pretrained`, so that what is exported is
what transformers itself would load.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.errors import HymaError
from hyma_mllm.stitched.mllm_config import Form
from hyma_mllm.stitched.mllm_tower import VisionPart
from hyma_mllm.zoo.llm import LanguageModel

ANSWER_TOKENS = 64
"""How many tokens `generate` writes at most where nobody says a number."""


def form_of(vision: VisionPart, llm: LanguageModel, spec: ConnectorSpec) -> Form:
    """The plainest class that computes this pair exactly."""
    head = llm.head()
    plain_head = head.bias is None and head.softcap is None and head.scale == 1.0
    # LLaVA's projector is Linear, act, Linear with the LLM's width between; a Linear is one with an identity behind.
    plain_connector = spec.depth == 0 or (spec.depth == 1 and spec.hidden == llm.width)
    return vision.reading.form if plain_head and plain_connector else "own"


def build_model(
    vision: VisionPart,
    llm: LanguageModel,
    projector: Mapping[str, Tensor],
    spec: ConnectorSpec,
    image_token: int,
    pad_token: int,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """The joined model, in eval mode; the parts are left as they are.

    Args:
        vision: the tower.
        llm: the LLM, not quantised.
        projector: state dict of the plain nn.Sequential, `0.weight` [hidden, d_in], `0.bias`, `2.weight`, ...
        spec: the projector's family; `hidden` and `activation` must be those of the state dict.
        image_token: id that stands for a vision token. Where the LLM has no row for it, rows are added.
        pad_token: id of padding.
        dtype: of all weights.

    Raises:
        HymaError: if the LLM is quantised, or its class has other parts than transformers builds from its config.
    """
    if any(not parameter.is_floating_point() for parameter in llm.model.parameters()):
        raise HymaError(f"{llm.card.id} is quantised and cannot be exported; load it without quantisation.")
    form = form_of(vision, llm, spec)
    rows = max(llm.vocabulary, llm.model.get_input_embeddings().weight.shape[0], image_token + 1)
    state = {f"model.vision_tower.{name}": tensor for name, tensor in _tower_state(vision.model).items()}
    state |= _projector_state(projector, spec, llm.width, form)
    state |= _llm_state(llm, rows, bias=llm.head().bias is not None)
    config = _config(form, vision, llm, spec, image_token, rows)
    state = {name: tensor.detach().cpu() for name, tensor in state.items()}
    model_class = _model_class(form)
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    unfit = sorted([*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])])
    if unfit:
        raise HymaError(
            f"{llm.card.id} and {vision.model.config.model_type} do not fit {model_class.__name__}: {unfit[0]} and "
            f"{len(unfit) - 1} other weights have no place; choose another tower or LLM to export."
        )
    model.generation_config = GenerationConfig(
        # Greedy, without the repetition penalty that some LLMs bring along: what the search measured.
        do_sample=False,
        max_new_tokens=ANSWER_TOKENS,
        bos_token_id=llm.tokenizer.bos_token_id,
        eos_token_id=list(llm.end_ids),
        pad_token_id=pad_token,
        suppress_tokens=sorted({image_token, *llm.banned_ids}),
    )
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    return frozen


def _model_class(form: Form) -> Any:
    if form == "own":
        from hyma_mllm.stitched.mllm_own import HymaMLLMForConditionalGeneration

        return HymaMLLMForConditionalGeneration
    return LlavaForConditionalGeneration if form == "llava" else FastVlmForConditionalGeneration


def _config(
    form: Form, vision: VisionPart, llm: LanguageModel, spec: ConnectorSpec, image_token: int, rows: int
) -> PreTrainedConfig:
    """The config of the joined model, with clean copies of the configs of its parts."""
    text = _clean(llm.model.get_decoder().config)
    text.vocab_size = rows
    # Llava reads the tie from here and from there; a LLaVA head is tied when the LLM's is.
    text.tie_word_embeddings = _is_tied(llm)
    layers = vision.reading.layers
    options: dict[str, Any] = {
        "vision_config": _clean(vision.model.config),
        "text_config": text,
        "image_token_index": image_token,
        "image_seq_length": vision.card.tokens,
        "projector_hidden_act": "linear" if spec.depth == 0 else spec.activation,
        "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
        "vision_feature_select_strategy": vision.reading.strategy,
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    if form == "llava":
        return LlavaConfig(**options)
    if form == "fastvlm":
        return FastVlmConfig(**options)
    from hyma_mllm.stitched.mllm_own import HymaMLLMConfig

    head = llm.head()
    own = {
        "projector_hidden_act": spec.activation,
        "tower": asdict(vision.card),
        "tower_reading": asdict(vision.reading),
        "connector_depth": spec.depth,
        "connector_hidden": spec.hidden,
        "head_bias": head.bias is not None,
        "logit_softcap": head.softcap,
        "logit_scale": head.scale,
    }
    return HymaMLLMConfig(**options | own)


def _clean(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy without where the weights lay and how they were packed."""
    config = copy.deepcopy(config)
    config._name_or_path = ""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _is_tied(llm: LanguageModel) -> bool:
    embeddings: Tensor = llm.model.get_input_embeddings().weight
    return embeddings.data_ptr() == llm.head().weight.data_ptr()


def _tower_state(tower: PreTrainedModel) -> dict[str, Tensor]:
    """The tower's weights, and zeros for a pooling layer that it lacks and LLaVA builds but never reads."""
    state: dict[str, Tensor] = tower.state_dict()
    with torch.device("meta"):
        wanted = AutoModel.from_config(tower.config).state_dict()
    for name, tensor in wanted.items():
        if name not in state and name.startswith("pooler."):
            state[name] = torch.zeros(tensor.shape)
    return state


def _projector_state(projector: Mapping[str, Tensor], spec: ConnectorSpec, width: int, form: Form) -> dict[str, Tensor]:
    """The connector under the names of the target class; a Linear gets the identity behind it."""
    names = {f"{2 * n}.{kind}" for n in range(spec.depth + 1) for kind in ("weight", "bias")}
    if set(projector) != names:
        raise ValueError(f"a {spec.name} connector has {sorted(names)}, not {sorted(projector)}")
    prefix = "model.multi_modal_projector."
    if form == "own":
        return {prefix + name: tensor for name, tensor in projector.items()}
    state = {f"{prefix}linear_1.{kind}": projector[f"0.{kind}"] for kind in ("weight", "bias")}
    if spec.depth == 0:
        second = {"weight": torch.eye(width), "bias": torch.zeros(width)}
    else:
        second = {kind: projector[f"2.{kind}"] for kind in ("weight", "bias")}
    return state | {f"{prefix}linear_2.{kind}": tensor for kind, tensor in second.items()}


def _llm_state(llm: LanguageModel, rows: int, bias: bool) -> dict[str, Tensor]:
    """Decoder and head under LLaVA's names, the vocabulary grown to `rows`."""
    decoder = llm.model.get_decoder()
    embeddings = decoder.get_input_embeddings().weight
    state = {}
    for name, tensor in decoder.state_dict().items():
        same = tensor.data_ptr() == embeddings.data_ptr() and tensor.shape == embeddings.shape
        state[f"model.language_model.{name}"] = grown(tensor, rows) if same else tensor
    if not _is_tied(llm):
        state["lm_head.weight"] = grown(llm.head().weight, rows)
    head_bias = llm.head().bias
    if bias and head_bias is not None:
        state["lm_head.bias"] = grown(head_bias, rows)
    return state


def grown(tensor: Tensor, rows: int) -> Tensor:
    """`tensor` [vocabulary, ...] with rows added up to `rows`, each the mean of those that were there.

    The logit of a mean row is the mean logit, and exp(mean) <= mean(exp) (Jensen), so the added token is never more
    likely than one in the vocabulary's size and never the most likely one: the other logits keep their meaning.
    """
    missing = rows - tensor.shape[0]
    if missing <= 0:
        return tensor
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(missing, *tensor.shape[1:])])

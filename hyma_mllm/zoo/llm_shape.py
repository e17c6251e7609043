"""The sizes of an LLM, before its weights are loaded: what its memory and its FLOPs can be reckoned from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig

from hyma_mllm.zoo.cards import ModelCard, scheme_and_address
from hyma_mllm.zoo.llm_gguf import gguf_folder
from hyma_mllm.zoo.packaged_llm import packaged_llm_folder

USUAL_VOCABULARY = 64_000
"""Words of an LLM of which only width and number of weights are known."""


@dataclass(frozen=True)
class LLMShape:
    """The sizes of an LLM.

    Attributes:
        layers: of the decoder.
        width: of its embeddings.
        inner: width of the MLP between its two sides.
        heads_width: of all queries together.
        kv_width: of all keys together.
        vocabulary: words.
        parameters: all weights.
        embeddings: weights of input embeddings and head, once where they are one.
        estimated: whether layers, widths and vocabulary are guessed from width and parameters.
    """

    layers: int
    width: int
    inner: int
    heads_width: int
    kv_width: int
    vocabulary: int
    parameters: int
    embeddings: int
    estimated: bool = False

    @property
    def body(self) -> int:
        """Weights of the layers."""
        return max(self.parameters - self.embeddings, 0)


def llm_shape(card: ModelCard) -> LLMShape:
    """The sizes of an LLM: from its config.json where that is here, else guessed from what its card says."""
    folder = _config_folder(card)
    if folder is None:
        return guessed_shape(card.width, card.parameters)
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    words = config.vocab_size * config.hidden_size
    return LLMShape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        heads_width=heads * head,
        kv_width=(getattr(config, "num_key_value_heads", None) or heads) * head,
        vocabulary=config.vocab_size,
        parameters=card.parameters,
        embeddings=words if config.tie_word_embeddings else 2 * words,
    )


def guessed_shape(width: int, parameters: int) -> LLMShape:
    """The sizes of a usual LLM of this width: 12 width² weights a layer, a quarter of the heads for keys and values."""
    embeddings = min(USUAL_VOCABULARY * width, parameters // 2)
    layers = max(round((parameters - embeddings) / (12 * width**2)), 1)
    return LLMShape(
        layers, width, 4 * width, width, max(width // 4, 1), embeddings // width, parameters, embeddings, True
    )


def _config_folder(card: ModelCard) -> Path | None:
    """The directory of the model's config.json, None where it has not been fetched or converted."""
    scheme, address = scheme_and_address(card.id, ("hf", "gguf"))
    if scheme == "hf":
        local = Path(address).expanduser()
        if local.is_dir():
            return local
        found = try_to_load_from_cache(address, "config.json", revision=card.revision)
        return Path(found).parent if isinstance(found, str) else None
    folder = gguf_folder(card.revision) if scheme == "gguf" else packaged_llm_folder(address)
    return folder if (folder / "config.json").is_file() else None

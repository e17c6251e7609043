"""LLMs by name: packaged ones, any causal LM in a directory or on the hub, and GGUF files."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.foreign import UNREADABLE, reason
from hyma_mllm.zoo.cards import ModelCard, scheme_and_address
from hyma_mllm.zoo.llm_attention import widen_attention
from hyma_mllm.zoo.llm_gguf import convert_gguf, gguf_card, gguf_folder
from hyma_mllm.zoo.llm_model import Head, LanguageModel
from hyma_mllm.zoo.llm_norm import lean_norms
from hyma_mllm.zoo.llm_prefix import Prefix
from hyma_mllm.zoo.llm_quantise import close_repacking, quantisation_config
from hyma_mllm.zoo.llm_widen import narrow
from hyma_mllm.zoo.packaged_llm import LLM_CARDS, convert_packaged_llm, packaged_llm_folder
from hyma_mllm.zoo.text_places import TextPlace, find_place

__all__ = [
    "DEFAULT_LLM_IDS",
    "LLM_CARDS",
    "Head",
    "LanguageModel",
    "Prefix",
    "Quantisation",
    "llm_card",
    "llm_on_disk",
    "load_llm",
    "load_tokenizer",
]

logger = logging.getLogger("hyma_mllm")

Quantisation = Literal["none", "bf16", "int8", "nf4"]
DEFAULT_LLM_IDS = ("smollm2-135m", "qwen2.5-coder-0.5b")

SCHEMES = ("hf", "gguf")
_WANTED = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
_UNWANTED = ["original/*", "consolidated*"]  # the same weights once more, in other layouts


def llm_card(name: str) -> ModelCard:
    """The card of an LLM, without its weights being loaded.

    Args:
        name: a built-in id; `hf:` and the directory or hub id of a causal LM; `gguf:` and a GGUF file. `NAME#2` is
            the same model once more, under that id, as a control.

    Raises:
        HymaError: there is no such model, or it cannot be read.
    """
    scheme, address = scheme_and_address(name, SCHEMES)
    if not scheme and address in LLM_CARDS:
        return replace(LLM_CARDS[address], id=name)
    if not scheme or not address:
        raise HymaError(
            f"There is no LLM {name}; {near_names(address, LLM_CARDS)}, or write hf: before a model's directory or hub "
            "id, or gguf: before a GGUF file."
        )
    if scheme == "gguf":
        return gguf_card(name, Path(address).expanduser())
    place = find_place(name, address)
    return ModelCard(
        id=name,
        kind="llm",
        source=place.address if Path(address).expanduser().is_dir() else f"Hugging Face hub, {address}",
        revision=place.revision,
        width=_width(name, place),
        parameters=place.parameters(),
        licence="see the model's own card",
        origin=address,
    )


def llm_on_disk(card: ModelCard) -> bool:
    """Whether the LLM loads without a download."""
    scheme, address = scheme_and_address(card.id, SCHEMES)
    if not scheme:
        return packaged_llm_folder(address).is_dir()
    path = Path(address).expanduser()
    if scheme == "gguf":
        return path.is_file() or gguf_folder(card.revision).is_dir()
    if path.is_dir():
        return True
    config = huggingface_hub.try_to_load_from_cache(address, "config.json", revision=card.revision)
    return isinstance(config, str) and any(Path(config).parent.rglob("*.safetensors"))


def load_tokenizer(card: ModelCard, accepted_terms: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer, always with a padding token; its chat template is None where the model has none.

    A tokenizer without a padding token gets its end token as one (else its unknown token): nothing is added to the
    vocabulary, and padding is told by masks, never by the id.

    Raises:
        HymaError: it cannot be fetched or read, has neither token, or terms must be accepted before the fetch.
    """
    if not llm_on_disk(card):
        check_terms(card, accepted_terms)
    folder = _folder(card)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except UNREADABLE as error:
        raise _unreadable(card, folder, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise HymaError(f"The tokenizer of {card.id} has no padding, end or unknown token; name one in {folder}.")
    return tokenizer


def load_llm(
    card: ModelCard | str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    quantisation: Quantisation = "none",
    accepted_terms: Sequence[str] = (),
    checkpointing: bool = False,
) -> LanguageModel:
    """The frozen LLM on `device`.

    Args:
        card: what `llm_card` takes, or its answer.
        device: where it computes.
        dtype: of its weights and of what it returns.
        quantisation: `int8` or `nf4` keep its linear layers in 8 or 4 bits by bitsandbytes, `bf16` keeps them and the
            embeddings in 16 bits; all compute in `dtype`. `bf16` is exact for an LLM that was published in it.
        accepted_terms: names of terms that the user accepts, e.g. `gemma`.
        checkpointing: recompute each layer in the backward pass instead of keeping its activations.

    Raises:
        HymaError: terms are not accepted, bitsandbytes is missing, or the model cannot be fetched, loaded or read.
    """
    card = llm_card(card) if isinstance(card, str) else card
    check_terms(card, accepted_terms)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if quantisation in ("int8", "nf4"):
        options |= {"quantization_config": quantisation_config(quantisation, dtype), "device_map": {"": str(device)}}
    folder = _folder(card)
    tokenizer = load_tokenizer(card, accepted_terms)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    except UNREADABLE as error:
        raise _unreadable(card, folder, error) from error
    model = model.to(device) if quantisation in ("none", "bf16") else close_repacking(model)
    if quantisation == "bf16":
        model = narrow(model)
    if dtype == torch.bfloat16 and torch.device(device).type == "cpu":
        model = widen_attention(model)
    llm = LanguageModel(card, lean_norms(model), tokenizer, checkpointing)
    if llm.width != card.width:
        raise HymaError(f"{card.id} takes embeddings of width {llm.width} but its card says {card.width}.")
    _check_reading(llm)
    return llm


def check_terms(card: ModelCard, accepted_terms: Sequence[str]) -> None:
    """Refuse a model whose terms were not accepted.

    Raises:
        HymaError: the card names terms that `accepted_terms` lacks.
    """
    if card.terms is not None and card.terms not in accepted_terms:
        raise HymaError(
            f"{card.id} comes under terms of its own ({card.licence}); read them, then say --accept-terms {card.terms}."
        )


@torch.no_grad()
def _check_reading(llm: LanguageModel) -> None:
    """Compare our reading (embeddings, prefix, head) with the model's own logits, once, on four tokens.

    An architecture with a head or a state that we do not know would otherwise train and answer wrongly in silence.
    """
    model: PreTrainedModel = llm.model
    words = min(len(llm.tokenizer), llm.vocabulary)
    ids = torch.linspace(0, words - 1, 6, device=model.device).long()[1:5]
    expected = model(input_ids=ids[None], use_cache=False).logits.float()[:, 2:]
    embeddings = llm.embed(ids[None, 2:])
    mask = torch.ones(1, 2, dtype=torch.bool, device=model.device)
    found = llm.logits(llm.hidden(embeddings, mask, llm.prefix(ids[:2])))
    error = float((found - expected).norm() / expected.norm())
    if not error < 0.1:  # bfloat16 and 4 bits stay well below, a forgotten factor does not
        raise HymaError(
            f"{card_words(llm)} is not read correctly (logits differ by {error:.0%}): its architecture needs more than "
            "embeddings, keys, values and a linear head; choose another LLM."
        )


def card_words(llm: LanguageModel) -> str:
    """The LLM's id and architecture, for a message."""
    return f"{llm.card.id} ({type(llm.model).__name__})"


def _folder(card: ModelCard) -> Path:
    """The local transformers directory of the model, fetched and converted if need be."""
    scheme, address = scheme_and_address(card.id, SCHEMES)
    if not scheme:
        return convert_packaged_llm(address)
    path = Path(address).expanduser()
    if scheme == "gguf":
        return convert_gguf(path, card.revision)
    return path if path.is_dir() else _snapshot(card, address)


def _snapshot(card: ModelCard, repository: str) -> Path:
    """Configs, tokenizer, chat template and safetensors of a hub repository; no code, no pickles."""
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=card.revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
            )
        )
    except (HTTPError, OSError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise HymaError(f"{card.id} could not be fetched ({said}); check the network.") from error


def _width(name: str, place: TextPlace) -> int:
    where = {} if place.local else {"revision": place.revision}
    try:
        config = AutoConfig.from_pretrained(place.address, trust_remote_code=False, **where)
    except UNREADABLE as error:
        raise HymaError(f"{place.address} has no config.json that transformers understands: {reason(error)}") from error
    width = getattr(config.get_text_config(), "hidden_size", None)
    if config.is_encoder_decoder or not isinstance(width, int):
        raise HymaError(f"{name} is a {config.model_type} model and not a causal LLM; choose one that writes text.")
    return width


def _unreadable(card: ModelCard, folder: Path, error: Exception) -> HymaError:
    return HymaError(f"{card.id} cannot be loaded from {folder}: {reason(error)}")

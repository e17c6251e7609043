"""Text encoders: sentences in, one vector each out; frozen, and always a sentence-transformers model inside."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
import torch
from torch import Tensor, nn

from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.foreign import UNREADABLE, reason
from hyma_mllm.zoo.cards import ModelCard, scheme_and_address
from hyma_mllm.zoo.packaged_text import TEXT_CARDS, convert_packaged, packaged_folder
from hyma_mllm.zoo.text_places import fetch_snapshot, find_place

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["TEXT_CARDS", "TextEncoder", "load_text_encoder", "text_card", "text_on_disk"]

logger = logging.getLogger("hyma_mllm")

SCHEMES = ("st", "hf")


class TextEncoder(nn.Module):
    """A frozen text encoder.

    Attributes:
        card: what it is.
    """

    def __init__(self, card: ModelCard, model: "SentenceTransformer") -> None:
        super().__init__()
        self.card = card
        self.model = model.eval().requires_grad_(False)

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """One vector for each text: just what the sentence-transformers model gives, its own prompt included.

        Rows have unit length where the model ends in a Normalize module, as every built-in one does; `hf:` models do
        not. A text longer than the model takes is cut at its end, and a warning counts such texts.

        Args:
            texts: [batch] sentences, not empty.
            batch_size: texts to a forward pass.

        Returns:
            [batch, width] float32, on the model's device.

        Raises:
            TypeError: `texts` is one string.
        """
        if isinstance(texts, str):
            raise TypeError("texts is a sequence of strings, not one string")
        if not texts:
            return torch.empty(0, self.card.width, device=self.model.device)
        self._warn_of_long(texts)
        vectors: Tensor = self.model.encode(
            list(texts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return vectors.float()

    def sentence_transformer(self) -> "SentenceTransformer":
        """The live model, e.g. to save its modules in a model that is stitched together."""
        return self.model

    def train(self, mode: bool = True) -> "TextEncoder":
        """Stays in eval mode, whatever the module around it does."""
        return super().train(False)

    def _warn_of_long(self, texts: Sequence[str]) -> None:
        longest = self.model.max_seq_length
        if longest is None:
            return
        # A token is at least one character, so only these can be too long.
        prompt = self.model.prompts.get(self.model.default_prompt_name or "", "")
        doubtful = [prompt + text for text in texts if len(prompt) + len(text) > longest - 2]
        if doubtful:
            tokens = self.model.tokenizer(doubtful, truncation=False, verbose=False)["input_ids"]
            cut = sum(len(ids) > longest for ids in tokens)
            if cut:
                logger.warning(
                    "%s cut %d of %d texts at its limit of %d tokens", self.card.id, cut, len(texts), longest
                )


def text_card(name: str) -> ModelCard:
    """The card of a text encoder, without its weights being loaded.

    Args:
        name: a built-in id; `st:` and the directory or hub id of a sentence-transformers model; `hf:` and that of a
            transformers model, whose last hidden states are averaged. `NAME#2` is the same model once more, under
            that id, as a control.

    Raises:
        HymaError: there is no such model, or it cannot be read.
    """
    scheme, address = scheme_and_address(name, SCHEMES)
    if address in TEXT_CARDS and not scheme:
        return replace(TEXT_CARDS[address], id=name)
    if not scheme or not address:
        raise HymaError(
            f"There is no text encoder {name}; {near_names(address, TEXT_CARDS)}, or write st: or hf: before a model's "
            "directory or hub id."
        )
    place = find_place(name, address)
    return ModelCard(
        id=name,
        kind="text",
        source=place.address if Path(address).expanduser().is_dir() else f"Hugging Face hub, {address}",
        revision=place.revision,
        width=place.sentence_width() if scheme == "st" else place.hidden_size(),
        parameters=place.parameters(),
        licence="see the model's own card",
        origin=address,
    )


def text_on_disk(card: ModelCard) -> bool:
    """Whether the encoder loads without a download."""
    scheme, address = scheme_and_address(card.id, SCHEMES)
    if not scheme:
        return packaged_folder(address).is_dir()
    if Path(address).expanduser().is_dir():
        return True
    config = huggingface_hub.try_to_load_from_cache(address, "config.json", revision=card.revision)
    return isinstance(config, str) and any(Path(config).parent.rglob("*.safetensors"))


def load_text_encoder(
    name: str | ModelCard, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """The frozen encoder on `device`, computing in `dtype`.

    Args:
        name: what `text_card` takes, or its answer.
        device: where it computes.
        dtype: of its weights; what it returns is float32 always.

    Raises:
        HymaError: there is no such model, it cannot be fetched or read, or its vectors are not as wide as its card
            says.
    """
    card = text_card(name) if isinstance(name, str) else name
    folder = _folder(card)
    try:
        model = _load(card, folder)
    except UNREADABLE as error:
        raise HymaError(f"{card.id} cannot be loaded from {folder}: {reason(error)}") from error
    encoder = TextEncoder(card, model.to(device=device, dtype=dtype))
    width = encoder.encode(["width"]).shape[1]
    if width != card.width:
        raise HymaError(f"{card.id} gives vectors of width {width} but its card says {card.width}; mend {folder}.")
    return encoder


def _folder(card: ModelCard) -> Path:
    """The local directory of the model, fetched if need be."""
    scheme, address = scheme_and_address(card.id, SCHEMES)
    if not scheme:
        return convert_packaged(address)
    path = Path(address).expanduser()
    return path if path.is_dir() else fetch_snapshot(card.id, address, card.revision)


def _load(card: ModelCard, folder: Path) -> "SentenceTransformer":
    # Imported here because it takes seconds, which `--help` and `--dry-run` need not pay.
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    if scheme_and_address(card.id, SCHEMES)[0] != "hf":
        return SentenceTransformer(str(folder), device="cpu", local_files_only=True, trust_remote_code=False)
    words = Transformer(str(folder))
    if words.tokenizer.pad_token is None:  # padding is masked out, so any token will do
        words.tokenizer.pad_token = words.tokenizer.eos_token
    return SentenceTransformer(modules=[words, Pooling(card.width, pooling_mode="mean")], device="cpu")

"""StitchedVLM: the winning pair as a model that one can use, save and load without the search that found it."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from hyma_mllm.data.class_sets import PLAIN_TEMPLATES, ClassSet
from hyma_mllm.data.pictures import BadPicture, open_picture
from hyma_mllm.data.standardise import Standardiser
from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import UNREADABLE, reason
from hyma_mllm.metrics.zero_shot import class_embeddings
from hyma_mllm.paths import write_text
from hyma_mllm.stitched.config import FILE_NAME, StitchedConfig
from hyma_mllm.stitched.directory import atomic_directory
from hyma_mllm.stitched.model_card import model_card
from hyma_mllm.stitched.sentence_transformers_export import connector_of, with_connector
from hyma_mllm.zoo.cards import ModelCard, base_id
from hyma_mllm.zoo.text import TextEncoder
from hyma_mllm.zoo.vision import VisionEncoder, image_card, load_image_encoder

Picture = Image.Image | Path

SCALE = 100.0
"""Cosines are multiplied by it before the softmax, as in training (arXiv 2507.10015)."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


class StitchedVLM(nn.Module):
    """A frozen image encoder and a frozen text encoder, joined by a connector from text to image features.

    Attributes:
        image_encoder: pooled features [batch, d_image] of pictures.
        image_standardiser: what these go through before they are compared; ends in an L2 norm.
        text: sentences -> unit rows [batch, d_image]; holds the connector.
        config: ids, revisions, scores, credits.
    """

    def __init__(
        self,
        image_encoder: VisionEncoder,
        image_standardiser: Standardiser,
        text: SentenceTransformer,
        config: StitchedConfig,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.image_standardiser = image_standardiser
        self.text = text
        self.config = config
        self._image_key = _encoder_card(image_encoder, config.vision_id).id
        self.eval().requires_grad_(False)

    @classmethod
    def from_parts(
        cls,
        image_encoder: VisionEncoder,
        text_encoder: TextEncoder,
        connector: nn.Sequential,
        image_standardiser: Standardiser,
        config: StitchedConfig,
    ) -> "StitchedVLM":
        """Join the parts of one pair.

        Args:
            image_encoder: has the model `config.vision_id` among its cards.
            text_encoder: [batch, d_text] features of sentences.
            connector: Linear, activation, ..., Linear; [batch, d_text] -> [batch, d_image]. It reads the L2-normalised
                text feature: fold the text standardiser into its first Linear beforehand. Its weights are copied.
            image_standardiser: of width d_image, `unit=True`.
            config: describes the same parts.

        Raises:
            ValueError: if the widths of the parts differ.
        """
        weights = [tensor for name, tensor in connector.state_dict().items() if name.endswith("weight")]
        shape = (weights[0].shape[1], weights[-1].shape[0])
        if shape != config.shape or image_standardiser.mean.shape != (shape[1],):
            raise ValueError(f"a connector of shape {shape} does not join models of widths {config.shape}")
        if not image_standardiser.unit:
            raise ValueError("the image standardiser must end in an L2 norm")
        return cls(
            image_encoder, image_standardiser, with_connector(text_encoder.sentence_transformer(), connector), config
        )

    @property
    def connector(self) -> nn.Sequential:
        """The connector, sharing its weights; L2-normalised text features [batch, d_text] -> [batch, d_image]."""
        return connector_of(self.text)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.image_standardiser.mean.device

    @torch.inference_mode()
    def encode_image(self, pictures: Sequence[Picture], batch_size: int = 32) -> Tensor:
        """Unit rows [len(pictures), d_image], float32, on the model's device.

        Args:
            pictures: PIL pictures or paths; each is brought to RGB, transparency on white.
            batch_size: pictures that are open at a time.

        Raises:
            HymaError: if a file is no readable picture.
        """
        rows = [torch.empty(0, self.config.shape[1], device=self.device)]
        for start in range(0, len(pictures), batch_size):
            batch = [self.image_encoder.transform(_rgb(picture)) for picture in pictures[start : start + batch_size]]
            pooled = self.image_encoder.pooled(torch.stack(batch).to(self.device))[self._image_key]
            rows.append(self.image_standardiser(pooled.float()))
        return torch.cat(rows)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """Unit rows [len(texts), d_image], float32, in the space of the pictures, on the model's device.

        Args:
            texts: sentences; the prompt of the text encoder (e.g. e5's "query: ") is put before each.
            batch_size: sentences at a time.

        Raises:
            HymaError: if `texts` is one string instead of a sequence of them.
        """
        if isinstance(texts, str):
            raise HymaError(f"encode_text wants a list of texts, not the one text {texts!r}; write [{texts!r}].")
        if not texts:
            return torch.empty(0, self.config.shape[1], device=self.device)
        encoded = self.text.encode(list(texts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)
        return F.normalize(encoded.float(), dim=-1)

    def class_embeddings(self, labels: Sequence[str], templates: Sequence[str] = PLAIN_TEMPLATES) -> Tensor:
        """Unit rows [len(labels), d_image]: the mean over the templates of each label's prompts, normalised again.

        Args:
            labels: class names, distinct.
            templates: each holds `{}` where the class name goes.

        Raises:
            HymaError: if there is no label or template, a label is given twice, or a template is without `{}`.
        """
        _check_labels(labels, templates)
        prompts = [prompt for group in ClassSet("", tuple(labels), tuple(templates)).prompts() for prompt in group]
        return class_embeddings(self.encode_text(prompts), len(templates))

    def classify(
        self, pictures: Sequence[Picture], labels: Sequence[str], templates: Sequence[str] = PLAIN_TEMPLATES
    ) -> list[dict[str, float]]:
        """Zero-shot probabilities of the labels, for each picture a dict in the order of `labels` that sums to 1.

        Args:
            pictures: PIL pictures or paths.
            labels: class names, distinct.
            templates: each holds `{}` where the class name goes.

        Raises:
            HymaError: as `encode_image` and `class_embeddings` do.
        """
        classes = self.class_embeddings(labels, templates)
        probabilities = (SCALE * self.encode_image(pictures) @ classes.T).softmax(-1)
        return [dict(zip(labels, row, strict=True)) for row in probabilities.tolist()]

    def save_pretrained(self, directory: Path | str) -> None:
        """Write the model to a directory, in one step; an older stitched model there is replaced.

        The image encoder is written by its id and revision, not by its weights.

        Raises:
            HymaError: if the directory holds something else.
        """
        with atomic_directory(Path(directory), replaceable=FILE_NAME) as temporary:
            save_file(_plain(self.connector), temporary / "connector.safetensors")
            save_file(_plain(self.image_standardiser), temporary / "image_standardiser.safetensors")
            self.text.save_pretrained(str(temporary / "text"), create_model_card=False)
            write_text(temporary / "README.md", model_card(self.config))
            write_text(temporary / FILE_NAME, self.config.to_json())

    @classmethod
    def from_pretrained(cls, directory: Path | str, device: str | torch.device = "cpu") -> "StitchedVLM":
        """Load what `save_pretrained` wrote; the image encoder is fetched by its id where it is not cached.

        Args:
            directory: e.g. `runs/vlm/best`.
            device: where the model shall compute.

        Raises:
            HymaError: if the directory is no stitched model, a file of it is missing or damaged, or the image encoder
                that its id names today has another revision than the one it was trained with.
        """
        directory = Path(directory)
        config = StitchedConfig.read(directory)
        standardiser = Standardiser(config.shape[1])
        _load(standardiser, directory / "image_standardiser.safetensors")
        if not (directory / "text" / "modules.json").is_file():
            raise HymaError(f"{directory / 'text'} is no sentence-transformers directory; export the model again.")
        try:
            text = SentenceTransformer(
                str(directory / "text"), device="cpu", local_files_only=True, trust_remote_code=False
            )
        except UNREADABLE as error:
            raise HymaError(f"{directory / 'text'} is damaged ({reason(error)}); export the model again.") from error
        _check_connector(text, directory / "connector.safetensors")
        found = image_card(config.vision_id)
        if found.revision != config.vision.revision:
            raise HymaError(
                f"{directory} was stitched to {config.vision_id} at revision {config.vision.revision}, but what is "
                f"loaded now has revision {found.revision}; fetch the old revision or run the search again."
            )
        return cls(load_image_encoder(found, device=device), standardiser, text, config).to(device)


def _rgb(picture: Picture) -> Image.Image:
    """A picture as the encoders want it; one that is already in memory takes the same way as a file."""
    if isinstance(picture, Path):
        try:
            return open_picture(picture)
        except BadPicture as error:
            raise HymaError(f"{picture} is refused ({error.reason}); leave it out or mend it.") from error
    if picture.mode == "RGB" and not picture.has_transparency_data:
        return picture
    encoded = io.BytesIO()
    (picture if picture.mode in _PNG_MODES else picture.convert("RGB")).save(encoded, "PNG")
    return open_picture(encoded.getvalue())


def _encoder_card(image_encoder: VisionEncoder, vision_id: str) -> ModelCard:
    """The card of one of the features that an encoder gives; a control such as `x#2` stands for `x`."""
    for card in image_encoder.cards:
        if base_id(card.id) == vision_id:
            return card
    raise ValueError(f"the image encoder gives {', '.join(card.id for card in image_encoder.cards)}, not {vision_id}")


def _plain(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def _load(module: nn.Module, path: Path) -> None:
    """Load a safetensors file into a module, strictly."""
    try:
        module.load_state_dict(load_file(path), strict=True)
    except FileNotFoundError as error:
        raise HymaError(f"{path} is missing; export the model again.") from error
    except (SafetensorError, RuntimeError, OSError) as error:
        raise HymaError(f"{path} is damaged ({str(error).splitlines()[0]}); export the model again.") from error


def _check_connector(text: SentenceTransformer, path: Path) -> None:
    """The connector stands in two files; they must be the same one."""
    inside = connector_of(text)
    before = {name: tensor.clone() for name, tensor in inside.state_dict().items()}
    _load(inside, path)
    if any(not torch.equal(before[name], tensor) for name, tensor in inside.state_dict().items()):
        raise HymaError(f"{path} and {path.parent / 'text'} hold different connectors; export the model again.")


def _check_labels(labels: Sequence[str], templates: Sequence[str]) -> None:
    if not labels or not templates:
        raise HymaError("Classification needs at least one label and one template; give some.")
    twice = sorted({label for label in labels if list(labels).count(label) > 1})
    if twice:
        raise HymaError(f"The label {twice[0]!r} is given twice; give every class one name.")
    for template in templates:
        if "{}" not in template or set("{}") & set(template.replace("{}", "")):
            raise HymaError(f"The template {template!r} must hold {{}} for the class name and no other brace.")

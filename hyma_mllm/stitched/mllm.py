"""StitchedMLLM: the winning pair as a model that answers questions about pictures, without the search that found it.

Its directory is a plain transformers one (see `llava`); this class is the model and the processor that transformers
loads from it, and the words of `hyma.json`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, overload

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaProcessor,
    PreTrainedModel,
    TextIteratorStreamer,
)

from hyma_mllm.data.prompts import IMAGE_TOKEN, Prompter
from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import UNREADABLE, is_file, parse_json, reason
from hyma_mllm.paths import write_text
from hyma_mllm.stitched.directory import atomic_directory
from hyma_mllm.stitched.llava import build_model, form_of
from hyma_mllm.stitched.mllm_card import mllm_card
from hyma_mllm.stitched.mllm_config import FILE_NAME, MLLMConfig
from hyma_mllm.stitched.mllm_pictures import rgb
from hyma_mllm.stitched.mllm_processor import (
    agree_on_start,
    build_processor,
    check_prompts,
    messages,
    render,
    with_image_token,
)
from hyma_mllm.stitched.mllm_tower import vision_part
from hyma_mllm.zoo.llm import LanguageModel
from hyma_mllm.zoo.vision_tokens import VisionTower

Picture = Image.Image | Path

_NEEDED = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


class StitchedMLLM(nn.Module):
    """A vision tower and an LLM joined by a connector.

    Attributes:
        model: the transformers model; plain LLaVA or FastVLM where `config.form` says so.
        processor: turns pictures and conversations into its inputs.
        config: parts, scores, credits.
    """

    def __init__(self, model: PreTrainedModel, processor: LlavaProcessor, config: MLLMConfig) -> None:
        super().__init__()
        self.model: Any = model
        self.processor: Any = processor
        self.config = config
        self.eval().requires_grad_(False)

    @classmethod
    def from_parts(
        cls,
        tower: VisionTower,
        llm: LanguageModel,
        prompter: Prompter,
        projector: Mapping[str, Tensor],
        config: MLLMConfig,
        dtype: torch.dtype | None = None,
    ) -> "StitchedMLLM":
        """Join the parts of one pair.

        Args:
            tower: the vision tower.
            llm: the LLM, not quantised.
            prompter: that wrote the prompts of training.
            projector: state dict of the plain nn.Sequential of `config.connector`, from the tower's tokens as they are
                to the LLM's input embeddings: standardisation and output scale folded in.
            config: describes the same parts; its `form` is set here.
            dtype: of all weights; None takes the LLM's own.

        Raises:
            HymaError: if the LLM is quantised, the parts do not fit a class, or the exported prompts would differ from
                those of training.
            ValueError: if the projector has other layers or widths than the config and the parts.
        """
        vision = vision_part(tower)
        widths = (projector["0.weight"].shape[1], projector[f"{2 * config.connector.depth}.weight"].shape[0])
        if widths != (tower.card.width, llm.width):
            raise ValueError(f"a connector of widths {widths} does not join {tower.card.width} to {llm.width}")
        form = form_of(vision, llm, config.connector)
        tokenizer, image_token = with_image_token(llm.tokenizer)
        processor = build_processor(tokenizer, vision, prompter.chat_template, form)
        agree_on_start(processor)
        check_prompts(processor, prompter, image_token)
        dtype = dtype or llm.head().weight.dtype
        model = build_model(vision, llm, projector, config.connector, image_token, int(tokenizer.pad_token_id), dtype)
        return cls(model, processor, replace(config, form=form))

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        device: torch.device = self.model.device
        return device

    @overload
    def answer(self, image: Picture, question: str, max_new_tokens: int = 16) -> str: ...

    @overload
    def answer(self, image: Sequence[Picture], question: Sequence[str], max_new_tokens: int = 16) -> list[str]: ...

    @torch.inference_mode()
    def answer(
        self, image: Picture | Sequence[Picture], question: str | Sequence[str], max_new_tokens: int = 16
    ) -> str | list[str]:
        """The greedy answer to a question about a picture, or to several at once.

        Args:
            image: PIL picture or path, or a sequence of them; transparency is laid on white.
            question: one for each picture.
            max_new_tokens: at most so many tokens an answer.

        Raises:
            HymaError: if a picture cannot be read, a question holds the image token, or the numbers differ.
        """
        if isinstance(question, str):
            if not isinstance(image, Image.Image | Path):
                raise HymaError("One question goes with one picture; give as many questions as pictures.")
            return self.answer([image], [question], max_new_tokens)[0]
        if isinstance(image, Image.Image | Path) or len(image) != len(question):
            count = 1 if isinstance(image, Image.Image | Path) else len(image)
            raise HymaError(f"{count} pictures and {len(question)} questions do not pair; give one of each a row.")
        if not question:
            return []
        inputs = self.inputs([rgb(picture) for picture in image], [messages(_plain(words)) for words in question])
        return self._read(self.model.generate(**inputs, max_new_tokens=max_new_tokens), inputs)

    @torch.inference_mode()
    def blind_answer(self, question: Sequence[str], max_new_tokens: int = 16) -> list[str]:
        """The greedy answers of the LLM to the same prompts with the picture's tokens left out.

        Args:
            question: any number of questions.
            max_new_tokens: at most so many tokens an answer.

        Raises:
            HymaError: if a question holds the image token.
        """
        if not question:
            return []
        tokenizer, image_token = self.processor.tokenizer, self.model.config.image_token_id
        texts = [render(self.processor, messages(_plain(words))) for words in question]
        rows = [[word for word in row if word != image_token] for row in tokenizer(texts)["input_ids"]]
        inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.device)
        return self._read(self.model.generate(**inputs, max_new_tokens=max_new_tokens), inputs)

    def stream(
        self, image: Picture, question: str, turns: Sequence[tuple[str, str]] = (), max_new_tokens: int = 64
    ) -> Iterator[str]:
        """The answer in pieces, as the model writes it.

        Args:
            image: PIL picture or path; it stands in the first turn.
            question: the next one.
            turns: earlier questions and answers about the picture.
            max_new_tokens: at most so many tokens.

        Yields:
            Pieces of text, which joined are the answer.

        Raises:
            HymaError: as `answer` does.
        """
        inputs = self.inputs([rgb(image)], [conversation(turns, _plain(question))])
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[BaseException] = []

        def write() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer)
            except BaseException as error:  # handed to the reader, who would wait forever
                failed.append(error)
                streamer.end()

        thread = Thread(target=write, daemon=True)
        thread.start()
        yield from (piece for piece in streamer if piece)
        thread.join()
        if failed:
            raise failed[0]

    def inputs(self, pictures: Sequence[Image.Image], conversations: Sequence[list[dict[str, Any]]]) -> Any:
        """What the model reads, left padded, on its device.

        Args:
            pictures: RGB, one a conversation.
            conversations: each with one picture in its first user turn.
        """
        texts = [render(self.processor, conversation) for conversation in conversations]
        found = self.processor(images=list(pictures), text=texts, padding=True, return_tensors="pt")
        return found.to(self.device, self.model.dtype)

    def _read(self, ids: Tensor, inputs: Any) -> list[str]:
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self.processor.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def save_pretrained(self, directory: Path | str) -> None:
        """Write the model to a directory, in one step; an older stitched MLLM there is replaced.

        Raises:
            HymaError: if the directory holds something else, or the tokenizer reads otherwise once it is loaded again.
        """
        with atomic_directory(Path(directory), replaceable=FILE_NAME) as temporary:
            self.model.save_pretrained(temporary)
            self.processor.save_pretrained(temporary)
            write_text(temporary / "README.md", mllm_card(self.config))
            write_text(temporary / FILE_NAME, self.config.to_json())
            self._check_tokenizer(temporary)

    def _check_tokenizer(self, directory: Path) -> None:
        """Tokenizers are loaded again by the name of a class, and not every class rebuilds what was saved."""
        text = render(self.processor, messages("What is this? 1 + 1 = 2"))
        wanted = self.processor.tokenizer(text)["input_ids"]
        found = AutoProcessor.from_pretrained(directory).tokenizer(text)["input_ids"]
        if found != wanted:
            raise HymaError(
                f"The tokenizer of {self.config.llm.id} reads {text!r} otherwise once it is saved and loaded again; "
                "convert it to a fast tokenizer (tokenizer.json) that transformers can load."
            )

    @classmethod
    def from_pretrained(
        cls,
        directory: Path | str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> "StitchedMLLM":
        """Load what `save_pretrained` wrote.

        Args:
            directory: e.g. `runs/mllm/best`.
            device: where the model shall compute.
            dtype: of the weights; None takes the one that they were written in.
            options: for transformers' `from_pretrained`, e.g. a quantisation.

        Raises:
            HymaError: if the directory is not there, is no stitched MLLM, or a file of it is missing or damaged.
        """
        directory = Path(directory)
        config = MLLMConfig.read(directory)
        check_files(directory)
        if config.form == "own":
            import hyma_mllm.stitched.mllm_own  # noqa: F401  (registers the class)
        try:
            model, report = AutoModelForImageTextToText.from_pretrained(
                directory,
                dtype=dtype or "auto",
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
                use_safetensors=True,
                **options,
            )
            processor = AutoProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except torch.OutOfMemoryError as error:
            raise HymaError(f"{directory} does not fit into the device's memory; load it on the CPU.") from error
        except UNREADABLE as error:
            raise HymaError(f"{directory} is damaged ({reason(error)}); export the model again.") from error
        if report["missing_keys"]:  # transformers would go on with random ones
            lacking = sorted(report["missing_keys"])
            raise HymaError(
                f"The weights in {directory} lack {lacking[0]} and {len(lacking) - 1} others; export the model again."
            )
        model = model if options else model.to(device)
        return cls(model, processor, config)


def conversation(turns: Sequence[tuple[str, str]], question: str) -> list[dict[str, Any]]:
    """Chat messages of earlier questions and answers and the next question, the picture in the first turn.

    Args:
        turns: questions and answers.
        question: the next one.
    """
    found: list[dict[str, Any]] = []
    for number, (asked, answered) in enumerate(turns):
        found += messages(asked, picture=number == 0)
        found.append({"role": "assistant", "content": [{"type": "text", "text": answered}]})
    return found + messages(question, picture=not turns)


def check_files(directory: Path) -> None:
    """Refuse a directory that lacks a file or a shard.

    Raises:
        HymaError: naming the file.
    """
    missing = [name for name in _NEEDED if not (directory / name).is_file()]
    if not any((directory / name).is_file() for name in _WEIGHTS):
        missing.append(_WEIGHTS[0])
    index = directory / _WEIGHTS[1]
    shards = {_WEIGHTS[0]} if not index.is_file() else set()
    if index.is_file():
        try:
            shards = set(parse_json(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise HymaError(f"{index} is damaged ({reason(error)}); export the model again.") from error
        if odd := [name for name in shards if not isinstance(name, str) or name != Path(name).name]:
            raise HymaError(f"{index} names the file {odd[0]!r:.80} outside {directory}; export the model again.")
        missing += sorted(name for name in shards if not is_file(directory / name))
    if missing:
        raise HymaError(f"{directory / missing[0]} is missing; copy the whole directory or export the model again.")
    for name in shards:
        try:
            with safe_open(directory / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise HymaError(f"{directory / name} is damaged ({error}); export the model again.") from error


def _plain(question: str) -> str:
    if IMAGE_TOKEN in question:
        raise HymaError(f"The question {question!r} holds {IMAGE_TOKEN}, which stands for the picture; leave it out.")
    return question

"""The processor of a stitched MLLM: tokenizer with an image token, chat template with pictures, image processor."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import LlavaProcessor, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import AddedToken

from hyma_mllm.data.prompts import IMAGE_TOKEN, Prompter
from hyma_mllm.errors import HymaError
from hyma_mllm.stitched.mllm_config import Form
from hyma_mllm.stitched.mllm_tower import VisionPart

PROBES = ("What is this?", "Is it a\n\ncat, or  a dog?")
"""Questions on which the exported prompt is compared with the one of training."""


def with_image_token(tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedTokenizerBase, int]:
    """A copy of the tokenizer that knows `<image>` as one special token, and its id; the original stays as it is."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # what is written down comes from here
    return tokenizer, int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def build_processor(
    tokenizer: PreTrainedTokenizerBase, vision: VisionPart, template: str, form: Form
) -> LlavaProcessor:
    """A `LlavaProcessor` that writes as many image tokens as the tower gives.

    Args:
        tokenizer: with its image token.
        vision: the tower.
        template: the chat template that the prompts of training went through.
        form: the class of the exported model.
    """
    tokenizer.chat_template = template
    # The processor counts (side // patch)^2 + additional, less one under "default".
    reading, tokens = vision.reading, vision.card.tokens or 0
    patch = reading.side if form == "own" else reading.patch
    dropped = 1 if reading.strategy == "default" else 0
    return LlavaProcessor(
        image_processor=vision.processor,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=reading.strategy,
        chat_template=template,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=tokens - (reading.side // patch) ** 2 + dropped,
    )


def messages(question: str, picture: bool = True) -> list[dict[str, Any]]:
    """One user turn in the form that chat templates read, the picture first."""
    content = [{"type": "image"}] if picture else []
    return [{"role": "user", "content": [*content, {"type": "text", "text": question.strip()}]}]


def render(processor: LlavaProcessor, conversation: Sequence[dict[str, Any]]) -> str:
    """The text of a conversation up to where the answer begins, with one `<image>` a picture."""
    text: str = processor.apply_chat_template(list(conversation), add_generation_prompt=True, tokenize=False)
    return text


def agree_on_start(processor: LlavaProcessor) -> None:
    """Keep the tokenizer from putting its start token in front of the one that the template writes.

    Users of a processor render the template to text and tokenise that text, with special tokens: two start tokens.
    """
    tokenizer = processor.tokenizer
    start = tokenizer.bos_token
    if start is not None and render(processor, messages(PROBES[0])).startswith(start):
        ids = tokenizer(start)["input_ids"]
        if ids.count(tokenizer.bos_token_id) > 1:
            tokenizer.add_bos_token = False


def check_prompts(processor: LlavaProcessor, prompter: Prompter, image_token: int) -> None:
    """The exported processor must write the very ids of training: before, the picture, after.

    Raises:
        HymaError: if the ids differ on a probe, which says where.
    """
    for question in PROBES:
        text = render(processor, messages(question))
        found = [int(word) for word in processor.tokenizer(text)["input_ids"]]
        wanted = [*prompter.before, image_token, *prompter.prompt(question)]
        if found != wanted:
            place = next((n for n, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), -1)
            raise HymaError(
                f"The exported chat template of {processor.tokenizer.name_or_path} writes {len(found)} ids where "
                f"training wrote {len(wanted)}, the first difference at {place}, for the question {question!r}; "
                "give the LLM a chat template that keeps a turn's text as it is."
            )

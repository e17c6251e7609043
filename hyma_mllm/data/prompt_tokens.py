"""From text to ids and back, with the picture's token added and the control tokens out of reach of the users' text."""

import copy
import functools
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken

from hyma_mllm.data.prompt_templates import IMAGE_TOKEN
from hyma_mllm.errors import HymaError

BREAK = "\ufdd0"
"""Parts the text where no token may span; a noncharacter of Unicode, which no text for interchange holds."""


class PromptTokens:
    """A tokenizer's copy that knows the picture's token and keeps control tokens apart from text that spells them.

    Attributes:
        tokenizer: the copy; the tokenizer that was given stays as it was.
        image_id: id of the picture's token in the copy; LLMs that lack it have no embedding for it.
        control: the strings that act as control tokens: all special tokens, and other added ones that the template
            itself writes.
        control_ids: their ids, without the unknown token, which any text may contain.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
        self.image_id = int(self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        added = [token for token in self.tokenizer.added_tokens_decoder.values() if self._controls(token, template)]
        names = {IMAGE_TOKEN, *self.tokenizer.all_special_tokens, *(str(token.content) for token in added)}
        self.control = tuple(sorted(names, key=lambda name: (-len(name), name)))
        unknown = self.tokenizer.unk_token_id
        ids = self.tokenizer.convert_tokens_to_ids(list(self.control))
        self.control_ids: frozenset[int] = frozenset(ids) - {unknown, None}
        self._pattern = re.compile("|".join(map(re.escape, self.control)))
        self._anchor = functools.lru_cache(maxsize=64)(self._plain)

    @staticmethod
    def _controls(token: Any, template: str) -> bool:
        return bool(token.special or (token.content.strip() and token.content in template))

    def protect(self, text: str, where: str) -> str:
        """`text` with a `BREAK` inside every string that would be read as a control token.

        Args:
            text: a question or an answer, from outside.
            where: names model and row, for error messages.

        Raises:
            HymaError: if the text is no valid Unicode, holds `BREAK` itself, or spells a control token of one
                character.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise HymaError(
                f"The text {text[:40]!r} of {where} holds half a surrogate pair at character {error.start}; "
                "repair its encoding."
            ) from None
        if BREAK in text:
            raise HymaError(f"The text {text[:40]!r} of {where} holds the noncharacter U+FDD0; take it out.")
        while match := self._pattern.search(text):
            if len(match[0]) < 2:
                raise HymaError(
                    f"The text {text[:40]!r} of {where} holds {match[0]!r}, a control token of this model; reword it."
                )
            text = text[: match.start() + 1] + BREAK + text[match.start() + 1 :]
        return text

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _continued(self, anchor: str, text: str) -> list[int]:
        """Ids of `text` behind `anchor`, or, if the two would merge, behind the end of a line."""
        for before in (anchor, "\n"):
            head = self._anchor(before)
            joint = self._plain(before + text)
            if joint[: len(head)] == head:
                return joint[len(head) :]
        return self._plain(text)

    def behind(self, anchor: str, text: str) -> list[int]:
        """Ids of `text` as it is read behind `anchor`, whose own tokens stay as they are.

        Alone, a text would get what some tokenizers put in front of a sentence (SentencePiece's space).

        Args:
            anchor: a text, or nothing for the beginning of a sequence.
            text: may hold `BREAK`s, over which no token reaches.
        """
        first, *rest = text.split(BREAK)
        ids = list(self._continued(anchor, first))
        for piece in rest:
            ids += self._continued("\n", piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens and without white space around it."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()

    def same(self, first: str, second: str) -> bool:
        """Whether two texts are equal, or become equal by the tokenizer's own normalisation (NFC, NFKC, ...)."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        normalizer = None if backend is None else backend.normalizer
        if first == second or normalizer is None:
            return first == second
        return bool(normalizer.normalize_str(first).strip() == normalizer.normalize_str(second).strip())

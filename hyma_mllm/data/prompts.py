"""Prompts: questions and answers through an LLM's own chat template, labels on the answers and their end tokens only.

Notable: what is in front of the picture is the same for every row, so it is kept apart; prompt and answer become ids
separately, so that training reads exactly what generation will see; every row is checked (the prompt is the beginning
of the whole conversation, the labels spell the answer, an end token follows it) and one that fails is named; text that
spells a control token stays text.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from hyma_mllm.data.prompt_batches import IGNORE, Encoded, TextBatch, collate, collate_left
from hyma_mllm.data.prompt_templates import IMAGE_TOKEN, adds_bos, complete, own_template, render
from hyma_mllm.data.prompt_tokens import PromptTokens
from hyma_mllm.errors import HymaError

__all__ = [
    "IGNORE",
    "IMAGE_TOKEN",
    "SHORT_ANSWER",
    "Encoded",
    "Prompter",
    "TextBatch",
    "Turn",
    "collate",
    "collate_left",
]

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""What VQA questions end in (LLaVA-1.5, arXiv 2310.03744, section 3.2)."""


@dataclass(frozen=True)
class Turn:
    """A question, which may be empty, and its answer, which may not; white space around them is not read."""

    question: str
    answer: str


_PROBE = Turn("What is this?", "a small blue kite")


class _Part(NamedTuple):
    """One turn: ids of template and question up to where the answer begins, and of the answer with its end token."""

    prompt: list[int]
    answer: list[int]


class Prompter:
    """Conversations about one picture as one LLM reads them: `[before][image tokens][after]`.

    Attributes:
        name: of the LLM, for error messages.
        before: ids in front of the picture, shared by all rows; may be empty.
        chat_template: jinja source of the template in use (the model's own, or the plain one for base models) with
            system prompt, bos and contents in parts (`{"type": "image"}`) taken care of: what a directory exports.
        end_id: the token that ends an answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        max_length: int,
        image_tokens: int,
        system: str | None = None,
    ) -> None:
        """Checks the template on a small conversation.

        Args:
            tokenizer: of the LLM; stays as it is.
            name: of the LLM, for error messages.
            max_length: tokens of a whole sequence, before, picture and after.
            image_tokens: tokens of a picture.
            system: the system prompt; None leaves it to the template.

        Raises:
            HymaError: if the template drops or reorders a part, ends answers with no end token, or does not fit into
                `max_length` beside the picture.
        """
        self.name = name
        self._max_length = max_length
        template = own_template(tokenizer, name)
        chat_template = complete(template, system)
        self._tokens = PromptTokens(tokenizer, template)
        self.chat_template = chat_template
        bos = tokenizer.bos_token
        if adds_bos(tokenizer) and not self._render([_PROBE], answered=False).startswith(bos):
            self.chat_template = complete(template, system, bos=True)
        prompt = self._check_prompt(system)
        self._header = prompt[prompt.rfind(_PROBE.question) + len(_PROBE.question) :]
        self._gap, self._close, self._end = self._check_answer(prompt)
        self.end_id = int(self._tokens.tokenizer.convert_tokens_to_ids(self._end))
        ids = self._tokens.behind("", prompt)
        self.before = tuple(ids[: ids.index(self._tokens.image_id)])
        self._room = max_length - image_tokens - len(self.before)
        self._controls: dict[int, list[int]] = {}
        self._parts("the template's check", [_PROBE])
        least = sum(map(len, self._parts("the template's check", [Turn("", "a")])[0]))
        if least > self._room:
            raise HymaError(
                f"A picture of {image_tokens} tokens and the chat template of {name} need "
                f"{max_length - self._room + least} tokens and the maximum length is {max_length}; raise it or take "
                "fewer image tokens."
            )

    def encode(self, key: str, turns: Sequence[Turn]) -> Encoded:
        """Ids and labels of a conversation.

        What is too long loses the tails of its questions first (the last turn's first; `SHORT_ANSWER` is kept as long
        as possible), then those of its answers, of each of which at least one token and the end token stay.

        Args:
            key: of the row, for error messages.
            turns: at least one.

        Raises:
            HymaError: if an answer is empty or alone longer than the maximum length, or the row does not come back
                from its own labels.
        """
        turns = [Turn(turn.question.strip(), turn.answer.strip()) for turn in turns]
        if not turns:
            raise HymaError(f"Row {key} has no question and no answer; give it at least one turn.")
        for number, turn in enumerate(turns, 1):
            if not turn.answer:
                raise HymaError(f"Row {key} has an empty answer in turn {number}; leave it out or give it one.")
        parts = self._parts(key, turns)
        total = _length(parts)
        if total > self._room:
            parts = self._shortened(key, turns, parts)
        after, labels = list[int](), list[int]()
        for part in parts:
            after += part.prompt + part.answer
            labels += [IGNORE] * len(part.prompt) + part.answer
        return Encoded(tuple(after), tuple(labels), total - len(after))

    def prompt(self, question: str) -> tuple[int, ...]:
        """`after` up to where the answer begins; what `encode` puts in front of its first label if it cuts nothing.

        Raises:
            HymaError: if it leaves no room for an answer.
        """
        text = self._tokens.protect(question.strip(), f"a question to {self.name}")
        ids = self._first(f"of the question {question[:40]!r}", self._render([Turn(text, "")], answered=False))
        if len(ids) + 2 > self._room:
            raise HymaError(
                f"The question {question[:40]!r} takes {len(ids)} tokens with the chat template of {self.name}, which "
                f"leaves no room for an answer within {self._max_length}; shorten it or raise the maximum length."
            )
        return tuple(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The answer that `ids` spell, without special tokens and without white space around it."""
        return self._tokens.decode(ids)

    def _render(self, turns: Sequence[Turn], answered: bool) -> str:
        """The conversation's text, the last answer left to be given unless `answered`."""
        messages = list[dict[str, str]]()
        for number, turn in enumerate(turns):
            picture = "" if number else f"{IMAGE_TOKEN}\n"
            messages += [{"role": "user", "content": picture + turn.question}]
            messages += [{"role": "assistant", "content": turn.answer}]
        if not answered:
            messages.pop()
        return render(self._tokens.tokenizer, self.chat_template, messages, not answered, self.name)

    def _check_prompt(self, system: str | None) -> str:
        """The small conversation's prompt, once system prompt, picture and question stand in it in this order."""
        prompt = self._render([_PROBE], answered=False)
        if prompt.count(IMAGE_TOKEN) != 1:
            raise HymaError(
                f"The chat template of {self.name} writes the picture {prompt.count(IMAGE_TOKEN)} times instead of "
                "once; correct the template."
            )
        before, after = prompt.split(IMAGE_TOKEN)
        if system is not None and system.strip() not in before:
            raise HymaError(
                f"The chat template of {self.name} drops the system prompt {system[:40]!r} or puts it behind the "
                "picture; leave it out or correct the template."
            )
        if _PROBE.question not in after:
            raise HymaError(
                f"The chat template of {self.name} drops the question or puts it in front of the picture; correct "
                "the template."
            )
        return prompt

    def _check_answer(self, prompt: str) -> tuple[str, str, str]:
        """The text between a prompt and its answer, what closes the answer, and the end token with which that ends."""
        full = self._render([_PROBE], answered=True)
        if not full.startswith(prompt):
            raise HymaError(
                f"The chat template of {self.name} reorders or rewrites turns: the prompt is not the beginning of the "
                "whole conversation; correct the template."
            )
        gap, answer, closing = full[len(prompt) :].partition(_PROBE.answer)
        if not answer or gap.strip():
            what = f"puts {gap.strip()[:40]!r} in front of" if answer else "drops or changes"
            raise HymaError(f"The chat template of {self.name} {what} the answer; correct the template.")
        text = closing.lstrip()
        end = next((token for token in self._tokens.control if text.startswith(token)), None)
        if end is None:
            raise HymaError(
                f"The chat template of {self.name} puts {closing[:20]!r} and no end token behind an answer; let it "
                "write eos_token there."
            )
        return gap, closing[: len(closing) - len(text)] + end, end

    def _parts(self, key: str, turns: Sequence[Turn]) -> list[_Part]:
        """The turns' ids, checked; see `encode`."""
        parts = self._unchecked(key, turns)
        for turn, part in zip(turns, parts, strict=True):
            self._check_labels(key, turn.answer, part.answer)
        if len(turns) not in self._controls:
            self._controls[len(turns)] = self._control_tokens(self._unchecked(key, [_PROBE] * len(turns)))
        if self._control_tokens(parts) != self._controls[len(turns)]:
            raise HymaError(
                f"The tokenizer of {self.name} makes a control token of the text of row {key}; take what looks like "
                f"one ({', '.join(self._tokens.control[:3])}, ...) out of it."
            )
        return parts

    def _unchecked(self, key: str, turns: Sequence[Turn]) -> list[_Part]:
        """The turns' ids."""
        where = f"row {key} of {self.name}"
        marked = [Turn(*(self._tokens.protect(text, where) for text in (turn.question, turn.answer))) for turn in turns]
        parts = list[_Part]()
        for prompt, answer in self._texts(key, marked):
            ids = self._tokens.behind(self._end, prompt) if parts else self._first(f"of row {key}", prompt)
            parts.append(_Part(ids, self._tokens.behind(self._header, answer)))
        return parts

    def _texts(self, key: str, turns: Sequence[Turn]) -> Iterator[tuple[str, str]]:
        """Every turn's text up to where its answer begins, and from there to the end token."""
        full, position = self._render(turns, answered=True), 0
        for number, turn in enumerate(turns):
            prompt = self._render(turns[: number + 1], answered=False)
            answer = self._gap + turn.answer + self._close
            if len(prompt) < position or not full.startswith(prompt) or not full.startswith(answer, len(prompt)):
                raise HymaError(
                    f"The chat template of {self.name} reorders or rewrites turn {number + 1} of row {key}: the "
                    "prompt is not the beginning of the whole conversation; give the turns as rows of their own."
                )
            yield prompt[position:], answer
            position = len(prompt) + len(answer)

    def _first(self, row: str, prompt: str) -> list[int]:
        """Ids of the first prompt behind the picture."""
        ids = self._tokens.behind("", prompt)
        if ids.count(self._tokens.image_id) != 1 or tuple(ids[: ids.index(self._tokens.image_id)]) != self.before:
            raise HymaError(
                f"The chat template of {self.name} changes what stands in front of the picture {row}; correct the "
                "template."
            )
        return ids[len(self.before) + 1 :]

    def _check_labels(self, key: str, answer: str, ids: list[int]) -> None:
        """That labels are the answer and one end token."""
        if ids[-1:] != [self.end_id] or self.end_id in ids[:-1]:
            raise HymaError(
                f"The answer {answer[:40]!r} of row {key} does not end in one {self._end} in the tokenizer of "
                f"{self.name}; reword it."
            )
        spelt = self.decode(ids[:-1])
        if not spelt or not self._tokens.same(spelt, answer):
            raise HymaError(
                f"The answer {answer[:40]!r} of row {key} comes back from the tokenizer of {self.name} as "
                f"{spelt[:40]!r}; write it with characters that its vocabulary has."
            )

    def _control_tokens(self, parts: list[_Part]) -> list[int]:
        """All control tokens in their order: the same for every row of so many turns."""
        return [token for part in parts for ids in part for token in ids if token in self._tokens.control_ids]

    def _shortened(self, key: str, turns: Sequence[Turn], parts: list[_Part]) -> list[_Part]:
        """Parts that fit, with less of the questions and then of the answers; see `encode`."""
        for number, part in enumerate(parts, 1):
            if len(part.answer) > self._max_length:
                raise HymaError(
                    f"The answer in turn {number} of row {key} takes {len(part.answer)} tokens of {self.name} and the "
                    f"maximum length is {self._max_length}; shorten it or raise the maximum length."
                )
        kept = list(turns)
        for number in reversed(range(len(kept))):
            body = kept[number].question.removesuffix(SHORT_ANSWER)
            ending = kept[number].question[len(body) :]

            def length(characters: int, number: int = number, body: str = body, ending: str = ending) -> int:
                turn = Turn((body[:characters].rstrip() + ending).strip(), kept[number].answer)
                return _length(self._parts(key, [*kept[:number], turn, *kept[number + 1 :]]))

            # The first length that is too long; none fits if that is the empty question.
            short = bisect.bisect_right(range(len(body) + 1), self._room, key=length)
            question = (body[: short - 1].rstrip() + ending).strip() if short else ""
            kept[number] = Turn(question, kept[number].answer)
            parts = self._parts(key, kept)
            if _length(parts) <= self._room:
                return parts
        return self._cut_answers(key, parts)

    def _cut_answers(self, key: str, parts: list[_Part]) -> list[_Part]:
        """Parts whose answers lose their tails, the last one first, until all fits."""
        over = _length(parts) - self._room
        for part in reversed(parts):
            taken = max(0, min(over, len(part.answer) - 2))
            del part.answer[len(part.answer) - 1 - taken : -1]
            over -= taken
        if over > 0:
            raise HymaError(
                f"The {len(parts)} turns of row {key} do not fit into {self._max_length} tokens of {self.name} even "
                "with one token an answer; split the row or raise the maximum length."
            )
        return parts


def _length(parts: Sequence[_Part]) -> int:
    return sum(len(part.prompt) + len(part.answer) for part in parts)

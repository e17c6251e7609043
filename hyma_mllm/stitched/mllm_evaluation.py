"""Questions put to a stitched MLLM: answers kept line by line, so that a kill loses one batch, and their scores."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from hyma_mllm.data.pictures import open_picture
from hyma_mllm.data.rows import Row
from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import parse_json
from hyma_mllm.metrics.vqa import Variant, accuracy
from hyma_mllm.metrics.vqa_choice import multiple_choice
from hyma_mllm.metrics.vqa_pope import pope
from hyma_mllm.stitched.mllm import StitchedMLLM

Metric = Literal["vqa", "pope", "multiple-choice"]

_BEGINNING = b'{"question_id": "'
"""Of every line that `AnswerFile` writes."""

_FIELDS = {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}


class AnswerFile:
    """A jsonl file of answers in LLaVA's layout, continued where an earlier run stopped.

    A last line that a kill tore apart is taken out; the answer is given again.

    Attributes:
        path: the file.
        model_id: who answers.
        blind: whether without the pictures.
        texts: question id -> answer, of the lines that are there.
    """

    def __init__(self, path: Path, model_id: str, blind: bool, rows: Sequence[Row]) -> None:
        """Read what is there.

        Args:
            path: the file; it need not exist.
            model_id: who answers.
            blind: whether without the pictures.
            rows: the questions that it may hold.

        Raises:
            HymaError: a line is damaged, or answers another question, or was written by another model.
        """
        self.path, self.model_id, self.blind = path, model_id, blind
        self.texts: dict[str, str] = {}
        asked = {row.key: row.question for row in rows}
        for number, line in enumerate(_whole_lines(path), 1):
            place = f"line {number} of {path}"
            entry = _parsed(line, place)
            key = str(entry["question_id"])
            if entry["model_id"] != model_id or entry["metadata"].get("blind", False) != blind:
                raise HymaError(
                    f"The answer in {place} is by {entry['model_id']:.80}, blind "
                    f"{entry['metadata'].get('blind', False)!r:.40}, and not by {model_id}, blind {blind}; name "
                    "another --out or remove the file."
                )
            if asked.get(key) != entry["prompt"]:
                raise HymaError(
                    f"The answer in {place} is to question {key:.80}, {entry['prompt'][:40]!r}, which this task does "
                    "not ask; name another --out or remove the file."
                )
            self.texts[key] = entry["text"]
        _cut_torn_line(path)

    def append(self, rows: Sequence[Row], texts: Sequence[str]) -> None:
        """Write the answers to some questions behind those that are there."""
        lines = []
        for row, text in zip(rows, texts, strict=True):
            name = f"{self.model_id}\0{self.blind}\0{row.key}".encode()
            entry = {
                "question_id": row.key,
                "prompt": row.question,
                "text": text,
                "answer_id": hashlib.blake2b(name, digest_size=11).hexdigest(),
                "model_id": self.model_id,
                "metadata": {"question_type": row.question_type, "blind": self.blind},
            }
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
            self.texts[row.key] = text
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


def _whole_lines(path: Path) -> list[str]:
    """The lines of the file without a torn last one.

    Raises:
        HymaError: it is no text, or ends in what no kill leaves there: then it is a file of something else.
    """
    if not path.is_file():
        return []
    held = path.read_bytes()
    whole = held[: held.rfind(b"\n") + 1]
    torn = held[len(whole) :]
    if torn[: len(_BEGINNING)] != _BEGINNING[: len(torn)]:
        raise HymaError(f"The last line of {path} is no answer; it is a file of something else, name another --out.")
    try:
        return whole.decode("utf-8").split("\n")[:-1]  # splitlines would also part at U+2028
    except UnicodeDecodeError as error:
        raise HymaError(f"{path} is no UTF-8 text ({error}); remove it or name another --out.") from error


def _cut_torn_line(path: Path) -> None:
    """Take the last line off the file on disk where a kill tore it apart; called when all others were found good."""
    if not path.is_file():
        return
    held = path.read_bytes()
    if not held.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(held.rfind(b"\n") + 1)


def _parsed(line: str, place: str) -> dict[str, Any]:
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise HymaError(f"There is no JSON in {place} ({error}); remove the line.") from error
    if not (
        isinstance(entry, dict)
        and set(entry) == _FIELDS
        and isinstance(entry["metadata"], dict)
        and all(isinstance(entry[name], str) for name in ("question_id", "prompt", "text", "model_id"))
    ):
        raise HymaError(f"There is no answer with the fields {', '.join(sorted(_FIELDS))} in {place}; remove the line.")
    return entry


def answer_rows(
    model: StitchedMLLM, rows: Sequence[Row], file: AnswerFile, batch_size: int, max_new_tokens: int
) -> list[str]:
    """The answers to all questions, those that `file` has taken from there.

    Questions of similar length share a batch, so that little of it is padding; rows without a picture are answered
    blind.

    Args:
        model: who answers.
        rows: the questions.
        file: where answers are kept; says whether pictures are shown.
        batch_size: questions at a time.
        max_new_tokens: tokens of an answer, at most.

    Raises:
        HymaError: a batch does not fit into the device's memory.
    """
    todo = [row for row in rows if row.key not in file.texts]
    todo.sort(key=lambda row: (not row.image, len(row.question or "")))
    with tqdm(
        total=len(rows), initial=len(rows) - len(todo), desc="blind" if file.blind else "answers", unit="q"
    ) as bar:
        while todo:
            shown = bool(todo[0].image)
            batch = [row for row in todo[:batch_size] if bool(row.image) == shown]
            try:
                texts = _answered(model, batch, file.blind or not shown, max_new_tokens)
            except torch.OutOfMemoryError as error:
                raise HymaError(
                    f"{len(batch)} questions at a time do not fit into the device's memory; lower --batch_size and run "
                    f"the same command again, the {len(file.texts)} answers in {file.path} are kept."
                ) from error
            file.append(batch, texts)
            del todo[: len(batch)]
            bar.update(len(batch))
    return [file.texts[row.key] for row in rows]


def _answered(model: StitchedMLLM, batch: Sequence[Row], blind: bool, max_new_tokens: int) -> list[str]:
    questions = [row.question or "" for row in batch]
    if blind:
        return model.blind_answer(questions, max_new_tokens)
    return model.answer([open_picture(row.image) for row in batch], questions, max_new_tokens)


def metric_of(task: str, rows: Sequence[Row]) -> Metric:
    """How a task is scored: by the format that its spec names, and by whether its questions come with choices.

    Args:
        task: the spec, e.g. `pope:coco_pope_random.json,images/`.
        rows: its questions.
    """
    if all(row.choices for row in rows):
        return "multiple-choice"
    return "pope" if task.startswith("pope:") else "vqa"


def scored(metric: Metric, variant: Variant, rows: Sequence[Row], texts: Sequence[str]) -> dict[str, Any]:
    """The measures of a metric, in percent, with `by_type` where the questions have types, and `unreadable` counted.

    Args:
        metric: of the task.
        variant: of VQA accuracy.
        rows: the questions with their human answers.
        texts: the model's answers.
    """
    types = [row.question_type for row in rows] if any(row.question_type for row in rows) else None
    if metric == "vqa":
        return accuracy(texts, [row.answers for row in rows], variant, types)
    right = [row.answers[0] for row in rows]
    if metric == "pope":
        return pope(texts, right, types)
    pictured = [bool(row.image) for row in rows]
    return multiple_choice(texts, right, [row.choices for row in rows], pictured if any(pictured) else None, types)


def table_rows(found: Mapping[str, Any], blind: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """(measure, with the picture, blind) for a table: percent with one decimal, counts as they are, types below."""

    def written(scores: Mapping[str, Any] | None, name: str) -> str:
        if scores is None or name not in scores:
            return ""
        return str(scores[name]) if isinstance(scores[name], int) else f"{scores[name]:.1f}"

    lines = [(name, written(found, name), written(blind, name)) for name in found if name != "by_type"]
    for kind, part in found.get("by_type", {}).items():
        other = blind["by_type"][kind] if blind is not None else None
        lines.append((f"{kind} ({part['questions']})", written(part, "accuracy"), written(other, "accuracy")))
    return lines

"""The closed form `words`: a projector that says, in the LLM's own input space, which words answer about a picture.

With x the mean standardised vision token of a training picture [d_vision] and y the mean input embedding of the words
that answer its questions [d_llm], W = M^T (C + lam)^-1 is the ridge regression from x to y (C = cov(x), M = cov(x, y)).
Ridge shrinks what it cannot foretell, and an LLM reads a shrunk word as no word: W is stretched until W x varies as
much as y does. As the connector's output is scaled to the LLM's embeddings (`MLLMTask.scales`), so is this one's.

"Yes" and "no" say nothing about what a picture shows, and are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import Tensor

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.data.rows import Row
from hyma_mllm.errors import HymaError
from hyma_mllm.search.linear_start import as_connector
from hyma_mllm.search.mllm_parts import Reader, Tower
from hyma_mllm.search.mllm_task import MLLMTask

SAY_NOTHING = frozenset({"yes", "no"})
"""Answers without a word about the picture."""

MOST_PICTURES = 8192
"""Training pictures that are read, at most: several times the width of a tower."""

CHUNK = 256
"""Pictures whose tokens are held at once."""


@dataclass
class WordStarts:
    """A projector for every pair.

    Attributes:
        states: plain state dict of each pair in grid order, of the family that was asked for.
        pictures: training pictures that they were taken from.
        flops: of the regressions; writing them into a family is billed by who asks for it.
    """

    states: list[dict[str, Tensor]]
    pictures: int
    flops: float


def word_starts(task: MLLMTask, spec: ConnectorSpec, strength: float) -> WordStarts:
    """The start of every pair, from the training questions alone; in float64, the states float32 on the CPU.

    Args:
        task: towers, LLMs and questions.
        spec: the connector family.
        strength: of the ridge, in mean eigenvalues of cov(x).

    Raises:
        HymaError: no training picture has an answer that says what it shows.
    """
    said = telling_answers(task)
    pictures = torch.tensor(list(said)[:: max(1, -(-len(said) // MOST_PICTURES))])
    answers = [said[int(picture)] for picture in pictures]
    own = [(llm, word_targets(reader, answers)) for llm, reader in task.readers.items()]
    # Where every process holds all LLMs, nothing has to be sent.
    targets = dict(own if len(own) == len(task.facts) else gather_object(own))

    states: dict[int, dict[str, Tensor]] = {}
    flops = 0.0
    for vision, tower in enumerate(task.towers):
        members = [pair for pair in task.grid.pairs() if pair.vision == vision]
        x = torch.cat([tower.read(part).double().mean(1).cpu() for part in torch.split(pictures, CHUNK)])
        flops += 2 * len(x) * x.shape[1] ** 2 + x.shape[1] ** 3 / 3
        for pair in members:
            y = targets[pair.text].double()
            flops += 2 * len(x) * x.shape[1] * y.shape[1] + 2 * x.shape[1] ** 2 * y.shape[1]
            state = as_connector(stretched_ridge(x, y, strength), spec)
            states[pair.index] = _sized(task, spec, pair.index, tower, state)
    return WordStarts([states[index] for index in range(len(task.grid))], len(pictures), flops)


def telling_answers(task: MLLMTask) -> dict[int, list[str]]:
    """Picture -> the distinct answers to its training questions that say what it shows, in the questions' order.

    Raises:
        HymaError: there are none.
    """
    found: dict[int, list[str]] = {}
    for row in task.train.tolist():
        known = found.setdefault(int(task.picture[row]), [])
        known += [answer for answer in _answers(task.rows[row]) if answer not in known]
    found = {picture: answers for picture, answers in sorted(found.items()) if answers}
    if not found:
        raise HymaError(
            "No training question has an answer other than yes and no, so the closed form words has nothing to start "
            "from; set hypernetwork.preset to default and search.warm_start to none."
        )
    return found


def _answers(row: Row) -> list[str]:
    said = [answer for _, answer in row.turns] or row.answers
    return [answer for answer in dict.fromkeys(said) if answer.strip().lower() not in SAY_NOTHING | {""}]


@torch.no_grad()
def word_targets(reader: Reader, answers: Sequence[Sequence[str]]) -> Tensor:
    """What an LLM's input embeddings say of the answers to each picture.

    Args:
        reader: the LLM.
        answers: of each picture.

    Returns:
        [pictures, width] float32 on the CPU: the mean over a picture's answers of the mean over an answer's tokens,
        each answer as it stands in the middle of a sentence.
    """
    tokenizer = reader.model.tokenizer
    rows: dict[str, Tensor] = {}
    for answer in dict.fromkeys(word for words in answers for word in words):
        ids = torch.tensor(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"], device=reader.device)
        rows[answer] = reader.model.embed(ids).float().mean(0).cpu()
    return torch.stack([torch.stack([rows[word] for word in words]).mean(0) for words in answers])


def stretched_ridge(x: Tensor, y: Tensor, strength: float) -> dict[str, Tensor]:
    """Ridge regression from rows x [rows, d_in] to y [rows, d_out], stretched to y's variance.

    Returns:
        `{"0.weight": [d_out, d_in], "0.bias": [d_out]}`; x or y that do not vary are met by the bias alone.
    """
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    covariance = x.T @ x / len(x)
    lift = strength * covariance.diagonal().mean()
    if not lift > 0:
        return {"0.weight": x.new_zeros(y.shape[1], x.shape[1]), "0.bias": mean_y}
    covariance.diagonal().add_(lift)
    weight = torch.cholesky_solve(x.T @ y / len(x), torch.linalg.cholesky(covariance)).T
    varying = (x @ weight.T).square().mean()
    if varying > 0:
        weight = weight * (y.square().mean() / varying).sqrt()
    return {"0.weight": weight, "0.bias": mean_y - weight @ mean_x}


def _sized(
    task: MLLMTask, spec: ConnectorSpec, index: int, tower: Tower, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The state with its last layer scaled so that the LLM reads vectors of the RMS of its input embeddings."""
    few = tower.read(task.picture[task.train[:64]]).float().cpu()
    stacked = {name: value[None] for name, value in state.items()}
    rms = float(connectors.apply(spec, stacked, few[None]).square().mean().sqrt())
    factor = task.facts[task.grid.pair(index).text].embedding_rms / (task.scales(spec)[index] * rms)
    last = (f"{2 * spec.depth}.weight", f"{2 * spec.depth}.bias")
    return {name: value * factor if name in last else value for name, value in state.items()}

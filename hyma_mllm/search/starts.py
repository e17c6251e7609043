"""Closed-form connectors as starting points, with their bill."""

from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.errors import HymaError
from hyma_mllm.pairs import PairGrid
from hyma_mllm.search.closed_form import ClosedFormConfig, Start, closed_forms
from hyma_mllm.search.consensus import shared_out
from hyma_mllm.search.flops import as_connector_flops, closed_form_flops, consensus_flops
from hyma_mllm.search.ledger import Cost, Meter
from hyma_mllm.search.linear_start import training_start
from hyma_mllm.search.mllm_task import MLLMTask
from hyma_mllm.search.pair_loss import SearchTask
from hyma_mllm.search.task import VLMTask
from hyma_mllm.search.word_start import word_starts


@dataclass
class Starts:
    """A connector for every pair, and what they cost.

    Attributes:
        states: plain state dict of each pair in grid order.
        cost: FLOPs and seconds; every pair saw the training rows once.
    """

    states: list[dict[str, Tensor]]
    cost: Cost


def contrastive(task: SearchTask, what: str) -> VLMTask:
    """The task, if it is one that holds the features of both sides.

    Args:
        task: of the search.
        what: needs them, for the message.

    Raises:
        HymaError: it is another.
    """
    if not isinstance(task, VLMTask):
        raise HymaError(
            f"{what} needs stored features of both sides, and an LLM has none; take it out, or use recipes/vlm.py."
        )
    return task


def closed_starts(
    task: SearchTask, spec: ConnectorSpec, kind: Start, strength: float, accelerator: Accelerator
) -> Starts:
    """The closed-form connector of every pair, in a connector family.

    Args:
        task: of the case that the closed form is for.
        spec: the connector family.
        kind: which closed form.
        strength: of its regularisation.
        accelerator: of this process; the bill has its memory.

    Raises:
        HymaError: the closed form is not one of this task.
    """
    cost = Cost()
    with Meter(cost, accelerator.device):
        if kind == "words":
            if not isinstance(task, MLLMTask):
                raise HymaError("The closed form words joins vision towers to LLMs; take consensus for encoders.")
            words = word_starts(task, spec, strength)
            states, cost.flops, cost.samples_per_pair = words.states, words.flops, float(words.pictures)
        else:
            features = contrastive(task, f"The closed form {kind}")
            found = closed_forms(features, ClosedFormConfig(kind=kind, strength=strength))
            states = [training_start(state, spec) for state in found.states]
            cost.flops, cost.samples_per_pair = found.flops, float(len(features.train))
    cost.flops += sum(as_connector_flops(spec, task.grid.shape(pair)) for pair in range(len(task.grid)))
    return Starts(states, cost)


def start_flops(grid: PairGrid, spec: ConnectorSpec, kind: Start, captions: int, pictures: int) -> float:
    """What `closed_starts` of all pairs between encoders will cost, from numbers alone.

    Args:
        grid: the pairs.
        spec: the connector family.
        kind: `consensus`, `whitened` or `ridge`.
        captions: of the training split.
        pictures: likewise.
    """
    rows, pairs = (captions, pictures), range(len(grid))
    written = sum(as_connector_flops(spec, grid.shape(pair)) for pair in pairs)
    if kind == "consensus":
        return written + consensus_flops(rows, grid, pairs, *shared_out([*grid.vision_widths, *grid.text_widths]))
    return written + closed_form_flops(rows, grid, pairs, whitened=kind == "whitened")

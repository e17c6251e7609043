"""Memory of a training, from shapes alone: what is trained, the connectors of a visit, and what a visit keeps.

Sizes are bytes of one process. What autograd keeps for the backward pass is counted tensor by tensor; what comes and
goes within an operation is one more copy of the largest.
"""

from collections.abc import Sequence

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.zoo.llm_shape import LLMShape

FLOAT = 4
"""Bytes of a float32, in which everything is trained."""

STATE = 3 * FLOAT
"""Bytes of a trained weight with AdamW's two moments."""

GRADIENT = FLOAT
"""Bytes of a trained weight's gradient, which a step of one visit makes when its activations are gone."""

PREDICTED_COPIES = 3
"""Of the predicted weights of a visit: themselves, their gradient, and its copy on the way back to the heads."""

CHECKPOINT = STATE
"""Bytes of a trained weight in a checkpoint: itself and two moments."""

CHECKPOINTS_AT_ONCE = 3
"""Two are kept, and a third is being written."""


def contrastive_visit(
    spec: ConnectorSpec, shapes: Sequence[tuple[int, int]], batch: int, everyone: int, tile: int
) -> float:
    """Bytes that a visit of the contrastive search keeps, connectors' weights left out.

    Args:
        spec: the family of connectors.
        shapes: (d_in, d_out) of every pair of the visit.
        batch: samples of this process.
        everyone: samples of all processes, whose images and texts meet in the loss.
        tile: rows of logits held at once; 0 holds all.
    """
    total = 0.0
    for d_in, d_out in shapes:
        hidden = sum(layer.fan_out for layer in spec.layers(d_in, d_out)[:-1])
        # Both inputs stacked; hidden layers before and behind the activation; the output, its unit rows and gradients.
        total += batch * (d_in + d_out + 2 * hidden + 4 * d_out) * FLOAT
        if everyone > batch:
            total += 2 * everyone * d_out * FLOAT
    widest = max((2 * max(layer.fan_out for layer in spec.layers(*shape)) for shape in shapes), default=0)
    logits = 2 * min(tile, batch * len(shapes)) if tile else 4 * batch * len(shapes)
    return total + len(shapes) * batch * widest * FLOAT + logits * everyone * FLOAT


def retrieval_scores(pictures: int, captions: int, width: int, tile: int = 1024) -> float:
    """Bytes of scoring one pair: tiles of scores with their masks, and both sides as unit rows."""
    return min(tile, pictures) * captions * 24.0 + (2 * pictures + 3 * captions) * width * FLOAT


def llm_weights(shape: LLMShape, bytes_of_layers: float, bytes_of_words: float) -> float:
    """Bytes of a loaded LLM, whose embeddings and head are never quantised."""
    return shape.body * bytes_of_layers + shape.embeddings * bytes_of_words


def layer_activations(shape: LLMShape, tokens: int, before: float, element: int, attention: int) -> float:
    """Bytes that one frozen decoder layer keeps for a pass of `tokens` tokens.

    Frozen linear layers keep nothing of what goes through them. Both norms keep their input; attention its queries,
    keys, values (those of the prefix with each row) and output; the MLP both of its inner tensors and their product's
    first factor.

    Args:
        shape: of the LLM.
        tokens: of all rows.
        before: tokens of the shared prefix that stand before each, per own token.
        element: bytes of an entry.
        attention: bytes of an entry within attention.
    """
    norms = 2 * shape.width * element
    attended = (2 * shape.heads_width + 2 * shape.heads_width * (1 + before)) * attention
    return tokens * (norms + attended + 3 * shape.inner * element)


def causal_visit(
    shape: LLMShape,
    rows: int,
    length: int,
    before: int,
    element: int,
    attention: int,
    checkpointing: bool,
) -> float:
    """Bytes that a visit keeps within the LLM.

    Args:
        shape: of the LLM.
        rows: questions times pairs.
        length: tokens of a row, behind the prefix.
        before: tokens of the prefix.
        element: bytes of an entry.
        attention: bytes of an entry within attention.
        checkpointing: whether layers keep their input only.
    """
    tokens = rows * length
    layer = layer_activations(shape, tokens, before / max(length, 1), element, attention)
    kept = tokens * shape.width * element * shape.layers + layer if checkpointing else layer * shape.layers
    # Embeddings joined and moved, the last states and their gradients; within a layer the gradients of the MLP.
    ends = tokens * (6 * shape.width * element + 2 * shape.width * FLOAT)
    return kept + ends + 3 * tokens * shape.inner * element


def projector_visit(spec: ConnectorSpec, shapes: Sequence[tuple[int, int]], tokens: int, width: int) -> float:
    """Bytes that the projectors of a visit keep.

    Args:
        spec: the family.
        shapes: (d_in, d_out) of every pair of the visit.
        tokens: of all pictures of the batch, the longest tower's count each.
        width: of the LLM.
    """
    total = 0.0
    for d_in, d_out in shapes:
        hidden = sum(layer.fan_out for layer in spec.layers(d_in, d_out)[:-1])
        total += tokens * (3 * d_in + 3 * hidden + 3 * width) * FLOAT
    return total


def causal_loss(supervised: int, width: int, chunk: int) -> float:
    """Bytes of the next-token loss: logits of a chunk of the vocabulary twice, and states with their gradients."""
    return supervised * (2 * chunk + 4 * width) * FLOAT


def answering(shape: LLMShape, rows: int, length: int, before: int, new: int, element: int) -> float:
    """Bytes of generating answers: keys and values of all rows, the widest layer's pass, and two sets of logits."""
    cache = 2 * shape.layers * shape.kv_width * rows * (before + length + new) * element
    widest = rows * length * (3 * shape.inner + 6 * shape.width) * element
    return 1.1 * cache + widest + 2 * rows * shape.vocabulary * FLOAT


def embedding_pass(batch: int, side: int) -> float:
    """Bytes of a forward pass of an image model: two of the widest early layers, about 24 numbers a pixel each."""
    return batch * side**2 * 48.0 * FLOAT

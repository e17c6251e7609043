"""What a visit of the causal search computes, from shapes alone; the causal counterpart of `flops`.

The LLM is frozen: its backward pass goes to the activations only, so forward and backward are 4 FLOPs a weight and
token. Behind a shared prefix only picture and text tokens pass through it. Lengths are means over the training rows,
padding left out; attention counts the full rectangle of queries and keys.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.search.flops import connector_step_flops
from hyma_mllm.search.mllm_parts import LLMFacts

if TYPE_CHECKING:
    from hyma_mllm.search.mllm_task import MLLMTask


def forward(llm: LLMFacts, image_tokens: int, new_tokens: int = 0) -> float:
    """One sequence through the layers, without the head."""
    own = image_tokens + llm.text + new_tokens
    return 2.0 * llm.body_weights * own + 4.0 * llm.attention_width * own * (llm.before + own)


def step(task: "MLLMTask", spec: ConnectorSpec, index: int, batch: int) -> float:
    """Forward and backward of one pair's loss over a batch of questions."""
    pair = task.grid.pair(index)
    llm, count = task.facts[pair.text], task.towers[pair.vision].count
    own = count + llm.text
    # Attention has two products without a frozen side, so its backward pass is twice its forward pass.
    backward = 2.0 * llm.body_weights * own + 8.0 * llm.attention_width * own * (llm.before + own)
    head = 6.0 * llm.head_weights * llm.supervised  # forward, again in the backward pass, and its gradient
    connector = connector_step_flops(spec, task.grid.shape(index), batch * count)
    return connector + batch * (forward(llm, count) + backward + head)


def scoring(task: "MLLMTask", spec: ConnectorSpec, questions: Tensor, new_tokens: int = 0) -> float:
    """Forward of all pairs over some questions, `new_tokens` of an answer generated on top."""
    total = 0.0
    for pair in task.grid.pairs():
        llm, count = task.facts[pair.text], task.towers[pair.vision].count
        head = 2.0 * llm.head_weights * (new_tokens or llm.supervised)
        connector = 2.0 * count * spec.parameters(*task.grid.shape(pair.index))
        total += connector + forward(llm, count, new_tokens) + head
    return total * len(questions)

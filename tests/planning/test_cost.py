"""The cost model's laws, and memory formulae against what torch really keeps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.planning import cost, training
from hyma_mllm.zoo.llm_shape import LLMShape

SHAPE = LLMShape(
    layers=3, width=64, inner=160, heads_width=64, kv_width=32, vocabulary=100, parameters=200_000, embeddings=6_400
)


def kept(model: nn.Module, rows: int, length: int) -> int:
    """Bytes that autograd keeps of a pass through frozen layers, each storage once and weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    embeddings = torch.randn(rows, length, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(inputs_embeds=embeddings, use_cache=False)  # held until all storages were counted
    assert output is not None
    return sum(found.values())


@pytest.mark.parametrize(("rows", "length"), [(2, 24), (8, 48)])
def test_activations_are_what_autograd_keeps(llama: LlamaForCausalLM, rows: int, length: int) -> None:
    real = kept(llama.model, rows, length)
    reckoned = SHAPE.layers * training.layer_activations(SHAPE, rows * length, 0.0, 4, 4)
    assert reckoned == pytest.approx(real, rel=0.2)


class Moved(TorchDispatchMode):
    """Counts the bytes that every operation reads and writes; views and products left out."""

    FREE = ("mm", "bmm", "_unsafe_view", "detach", "empty_like")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if not view and func.overloadpacket.__name__ not in self.FREE:
            tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


@pytest.mark.parametrize(("rows", "length"), [(2, 24), (8, 48)])
def test_bytes_moved_are_those_of_every_operation(llama: LlamaForCausalLM, rows: int, length: int) -> None:
    """The last norm, which is not of a layer, is less than a tenth of three layers."""
    x = torch.randn(rows, length, 64, requires_grad=True)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, -3:] = 0
    with Moved() as moved:
        llama.model(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state.sum().backward()
    weights = 2 * 4 * SHAPE.parameters
    assert cost.causal_moved(SHAPE, rows, length, 0, 4) - weights == pytest.approx(moved.bytes, rel=0.2)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 64), length=st.integers(1, 500), before=st.integers(0, 50))
def test_more_of_anything_takes_more(rows: int, length: int, before: int) -> None:
    def visit(rows: int = rows, length: int = length, before: int = before, checkpointing: bool = False) -> float:
        return training.causal_visit(SHAPE, rows, length, before, 4, 4, checkpointing)

    assert visit(rows=rows + 1) > visit() and visit(length=length + 1) > visit() and visit(before=before + 1) > visit()
    assert visit(checkpointing=True) < visit()
    assert cost.causal_moved(SHAPE, 2 * rows, length, before, 4) < 2 * cost.causal_moved(SHAPE, rows, length, before, 4)


def test_tiles_bound_the_memory_of_a_batch() -> None:
    spec, shapes = ConnectorSpec(1, 32), [(16, 24)] * 3

    def visit(batch: int, tile: int) -> float:
        return training.contrastive_visit(spec, shapes, batch, batch, tile)

    assert visit(4096, 256) < visit(4096, 0) / 10
    assert visit(8192, 256) < 2.1 * visit(4096, 256)  # linear in the batch
    assert visit(8192, 0) > 3 * visit(4096, 0)


def test_time_is_every_amount_at_its_rate() -> None:
    rates = cost.Rates(flops=1e9, stacked=5e8, updates=1e8, bytes=5e7, logits=1e6)
    assert cost.Work(2e9, 1e9, 3e8, 1e8, 5e6).seconds(rates) == pytest.approx(2 + 2 + 3 + 2 + 5)
    other = cost.Rates(flops=2e9, stacked=1e8, updates=1e8, bytes=1e8, logits=1e5)
    assert rates.best(other) == cost.Rates(2e9, 5e8, 1e8, 1e8, 1e6)


def test_work_of_a_contrastive_step_grows_with_what_it_is_made_of() -> None:
    spec, shapes = ConnectorSpec(0), [(16, 24), (8, 24)]
    one = cost.contrastive_work(spec, shapes, 8, 100, (5.0, 7.0))
    assert (one.flops, one.stacked, one.logits) == (7.0, 5.0, 2 * 64)
    assert cost.contrastive_work(spec, shapes, 8, 200, (0.0, 0.0)).updates == 2 * one.updates
    more = cost.contrastive_work(spec, [*shapes, (16, 24)], 8, 100, (0.0, 0.0)).bytes - one.bytes
    samples = cost.KEPT_PASSES * 8 * (8 + 3 * 24)
    assert more == 4 * (cost.PREDICTED_PASSES * spec.parameters(16, 24) + samples)


def test_rates_of_this_machine_are_positive() -> None:
    rates = cost.measured_rates(rounds=1)
    assert min(rates.flops, rates.stacked) > 1e8 and min(rates.updates, rates.bytes) > 1e7 and rates.logits > 1e4
    assert cost.frozen_rate(SHAPE, 64, rounds=1) > 1e7


def test_a_frozen_layer_is_counted_forward_and_back_to_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is what is counted: torch counts the products of the timed work itself."""

    def one_second(work: Callable[[], object], device: object, rounds: int) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        seen.append(counter.get_total_flops())
        return 1.0

    seen: list[int] = []
    monkeypatch.setattr(cost, "_best", one_second)
    one_layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160
    assert cost.frozen_rate(SHAPE, 10) == seen[0] == cost.LAYERS * 4 * 10 * one_layer

"""The causal step of `causal_step.py`, `scale.py` and `token_storage.py`: its task, ours, and plain training's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.data.pictures import open_picture
from hyma_mllm.data.prompts import IGNORE, SHORT_ANSWER
from hyma_mllm.data.question_sets import QuestionSets
from hyma_mllm.data.questions import open_questions
from hyma_mllm.data.questions_balance import balanced
from hyma_mllm.data.token_library import TokenConfig, TokenLibrary
from hyma_mllm.objectives.causal_lm import CausalObjective
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.mllm_prepare import prepare_mllm
from hyma_mllm.search.mllm_score import score_answers
from hyma_mllm.search.mllm_task import MLLMTask
from hyma_mllm.search.placement import Placement
from hyma_mllm.stitched.mllm import StitchedMLLM
from hyma_mllm.stitched.mllm_config import MLLMConfig
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.llm import LanguageModel, Quantisation, llm_card, load_llm
from hyma_mllm.zoo.vision_tokens import DEFAULT_TOWER_IDS, VisionTower, load_tower, tower_card

QUESTIONS = 64
"""Of easy-VQA, that batches are taken from."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Precision = Literal["bf16", "fp32"]
Step = Callable[[], list[float]]
"""One optimiser step of all pairs; gives their losses before it."""


def loaded(card: ModelCard, precision: Precision, quantisation: Quantisation) -> LanguageModel:
    """The LLM; terms were checked before any case began."""
    terms = [card.terms] if card.terms else []
    return load_llm(card, dtype=DTYPES[precision], quantisation=quantisation, accepted_terms=terms)


def task_of(
    llm: str,
    precision: Precision = "fp32",
    quantisation: Quantisation = "none",
    towers: Sequence[str] = DEFAULT_TOWER_IDS,
    suffix: str = SHORT_ANSWER,
) -> MLLMTask:
    """The search's task: balanced training questions of easy-VQA, some towers, one LLM."""
    rows = balanced(open_questions("questions:easy-vqa").parts["train"], QUESTIONS)
    # Nothing is scored here, but a task has questions to score.
    questions = QuestionSets(rows, rows[:1], {"easy-vqa": rows[:1]}, suffix)
    # In float32, so that tower and store say the same; 16 bits, the default, move the losses by 5e-4.
    library = TokenLibrary(TokenConfig(storage_dtype="fp32"))
    return prepare_mllm(
        [tower_card(name) for name in towers],
        [llm_card(llm)],
        partial(loaded, precision=precision, quantisation=quantisation),
        Placement(),
        questions,
        library,
        score_answers,
        512,
        chunk=32,
        longest_answer=8,
    )


def spec_of(task: MLLMTask) -> ConnectorSpec:
    """LLaVA's projector: one hidden layer as wide as the LLM, GELU."""
    return ConnectorSpec(depth=1, hidden=task.readers[0].model.width, activation="gelu")


def search_step(task: MLLMTask, batch: int, per_visit: int) -> Step:
    """`per_visit` pairs at once, as a search trains them."""
    spec, objective = spec_of(task), CausalObjective()
    bank = ConnectorBank(task.grid, spec, seed=0)
    optimiser = torch.optim.AdamW(bank.parameters(), fused=True)
    questions = task.batch(torch.arange(batch), 0, 0)
    task.scales(spec)  # a run takes them once
    pairs = range(len(task.grid))
    visits = [pairs[start : start + per_visit] for start in pairs[::per_visit]]

    def step() -> list[float]:
        found: list[float] = []
        for visit in visits:
            losses = task.losses(bank(visit), spec, objective, questions)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            found += losses.tolist()
        optimiser.step()
        optimiser.zero_grad()
        return found

    return step


@dataclass
class PlainPair:
    """What plain training of one pair takes.

    Attributes:
        model: the exported transformers model; its projector trains.
        inputs: of its forward: ids, mask, labels, pixels.
        optimiser: of the projector.
    """

    model: Any
    inputs: dict[str, Tensor]
    optimiser: torch.optim.AdamW


def llava_step(task: MLLMTask, batch: int, with_tower: bool) -> Step:
    """One pair after the other, each as transformers trains it."""
    pairs: list[PlainPair] = []
    bank = ConnectorBank(task.grid, spec_of(task), seed=0)
    for number in range(len(task.grid)):
        pairs.append(plain_pair(task, bank, number, batch))
        if number:
            # Three runs of one pair each would hold one LLM each.
            pairs[-1].model.model.language_model = pairs[0].model.model.language_model
            pairs[-1].model.lm_head = pairs[0].model.lm_head
        if not with_tower:
            give_tokens(pairs[-1])

    def step() -> list[float]:
        losses = []
        for pair in pairs:
            loss = pair.model(**pair.inputs, use_cache=False).loss
            loss.backward()
            pair.optimiser.step()
            pair.optimiser.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    return step


def plain_pair(task: MLLMTask, bank: ConnectorBank, number: int, batch: int) -> PlainPair:
    """The model that an export would make of the bank's pair, and the batch as it reads it."""
    pair, spec, reader = task.grid.pair(number), spec_of(task), task.readers[0]
    tower, read = load_tower(task.grid.vision_ids[pair.vision]), task.towers[pair.vision]
    state = connectors.select(bank([number])[0].params, 0)
    projector = connectors.folded(state, read.mean, read.spread, task.scales(spec)[number])
    config = MLLMConfig(tower.card, reader.model.card, spec)
    model = StitchedMLLM.from_parts(tower, reader.model, reader.prompter, projector, config).model
    weights = model.model.multi_modal_projector.requires_grad_(True).parameters()
    inputs = plain_inputs(task, tower, model.config.image_token_id, batch)
    return PlainPair(model, inputs, torch.optim.AdamW(weights, fused=True))


def plain_inputs(task: MLLMTask, tower: VisionTower, image_token: int, batch: int) -> dict[str, Tensor]:
    """The first questions as ids `[before][picture][after]` with their labels, and the pixels of their pictures."""
    reader = task.readers[0]
    text = reader.texts(range(batch))
    front = torch.tensor([*reader.prompter.before, *[image_token] * (tower.card.tokens or 0)]).expand(batch, -1)
    pictures = [open_picture(row.image) for row in task.rows[:batch]]
    return {
        "input_ids": torch.cat([front, text.after], 1),
        "attention_mask": torch.cat([torch.ones_like(front), text.mask.long()], 1),
        "labels": torch.cat([torch.full_like(front, IGNORE), text.labels], 1),
        "pixel_values": torch.stack([tower.preprocess(picture) for picture in pictures]),
    }


def give_tokens(pair: PlainPair) -> None:
    """Put what the pair's tower says of the batch in the tower's place."""
    outputs: list[Any] = []
    inner = pair.model.model
    handle = inner.vision_tower.register_forward_hook(lambda module, pixels, output: outputs.append(output))
    with torch.no_grad():
        inner.get_image_features(pair.inputs["pixel_values"], return_dict=True)
    handle.remove()
    last, states = outputs[0].last_hidden_state, outputs[0].hidden_states

    def given(*pixels: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=last, hidden_states=states)

    inner.vision_tower = nn.Identity()
    inner.vision_tower.forward = given

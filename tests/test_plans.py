"""What the recipes reckon that they need: numbers worked out by hand, and shelves that a machine refuses."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from hyma_mllm import mllm, mllm_placement, mllm_plan, vlm_plan
from hyma_mllm.data.token_library import TokenConfig
from hyma_mllm.errors import HymaError
from hyma_mllm.mllm import Counts, LLMConfig, MLLMConfig
from hyma_mllm.planning.needs import Need, Plan, Room, refuse_what_cannot_fit
from hyma_mllm.search.config import SearchConfig
from hyma_mllm.vlm import VLMConfig
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.llm_shape import guessed_shape

LAPTOP = Room({"cache": 100e9, "memory": 16e9}, one_disk=True)
NODE = Room({"cache": 4e12, "memory": 100e9, "gpu": 80e9}, one_disk=True)
COUNTS = Counts(training=558_000, questions=560_000, pictures=558_000, text=30)


def tower(number: int) -> ModelCard:
    return ModelCard(f"hf:/towers/{number}", "image", "here", "r", 1024, 304_000_000, "MIT", tokens=576, resolution=336)


def llm(number: int) -> ModelCard:
    return ModelCard(f"hf:/llms/{number}", "llm", "here", "r", 4096, 7_000_000_000, "MIT")


@pytest.fixture(autouse=True)
def a_large_shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 towers of 576 tokens and 10 LLMs of 7 billion weights, by their cards; all fetched."""
    monkeypatch.setattr(MLLMConfig, "tower_cards", lambda config: [tower(number) for number in range(30)])
    monkeypatch.setattr(MLLMConfig, "llm_cards", lambda config: [llm(number) for number in range(10)])
    for module in (mllm, mllm_placement, mllm_plan):
        monkeypatch.setattr(module, "llm_shape", lambda card: guessed_shape(card.width, card.parameters))
    for name in ("llm_on_disk", "tower_on_disk"):
        monkeypatch.setattr(mllm_plan, name, lambda card: True)
    for name in ("image_on_disk", "text_on_disk"):
        monkeypatch.setattr(vlm_plan, name, lambda card: False)


def config(**search: Any) -> MLLMConfig:
    values = {"methods": ["hyma"], "connectors": ["mlp1"], "hidden": 0, "activation": "gelu", "batch": 16} | search
    return MLLMConfig(llm=LLMConfig(dtype="bf16"), search=SearchConfig(**values))


def needed(config: MLLMConfig, processes: int = 1, room: Room = NODE) -> Mapping[str, Need]:
    return {need.what: need for need in mllm_plan.needs(config, COUNTS, processes, room)}


def of(needs: Mapping[str, Need], words: str) -> Need:
    found = [need for what, need in needs.items() if words in what]
    assert len(found) == 1, words
    return found[0]


def test_tokens_take_what_their_numbers_take() -> None:
    one = 558_000 * 576 * 1024
    stored = replace(config(), tokens=TokenConfig(disk_gb=700.0))
    assert of(needed(stored), "tokens of hf:/towers/0 in fp16").bytes == 2 * one
    small = replace(config(), tokens=TokenConfig(disk_gb=700.0, storage_dtype="int8"))
    assert of(needed(small), "tokens of hf:/towers/0 in int8").bytes == pytest.approx(1.0625 * one)
    # One tower of 658 GB has room in 700; the others run for every batch and are in memory for it.
    whats = " ".join(needed(stored))
    assert whats.count("last tokens of") == 29 and whats.count("in fp16") == 1


def test_a_process_needs_its_own_llms_only() -> None:
    alone = [need.bytes for what, need in needed(config()).items() if "weights of hf:/llms" in what]
    assert len(alone) == 10 and sum(alone) == pytest.approx(140e9)
    shared = needed(config(parallel="pairs"), processes=5)
    assert len([what for what in shared if "weights of hf:/llms" in what]) == 2
    assert of(shared, "weights of hf:/llms/0").place == "gpu"


def test_a_grid_of_wide_projectors_outgrows_the_hypernetwork() -> None:
    hyma = of(needed(config()), "hypernetwork of mlp1").bytes
    both = needed(config(methods=["hyma", "grid"]))
    grid = of(both, "connectors of all pairs").bytes
    assert grid + of(both, "their gradients").bytes == pytest.approx(16 * 300 * (1025 * 4096 + 4097 * 4096))
    assert hyma < grid / 10


def test_checkpointing_and_smaller_visits_need_less() -> None:
    def kept(config: MLLMConfig) -> float:
        return of(needed(config), "activations of a visit").bytes

    full = kept(config())
    assert kept(config(pairs_per_visit=1)) == pytest.approx(full / 30, rel=0.01)
    assert kept(replace(config(), llm=LLMConfig(dtype="bf16", checkpointing=True))) < full / 8
    assert kept(config(batch=8)) == pytest.approx(full / 2, rel=0.01)


def test_a_refusal_of_a_large_shelf_offers_what_fits() -> None:
    def plan(changed: MLLMConfig) -> Plan:
        return Plan(tuple(mllm_plan.needs(changed, COUNTS, 8, NODE)), NODE)

    wanted = config(parallel="pairs")
    with pytest.raises(HymaError, match=r"free GPU memory for each process.*it would fit with") as refused:
        refuse_what_cannot_fit(wanted, plan, mllm_plan.changes(wanted, 8))
    assert "search.pairs_per_visit" in str(refused.value)
    small = config(parallel="pairs", pairs_per_visit=1, batch=8)
    assert plan(replace(small, llm=LLMConfig(dtype="bf16", checkpointing=True), answer_batch=1)).short() is None


def test_features_are_counted_by_width_and_form() -> None:
    small = VLMConfig(image_encoders=["efficientnet-lite0"], text_encoders=["minilm-l6"])
    width = sum(card.width for card in small.image_cards()) + 3 * sum(card.width for card in small.text_cards())
    assert vlm_plan.bytes_of_a_row(small) == 4 * width
    needs = {need.what: need for need in vlm_plan.needs(small, 558_000, 1, LAPTOP)}
    assert needs["features of 558,000 pictures"].bytes == 558_000 * 4 * width
    assert needs["features of 558,000 pictures"].place == "cache"
    assert needs["standardised features of all models"].place == "memory"
    assert needs["2 models to be fetched"].bytes > 0
    # Features that would fill the memory stay on disk, and then need none of it.
    tight = Room({"cache": 100e9, "memory": 1e9}, one_disk=True)
    assert "standardised features of all models" not in {n.what for n in vlm_plan.needs(small, 558_000, 1, tight)}
    assert "features of 0 pictures" not in {n.what for n in vlm_plan.needs(small, 0, 1, LAPTOP)}


def test_a_full_disk_is_offered_half_the_features() -> None:
    small = VLMConfig(image_encoders=["efficientnet-lite0"], text_encoders=["minilm-l6"])
    rows = 2_000_000
    room = Room({"cache": 15e9, "memory": 128e9}, one_disk=True)

    def plan(changed: VLMConfig) -> Plan:
        return Plan(tuple(vlm_plan.needs(changed, rows, 1, room)), room)

    with pytest.raises(HymaError, match=r"free disk of the cache.*features of 2,000,000.*embedding.storage_dtype fp16"):
        refuse_what_cannot_fit(small, plan, vlm_plan.changes(small, 1))

"""The MLLM search's configuration: what is resolved, what is checked before a byte is fetched, what the bill says."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from hyma_mllm import launch, mllm, mllm_placement, mllm_plan
from hyma_mllm.data.question_sets import DEFAULT_TESTS, DEFAULT_TRAIN, QuestionConfig
from hyma_mllm.errors import HymaError
from hyma_mllm.mllm import Counts, LLMConfig, MLLMConfig
from hyma_mllm.search.methods import SearchConfig
from hyma_mllm.zoo.llm import DEFAULT_LLM_IDS
from hyma_mllm.zoo.llm_shape import guessed_shape
from hyma_mllm.zoo.vision_tokens import DEFAULT_TOWER_IDS

COUNTS = Counts(training=100, questions=120, pictures=120, text=30)


def search(**options: Any) -> SearchConfig:
    return SearchConfig(methods=["hyma"], connectors=["mlp1"], hidden=0, activation="gelu", **options)


@pytest.fixture(autouse=True)
def nothing_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is checked of weights that are here is another test's; here nothing may be opened, and memory is free."""
    monkeypatch.setattr(mllm_placement.psutil, "virtual_memory", lambda: SimpleNamespace(available=1e12))
    monkeypatch.setattr(mllm, "llm_on_disk", lambda card: False)
    monkeypatch.setattr(mllm, "tower_on_disk", lambda card: False)
    for module in (mllm, mllm_placement, mllm_plan):
        monkeypatch.setattr(module, "llm_shape", lambda card: guessed_shape(card.width, card.parameters))


def test_the_default_is_resolved_to_names() -> None:
    config = MLLMConfig()
    plain = config.resolved()
    assert plain["towers"] == list(DEFAULT_TOWER_IDS) and plain["llms"] == list(DEFAULT_LLM_IDS)
    assert plain["data"]["train"] == DEFAULT_TRAIN and plain["data"]["tests"] == DEFAULT_TESTS
    assert plain["llm"]["dtype"] in ("bf16", "fp32")
    grid = config.grid()
    assert len(grid) == len(DEFAULT_TOWER_IDS) * len(DEFAULT_LLM_IDS) and grid.direction == "vision_to_text"
    counts = mllm.check(config)
    held_out = sum(DEFAULT_TESTS.values()) + QuestionConfig().validation_limit
    assert counts.training == sum(DEFAULT_TRAIN.values())
    assert counts.questions == counts.pictures == counts.training + held_out


def test_what_only_decides_memory_is_not_resolved() -> None:
    other = MLLMConfig(answer_batch=3, llm=LLMConfig(checkpointing=True))
    assert other.resolved() == MLLMConfig().resolved()
    assert MLLMConfig(llm=LLMConfig(max_length=99)).resolved() != MLLMConfig().resolved()


def test_the_precision_is_the_machines_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert LLMConfig().precision() == "bf16" and LLMConfig().torch_dtype() == torch.bfloat16
    assert LLMConfig(dtype="fp32").precision() == "fp32" and LLMConfig(dtype="fp32").torch_dtype() == torch.float32


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"towers": ["dinov2-smal:56px"]}, "did you mean dinov2-small"),
        ({"llms": ["qwen2.5-coder-0.6b"]}, r"did you mean qwen2\.5-coder-0\.5b"),
        ({"llms": ["gemma3-270m"]}, "say --accept-terms gemma"),
        ({"answer_batch": 0}, "answer_batch is 0"),
        ({"llm": LLMConfig(longest_answer=0)}, r"llm\.longest_answer is 0"),
        ({"search": search(pairs_per_visit=99)}, r"search\.pairs_per_visit is 99"),
        (
            {"search": search(batch=64), "data": QuestionConfig(train={"questions:easy-vqa": 40})},
            r"search\.batch is 64 but there are 40 training questions",
        ),
        ({"data": QuestionConfig(tests={"questions:corpra": 3})}, "no built-in questions corpra; did you mean corpora"),
        ({"data": QuestionConfig(train={"vqa:q.json,a.json": 0})}, "names 2 places"),
        ({"data": QuestionConfig(tests={"llava:none.json,.": 0})}, r"none\.json does not exist"),
    ],
)
def test_mistakes_are_named_before_a_byte_is_fetched(options: dict[str, Any], said: str) -> None:
    with pytest.raises(HymaError, match=said):
        mllm.check(MLLMConfig(**options))


def test_accepted_terms_let_an_llm_in() -> None:
    config = MLLMConfig(llms=["gemma3-270m"], llm=LLMConfig(accept_terms=["gemma"]))
    assert [card.terms for card in config.llm_cards()] == ["gemma"]
    joined = MLLMConfig(llm=LLMConfig(accept_terms=["gemma"])).llm_cards()
    assert [card.id for card in joined] == [*DEFAULT_LLM_IDS, "gemma3-270m"]


def test_accept_terms_is_an_option_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "default.yaml").write_text("answer_batch: 5\n")
    monkeypatch.setattr("sys.argv", ["mllm.py", "--llm.accept_terms=[other]", "--accept-terms", "gemma", "--dry-run"])
    config, dry_run = launch.parse(MLLMConfig, tmp_path / "default.yaml", mllm.SHORTCUTS)
    assert config.llm.accept_terms == ["other", "gemma"] and config.answer_batch == 5 and dry_run


def test_the_bill_counts_pairs_and_refuses_what_memory_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MLLMConfig(
        towers=["efficientnet-lite0:128px"], search=search(steps=7, batch=4, grid_steps=9), llm=LLMConfig(dtype="fp32")
    )
    lines: list[str] = []
    mllm.print_bill(config, COUNTS, Accelerator(cpu=True), lines.append)
    said = "\n".join(lines)
    assert "1 towers x 2 LLMs = 2 pairs" in said and "28 samples per pair (0.3 epochs)" in said
    assert "grid: 9 steps" in said and said.count("to be fetched from") == 3
    monkeypatch.setattr(mllm_placement.psutil, "virtual_memory", lambda: SimpleNamespace(available=3e9))
    with pytest.raises(HymaError, match=r"3\.00 GB of free memory.*it would fit with .*llm\.quantisation nf4"):
        mllm.print_bill(config, COUNTS, Accelerator(cpu=True), lines.append)
    monkeypatch.setattr(mllm_placement.psutil, "virtual_memory", lambda: SimpleNamespace(available=1e8))
    with pytest.raises(HymaError, match=r"no setting makes it fit; list fewer models"):
        mllm.print_bill(config, COUNTS, Accelerator(cpu=True), lines.append)


def test_four_bits_are_a_smaller_bill() -> None:
    def words(**options: Any) -> str:
        lines: list[str] = []
        mllm.print_bill(MLLMConfig(llm=LLMConfig(dtype="fp32", **options)), COUNTS, Accelerator(cpu=True), lines.append)
        return next(line for line in lines if "qwen" in line)

    assert "630 M parameters, 2.5 GB" in words() and "630 M parameters, 0.5 GB" in words(quantisation="nf4")

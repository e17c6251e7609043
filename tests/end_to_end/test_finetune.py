"""recipes/finetune.py: LoRA and QLoRA on an exported MLLM, and the merged export."""

import json
from pathlib import Path

import finetune_run as runs
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from hyma_mllm.finetune import Collate, FinetuneConfig, encode_rows, load, read_rows, with_adapters
from hyma_mllm.stitched.mllm import StitchedMLLM
from hyma_mllm.stitched.mllm_processor import messages

COLOURS, options = runs.COLOURS, runs.options


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    return runs.export_model(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return runs.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe(capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        return runs.call(*arguments), *capsys.readouterr()

    return run


def test_adapter_and_merged_model_learn_and_load_as_before(recipe, exported, data, tmp_path):
    out = tmp_path / "out"
    more = ["--epochs", 40, "--lr", 0.01, "--projector_lr", 0.01, "--dtype", "fp32", "--dropout", 0]
    before = AutoModelForImageTextToText.from_pretrained(exported).state_dict()
    code, shown, error = recipe(*options(exported, data, out, *more))
    assert code == 0, error
    assert "8 rows, 0 refused, 0 cut" in shown
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(log) == 80
    assert log[-1]["loss"] < 0.1 * log[0]["loss"]

    merged = AutoModelForImageTextToText.from_pretrained(out / "merged")
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed, "nothing was trained"
    assert all("multi_modal_projector" in name or "language_model.layers" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    assert not any("vision_tower" in name for name in changed), "batch norms learned"

    base = AutoModelForImageTextToText.from_pretrained(exported)
    adapted = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    processor = AutoProcessor.from_pretrained(out / "merged")
    text = processor.apply_chat_template(messages("Colour?"), add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, images=Image.new("RGB", (40, 40), COLOURS["red"]), return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, adapted(**inputs).logits, atol=1e-4, rtol=1e-4)

    tuned = StitchedMLLM.from_pretrained(out / "merged")
    red, blue = (Image.new("RGB", (40, 40), colour) for colour in COLOURS.values())
    assert tuned.answer([red, blue], ["Colour?", "Colour?"]) == ["red", "blue"]
    assert tuned.config.tuned.startswith("LoRA of rank 16")
    assert tuned.config.scores == {}
    assert "tuned afterwards (LoRA" in (out / "merged" / "README.md").read_text()

    code, shown, _ = recipe(*options(exported, data, out, *more))
    assert (code, "finished before" in shown) == (0, True)


def test_labels_are_answers_and_end_tokens_behind_the_whole_prompt(exported, data, tmp_path):
    config = FinetuneConfig(model=exported, data=data, out=tmp_path / "out", dtype="fp32", max_length=160)
    stitched = load(config, torch.device("cpu"))
    _, rows, refused = read_rows(config)
    assert (len(rows), refused) == (8, 0)
    examples = encode_rows(config, stitched, rows)
    tokenizer = stitched.processor.tokenizer
    batch = Collate(stitched.processor.image_processor, tokenizer.pad_token_id)([examples[0], examples[7]])
    told = [tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert told == ["red<|im_end|>", "Hi<|im_end|>blue<|im_end|>"]
    text = stitched.processor.apply_chat_template(messages("Colour?"), add_generation_prompt=True, tokenize=False)
    image = Image.new("RGB", (40, 40), COLOURS["red"])
    prompt = stitched.processor(text=text, images=image, return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][0, :length], prompt["input_ids"][0])
    assert torch.equal(batch["pixel_values"][0], prompt["pixel_values"][0])
    assert batch["attention_mask"].sum(1).tolist() == [
        len(example.encoded.after) for example in (examples[0], examples[7])
    ]


def test_qlora_packs_the_llm_only_and_exports_it_unpacked(recipe, exported, data, tmp_path):
    from bitsandbytes.nn import Linear4bit

    config = FinetuneConfig(model=exported, data=data, out=tmp_path / "out", quantisation="nf4", dtype="fp32")
    stitched = load(config, torch.device("cpu"))
    packed = [name for name, module in stitched.model.named_modules() if isinstance(module, Linear4bit)]
    assert len(packed) == 14
    assert all("language_model.layers" in name for name in packed)
    assert not any(stitched.model.get_submodule(name).support_avx512bf16_for_cpu for name in packed)
    adapted = with_adapters(stitched, config)
    trainable = {name: tensor.dtype for name, tensor in adapted.named_parameters() if tensor.requires_grad}
    assert set(trainable.values()) == {torch.float32}
    assert sum("multi_modal_projector" in name for name in trainable) == 4
    assert sum("lora_" in name for name in trainable) == 28

    code, _, error = recipe(
        *options(exported, data, tmp_path / "out", "--quantisation", "nf4", "--checkpointing", "true")
    )
    assert code == 0, error
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "merged")
    assert not isinstance(merged, LlavaForConditionalGeneration)  # a CNN tower: FastVLM
    assert {tensor.dtype for tensor in merged.parameters()} == {torch.float32}
    assert StitchedMLLM.from_pretrained(tmp_path / "out" / "merged").config.tuned.startswith("QLoRA")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--rank", 0), "rank is 0"),
        (("--dropout", 1), "dropout is 1"),
        (("--model", "gone"), "There is no directory gone"),
        (("--data", "questions:easy-vqa"), "/train"),
        (("--max_length", 20), "raise it"),
    ],
)
def test_bad_options_are_one_sentence(recipe, exported, data, tmp_path, more, said):
    code, _, error = recipe(*options(exported, data, tmp_path / "out", *more))
    assert code == 2
    assert said in error
    assert not (tmp_path / "out").exists()


def test_a_training_that_diverges_says_what_to_lower(recipe, exported, data, tmp_path):
    more = ["--dtype", "fp32", "--epochs", 4, "--lr", 1e20, "--projector_lr", 1e20]
    code, _, error = recipe(*options(exported, data, tmp_path / "out", *more))
    assert code == 2
    assert "lower --lr" in error
    assert not (tmp_path / "out" / "merged").exists()


def test_a_taken_directory_is_refused_and_a_dry_run_writes_nothing(recipe, exported, data, tmp_path):
    assert recipe(*options(exported, data, tmp_path / "dry", "--dry-run"))[0] == 0
    assert not (tmp_path / "dry").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    code, _, error = recipe(*options(exported, data, tmp_path / "taken"))
    assert code == 2
    assert "holds files but no run" in error

"""The exported MLLM: what transformers loads and says is what the search computed."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pytest
import tiny_mllm as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    FastVlmForConditionalGeneration,
    LlavaForConditionalGeneration,
)

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.errors import HymaError
from hyma_mllm.stitched.llava import grown
from hyma_mllm.stitched.mllm import StitchedMLLM, conversation
from hyma_mllm.stitched.mllm_config import MLLMConfig
from hyma_mllm.stitched.mllm_processor import messages, render
from hyma_mllm.zoo.llm import load_llm
from hyma_mllm.zoo.vision_tokens import load_tower

MLP = ConnectorSpec(1, tiny.WIDTH, "gelu")
LLAVA, FASTVLM = LlavaForConditionalGeneration, FastVlmForConditionalGeneration
QUESTION = "What is this? <b> 1 + 1"

CASES = [
    ("clip", "", "llama", MLP, LLAVA),
    ("dinov2", "", "qwen2", MLP, LLAVA),
    ("dinov2", "@1+2", "bos", MLP, LLAVA),
    ("dinov2", ":16px", "llama", ConnectorSpec(0), LLAVA),
    ("registers", "", "llama", ConnectorSpec(1, tiny.WIDTH, "relu"), LLAVA),
    ("siglip", "", "bos", MLP, LLAVA),
    ("vit", ":16px", "qwen2", MLP, LLAVA),
    ("test_vit", ":32px", "llama", MLP, LLAVA),
    ("test_efficientnet", ":64px", "llama", MLP, FASTVLM),
    ("test_resnet", ":64px", "qwen2", ConnectorSpec(0), FASTVLM),
    ("registers", ":pool2", "llama", MLP, None),
    ("vit", ":shuffle2", "qwen2", MLP, None),
    ("test_efficientnet", "@3:64px", "llama", MLP, None),
    ("clip", "", "gemma2", MLP, None),
    ("clip", "", "llama", ConnectorSpec(1, 40, "gelu"), None),
    ("test_resnet", ":64px", "llama", ConnectorSpec(2, tiny.WIDTH, "relu"), None),
]


@pytest.mark.parametrize(("tower", "suffix", "llm", "connector", "expected"), CASES)
def test_the_directory_computes_what_the_search_computed(tmp_path, tower, suffix, llm, connector, expected):
    opened = load_tower(tiny.write_tower(tmp_path / "tower", tower) + suffix)
    model = load_llm(f"hf:{tiny.write_llm(tmp_path / 'llm', llm)}", dtype=torch.float32)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stitched, prompter, projector = tiny.stitch(opened, model, connector)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    stitched.save_pretrained(tmp_path / "out")

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == (expected.__name__ if expected else "HymaMLLMForConditionalGeneration")
    assert next(loaded.parameters()).dtype == torch.float32
    text = processor.apply_chat_template(messages(QUESTION), add_generation_prompt=True, tokenize=False)
    images = [tiny.picture(1), tiny.picture(2, (40, 90))]
    inputs = processor(text=[text, text], images=images, return_tensors="pt")

    # The prompt of training, id for id.
    image_token = loaded.config.image_token_id
    after = prompter.prompt(QUESTION)
    wanted = [*prompter.before, *[image_token] * opened.card.tokens, *after]
    assert inputs["input_ids"].tolist() == [wanted, wanted]
    for image, pixels in zip(images, inputs["pixel_values"], strict=True):
        torch.testing.assert_close(pixels, opened.preprocess(image), atol=1e-6, rtol=0)

    with torch.no_grad():
        logits = loaded(**inputs).logits[:, -len(after) :, : model.vocabulary]
    for image, found in zip(images, logits, strict=True):
        wanted_logits = tiny.reference_logits(opened, model, prompter, projector, image, QUESTION)
        torch.testing.assert_close(found, wanted_logits, atol=1e-4, rtol=1e-4)
    assert (logits[0] - logits[1]).abs().max() > 1e-2, "the picture makes no difference"

    answers = [tiny.reference_answer(opened, model, prompter, projector, image, QUESTION) for image in images]
    reloaded = StitchedMLLM.from_pretrained(tmp_path / "out")
    assert reloaded.answer(images, [QUESTION, QUESTION], 12) == answers
    assert reloaded.config == dataclasses.replace(stitched.config, form=reloaded.config.form)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mllm")
    stitched = tiny.stitch_kinds(folder, "clip", "llama", MLP)
    stitched.save_pretrained(folder / "out")
    tiny.picture(3).save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def stitched(parts):
    return StitchedMLLM.from_pretrained(parts / "out")


def test_a_batch_answers_as_each_alone(stitched):
    images = [tiny.picture(n, (30 + 9 * n, 40)) for n in range(3)]
    questions = ["What?", "Is it a picture of a very long and winding road?", "Who is it?"]
    alone = [stitched.answer(image, question, 10) for image, question in zip(images, questions, strict=True)]
    assert stitched.answer(images, questions, 10) == alone
    assert stitched.answer([], []) == []


def test_the_stream_is_the_answer_in_pieces(stitched, monkeypatch):
    pieces = list(stitched.stream(tiny.picture(), "What is it?", max_new_tokens=20))
    assert "".join(pieces).strip() == stitched.answer(tiny.picture(), "What is it?", 20)
    # Words are told as they end; let it write nothing but ends of lines.
    newline = stitched.processor.tokenizer.encode("\n")
    others = [word for word in range(stitched.model.config.text_config.vocab_size) if word not in newline]
    monkeypatch.setattr(stitched.model.generation_config, "suppress_tokens", others)
    assert list(stitched.stream(tiny.picture(), "What is it?", max_new_tokens=5)) == ["\n"] * 5


def test_a_failed_stream_tells_its_reader(stitched, monkeypatch):
    def fail(**_options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(stitched.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stitched.stream(tiny.picture(), "What is it?"))


def test_a_conversation_has_one_picture_in_its_first_turn(stitched):
    text = render(stitched.processor, conversation([("What is it?", "A dog."), ("Which colour?", "Red.")], "Sure?"))
    assert text == (
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"
        "<|im_start|>user\nWhich colour?<|im_end|>\n<|im_start|>assistant\nRed.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_string_with_the_image_token_is_the_same_prompt(stitched):
    """lmms-eval writes turns as strings."""
    turn = [{"role": "user", "content": "<image>\nWhat?"}]
    assert render(stitched.processor, turn) == render(stitched.processor, messages("What?"))
    assert stitched.processor.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) == render(
        stitched.processor, messages("What?")
    )


def test_blind_answers_leave_out_the_pictures_tokens_only(stitched, parts):
    model = load_llm(f"hf:{parts / 'llm'}", dtype=torch.float32)
    from hyma_mllm.data.prompts import Prompter

    prompter = Prompter(model.tokenizer, "tiny", 256, 16)
    questions = ["What?", "Is it a longer question?"]
    answers = []
    for question in questions:
        ids = torch.tensor([[*prompter.before, *prompter.prompt(question)]])
        mask = torch.ones(ids.shape, dtype=torch.bool)
        answers.append(prompter.decode(model.generate(model.embed(ids), mask, 10)[0]))
    assert stitched.blind_answer(questions, 10) == answers


def test_generation_is_greedy_and_ends_where_the_llm_ends(stitched):
    settings = stitched.model.generation_config
    assert settings.do_sample is False
    assert settings.repetition_penalty in (None, 1.0)
    assert settings.eos_token_id == [259]
    assert stitched.model.config.image_token_id in settings.suppress_tokens


@given(
    st.lists(st.lists(st.floats(-20, 20), min_size=3, max_size=3), min_size=2, max_size=6),
    st.lists(st.floats(-3, 3), min_size=3, max_size=3),
)
def test_an_added_token_is_never_likelier_than_one_in_the_vocabularys_size(rows, hidden):
    head = torch.tensor(rows, dtype=torch.float64).float()
    logits = (grown(head, len(rows) + 1) @ torch.tensor(hidden)).double()
    assert torch.equal(grown(head, len(rows) + 1)[:-1], head)
    assert logits.softmax(0)[-1] <= 1 / len(rows) + 1e-4
    assert logits[-1] <= logits[:-1].max() + 1e-3


VANILLA = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hyma_mllm":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
try:
    import hyma_mllm
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("hyma_mllm can be imported")
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

picture, *directories = sys.argv[1:]
for directory in directories:
    model = AutoModelForImageTextToText.from_pretrained(directory)
    processor = AutoProcessor.from_pretrained(directory)
    content = [{"type": "image", "path": picture}, {"type": "text", "text": "What is it?"}]
    turn = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        turn, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=8)
    said = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(type(model).__name__, ascii(said.strip()))
    answer = pipeline("image-text-to-text", model=directory)
    turn[0]["content"][0] = {"type": "image", "image": Image.open(picture)}
    print("pipeline", ascii(answer(turn, max_new_tokens=8, return_full_text=False)[0]["generated_text"].strip()))
"""


def test_it_answers_where_hyma_mllm_is_not_installed(parts, stitched, tmp_path):
    network = tiny.stitch_kinds(tmp_path, "test_efficientnet", "llama", MLP, ":64px")
    network.save_pretrained(tmp_path / "out")
    picture = parts / "picture.png"
    command = [sys.executable, "-I", "-c", VANILLA, str(picture), str(parts / "out"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    llava, fastvlm = (ascii(model.answer(picture, "What is it?", 8)) for model in (stitched, network))
    assert done.stdout.splitlines() == [
        f"LlavaForConditionalGeneration {llava}",
        f"pipeline {llava}",
        f"FastVlmForConditionalGeneration {fastvlm}",
        f"pipeline {fastvlm}",
    ]


def test_the_card_says_how_it_loads_and_what_it_scores(parts):
    card = (parts / "out" / "README.md").read_text()
    assert "plain `LlavaForConditionalGeneration`" in card
    assert "| easy-vqa | 71.2 | 41.0 |" in card
    assert "asked by someone" in card
    assert "import hyma_mllm" not in card


def test_nothing_in_the_directory_says_where_the_parts_lay(parts):
    for file in (parts / "out").glob("*.json"):
        if file.name != "hyma.json":  # ids of local parts are paths
            assert str(parts) not in file.read_text(), file.name


def test_a_model_can_be_saved_in_another_dtype(tmp_path):
    opened = load_tower(tiny.write_tower(tmp_path / "tower", "clip"))
    model = load_llm(f"hf:{tiny.write_llm(tmp_path / 'llm')}", dtype=torch.float32)
    tiny.stitch(opened, model, MLP, torch.bfloat16)[0].save_pretrained(tmp_path / "out")
    loaded = StitchedMLLM.from_pretrained(tmp_path / "out")
    assert {tensor.dtype for tensor in loaded.model.parameters()} == {torch.bfloat16}
    assert isinstance(loaded.answer(tiny.picture(), "What?", 4), str)


def test_a_transparent_picture_is_laid_on_white(stitched):
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    assert stitched.answer(clear, "What?", 8) == stitched.answer(Image.new("RGB", (40, 40), "white"), "What?", 8)
    pixels = stitched.inputs([Image.new("RGB", (40, 40), "white")], [messages("What?")])["pixel_values"]
    assert pixels.min() > 1


def test_a_quantised_llm_is_not_exported(tmp_path):
    opened = load_tower(tiny.write_tower(tmp_path / "tower", "clip"))
    model = load_llm(f"hf:{tiny.write_llm(tmp_path / 'llm')}", quantisation="int8")
    with pytest.raises(HymaError, match="without quantisation"):
        tiny.stitch(opened, model, MLP)


def test_a_projector_of_other_widths_is_a_fault(tmp_path, parts):
    opened = load_tower(tiny.write_tower(tmp_path / "tower", "clip"))
    model = load_llm(f"hf:{parts / 'llm'}", dtype=torch.float32)
    _, prompter, projector = tiny.stitch(opened, model, MLP)
    state = {
        name: tensor[..., :-1] if name == "0.weight" else tensor for name, tensor in projector.state_dict().items()
    }
    config = MLLMConfig(opened.card, model.card, MLP)
    with pytest.raises(ValueError, match="does not join"):
        StitchedMLLM.from_parts(opened, model, prompter, state, config)
    deeper = MLLMConfig(opened.card, model.card, ConnectorSpec(0))
    with pytest.raises(ValueError, match="linear connector has"):
        StitchedMLLM.from_parts(opened, model, prompter, projector.state_dict(), deeper)


@pytest.mark.parametrize(
    "file", ["hyma.json", "config.json", "processor_config.json", "tokenizer.json", "model.safetensors"]
)
def test_a_missing_file_is_named(parts, tmp_path, file):
    shutil.copytree(parts / "out", tmp_path / "out")
    (tmp_path / "out" / file).unlink()
    with pytest.raises(HymaError, match=re.escape(file)) as raised:
        StitchedMLLM.from_pretrained(tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_a_moved_directory_is_named(tmp_path):
    with pytest.raises(HymaError, match="There is no directory"):
        StitchedMLLM.from_pretrained(tmp_path / "gone")


@pytest.mark.parametrize("length", [0, 20, 5000])
def test_damaged_weights_are_named(parts, tmp_path, length):
    shutil.copytree(parts / "out", tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(HymaError, match=r"model\.safetensors"):
        StitchedMLLM.from_pretrained(tmp_path / "out")


def test_a_missing_weight_is_named(parts, tmp_path):
    shutil.copytree(parts / "out", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    del weights["model.multi_modal_projector.linear_1.bias"]
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HymaError, match=r"lack model\.multi_modal_projector\.linear_1\.bias"):
        StitchedMLLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw | {"format": "other"}, "format 'other'"),
        (lambda raw: raw | {"surplus": 1}, "does not hold exactly"),
        (lambda raw: {name: value for name, value in raw.items() if name != "llm"}, "does not hold exactly"),
    ],
)
def test_another_hyma_json_is_refused(parts, tmp_path, change, said):
    shutil.copytree(parts / "out", tmp_path / "out")
    path = tmp_path / "out" / "hyma.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(HymaError, match=said):
        StitchedMLLM.from_pretrained(tmp_path / "out")
    path.write_text("{")
    with pytest.raises(HymaError, match="no JSON"):
        StitchedMLLM.from_pretrained(tmp_path / "out")


def test_bad_questions_and_pictures_are_refused(stitched, tmp_path):
    with pytest.raises(HymaError, match="stands for the picture"):
        stitched.answer(tiny.picture(), "Is <image> it?")
    with pytest.raises(HymaError, match="1 pictures and 2 questions"):
        stitched.answer([tiny.picture()], ["What?", "Who?"])
    with pytest.raises(HymaError, match="one picture"):
        stitched.answer([tiny.picture()], "What?")
    with pytest.raises(HymaError, match="no picture"):
        stitched.answer(tmp_path / "gone.png", "What?")
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(HymaError, match="is refused"):
        stitched.answer(tmp_path / "bad.png", "What?")


def test_a_directory_with_something_else_is_not_overwritten(stitched, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(HymaError, match="something else"):
        stitched.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize(("tower", "expected"), [("dinov2-small@11:112px", LLAVA), ("mobilenetv2:128px", FASTVLM)])
def test_a_packaged_pair_keeps_its_logits(tmp_path, tower, expected):
    opened = load_tower(tower)
    model = load_llm("smollm2-135m", dtype=torch.float32)
    stitched, prompter, projector = tiny.stitch(opened, model, ConnectorSpec(1, model.width, "gelu"))
    stitched.save_pretrained(tmp_path / "out")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(loaded) is expected
    image = tiny.picture(4, (300, 200))
    text = processor.apply_chat_template(messages(QUESTION), add_generation_prompt=True, tokenize=False)
    after = len(prompter.prompt(QUESTION))
    with torch.no_grad():
        logits = loaded(**processor(text=text, images=image, return_tensors="pt")).logits
    wanted = tiny.reference_logits(opened, model, prompter, projector, image, QUESTION)
    torch.testing.assert_close(logits[0, -after:, : model.vocabulary], wanted, atol=1e-4, rtol=1e-4)

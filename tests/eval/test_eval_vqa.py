"""eval/vqa.py: answers in LLaVA's layout, continued after a kill, and scored by the task's metric."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_mllm as tiny
import torch
from PIL import Image

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.data.rows import Row
from hyma_mllm.stitched.mllm import StitchedMLLM
from hyma_mllm.stitched.mllm_evaluation import metric_of, table_rows

TINY = Path(__file__).parents[1] / "stitched" / "tiny_mllm.py"

QUESTIONS = ["What is it?", "Which of the two colours covers more of it?", "Who?", "Is it blue?", "What shape?"]


@pytest.fixture(scope="module")
def best(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vqa")
    stitched = tiny.stitch_kinds(folder, "clip", "llama", ConnectorSpec(1, tiny.WIDTH, "gelu"))
    stitched.save_pretrained(folder / "best")
    return folder / "best"


@pytest.fixture
def pictures(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(3):
        tiny.picture(number).save(tmp_path / "images" / f"p{number}.png")
    return tmp_path / "images"


@pytest.fixture
def textvqa(tmp_path, pictures, best) -> str:
    """Five questions; the human answers to the first two are what the model says."""
    model = StitchedMLLM.from_pretrained(best)
    entries = []
    for number, question in enumerate(QUESTIONS):
        image = Image.open(pictures / f"p{number % 3}.png")
        said = model.answer(image, question, 6) if number < 2 else "nobody says this"
        entry = {"question_id": number, "image_id": f"p{number % 3}", "question": question, "answers": [said] * 10}
        entries.append(entry)
    (tmp_path / "val.json").write_text(json.dumps({"data": entries}))
    return f"textvqa:{tmp_path / 'val.json'},{pictures}"


def command(best: Path, task: str, out: Path, *more: object) -> list[object]:
    return ["--model", best, "--task", task, "--out", out, "--max_new_tokens", 6, "--batch_size", 2, *more]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_scores_and_the_blind_score(script, best, textvqa, pictures, tmp_path):
    out = tmp_path / "answers.jsonl"
    code, shown, _ = script("vqa", *command(best, textvqa, out, "--blind", "true"))
    assert code == 0
    model = StitchedMLLM.from_pretrained(best)
    answers, blind = lines(out), lines(tmp_path / "answers.blind.jsonl")
    assert [set(entry) for entry in answers] == [
        {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    ] * 5
    assert len({entry["answer_id"] for entry in answers + blind}) == 10
    for entry in answers:
        image = Image.open(pictures / (entry["question_id"].split("#")[0] + ".png"))
        assert entry["text"] == model.answer(image, entry["prompt"], 6)
    assert {entry["prompt"]: entry["text"] for entry in blind} == dict(
        zip(QUESTIONS, model.blind_answer(QUESTIONS, 6), strict=True)
    )
    found = json.loads((tmp_path / "answers.scores.json").read_text())
    assert found["metric"] == "vqa"
    assert found["scores"]["accuracy"] == pytest.approx(40)
    assert found["scores"]["questions"] == 5
    assert "40.0" in shown


def test_a_stopped_run_goes_on_and_mends_the_torn_line(script, best, textvqa, tmp_path):
    out, whole = tmp_path / "answers.jsonl", tmp_path / "whole.jsonl"
    assert script("vqa", *command(best, textvqa, whole))[0] == 0
    kept = whole.read_text().splitlines(keepends=True)
    marked = json.loads(kept[0])
    marked["text"] = "kept from before"
    out.write_text(json.dumps(marked) + "\n" + kept[1] + kept[2][:30])
    assert script("vqa", *command(best, textvqa, out))[0] == 0
    found = {entry["question_id"]: entry["text"] for entry in lines(out)}
    wanted = {entry["question_id"]: entry["text"] for entry in lines(whole)}
    assert found == wanted | {marked["question_id"]: "kept from before"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_id": "another"}, "is by another"),
        ({"prompt": "Another question?"}, "does not ask"),
        ({"question_id": "x#9"}, "does not ask"),
        ({"surplus": 1}, "no answer with the fields"),
    ],
)
def test_answers_of_another_run_are_not_continued(script, best, textvqa, tmp_path, change, said):
    out = tmp_path / "answers.jsonl"
    model_id = StitchedMLLM.from_pretrained(best).config.model_id
    entry = {"question_id": "p0#0", "prompt": QUESTIONS[0], "text": "a", "answer_id": "1", "model_id": model_id}
    out.write_text(json.dumps(entry | {"metadata": {}} | change) + "\n")
    before = out.read_text()
    code, _, error = script("vqa", *command(best, textvqa, out))
    assert (code, out.read_text()) == (2, before)
    assert said in error
    assert error.count("\n") == 1


def test_no_json_in_the_answers_is_named(script, best, textvqa, tmp_path):
    out = tmp_path / "answers.jsonl"
    out.write_text("no json\n")
    code, _, error = script("vqa", *command(best, textvqa, out))
    assert code == 2
    assert "line 1" in error


def test_pope_counts_what_it_cannot_read(script, best, pictures, tmp_path):
    entries = [
        {"question_id": n, "image": f"p{n % 3}.png", "text": f"Is there a dog {n}?", "label": ("yes", "no")[n % 2]}
        for n in range(4)
    ]
    (tmp_path / "coco_pope_random.json").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    task = f"pope:{tmp_path / 'coco_pope_random.json'},{pictures}"
    assert script("vqa", *command(best, task, tmp_path / "a.jsonl"))[0] == 0
    found = json.loads((tmp_path / "a.scores.json").read_text())
    assert found["metric"] == "pope"
    assert set(found["scores"]) >= {"accuracy", "precision", "recall", "f1", "yes_ratio", "unreadable", "by_type"}
    assert found["scores"]["unreadable"] == 4, "random letters are neither yes nor no"


def test_questions_without_a_picture_are_answered_without_one(script, best, pictures, tmp_path):
    problem = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "split": "test", "subject": "x"}
    held = {"1": problem | {"image": "image.png"}, "2": problem | {"image": None}}
    (tmp_path / "problems.json").write_text(json.dumps(held))
    (pictures / "test" / "1").mkdir(parents=True)
    tiny.picture(5).save(pictures / "test" / "1" / "image.png")
    task = f"scienceqa:{tmp_path / 'problems.json'},{pictures}"
    assert script("vqa", *command(best, task, tmp_path / "a.jsonl"))[0] == 0
    found = json.loads((tmp_path / "a.scores.json").read_text())
    assert found["metric"] == "multiple-choice"
    assert (found["scores"]["questions"], found["scores"]["image_questions"]) == (2, 1)
    texts = {entry["question_id"]: (entry["prompt"], entry["text"]) for entry in lines(tmp_path / "a.jsonl")}
    prompt, said = texts["test/2#2"]
    assert said == StitchedMLLM.from_pretrained(best).blind_answer([prompt], 6)[0]


@pytest.mark.parametrize(
    ("more", "said"), [(("--batch_size", 0), "batch_size is 0"), (("--limit", -1), "limit -1"), ((), "There is no")]
)
def test_bad_options_are_one_sentence(script, best, textvqa, tmp_path, more, said):
    model = best if more else tmp_path / "gone"
    code, _, error = script("vqa", *command(model, textvqa, tmp_path / "a.jsonl", *more))
    assert code == 2
    assert said in error
    assert not (tmp_path / "a.jsonl").exists()


def test_a_full_device_says_what_to_lower_and_keeps_the_answers(script, best, textvqa, tmp_path, monkeypatch):
    answer, calls = StitchedMLLM.answer, []

    def fails_at_the_second(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer(self, *arguments)

    monkeypatch.setattr(StitchedMLLM, "answer", fails_at_the_second)
    code, _, error = script("vqa", *command(best, textvqa, tmp_path / "a.jsonl"))
    assert code == 2
    assert "lower --batch_size" in error
    assert len(lines(tmp_path / "a.jsonl")) == 2


def test_the_metric_follows_the_task():
    plain = Row("a", b"x", (), "a", question="?", answers=("yes",) * 10)
    choice = Row("b", b"x", (), "b", question="?", answers=("A",), choices=("x", "y"))
    assert metric_of("questions:easy-vqa", [plain]) == "vqa"
    assert metric_of("pope:a.json,b", [plain]) == "pope"
    assert metric_of("scienceqa:a.json,b", [choice]) == "multiple-choice"
    assert metric_of("scienceqa:a.json,b", [choice, plain]) == "vqa"


def test_the_table_lists_types_below_the_measures():
    found = {"accuracy": 50.0, "unreadable": 1, "by_type": {"colour": {"accuracy": 25.0, "questions": 4}}}
    blind = {"accuracy": 10.0, "unreadable": 0, "by_type": {"colour": {"accuracy": 5.0, "questions": 4}}}
    assert table_rows(found, blind) == [
        ("accuracy", "50.0", "10.0"),
        ("unreadable", "1", "0"),
        ("colour (4)", "25.0", "5.0"),
    ]
    assert table_rows(found, None)[0] == ("accuracy", "50.0", "")


LMMS_TASK = """\
task: tiny_questions
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function tiny_questions_utils.visual
doc_to_text: !function tiny_questions_utils.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
LMMS_UTILS = """\
from PIL import Image


def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


@pytest.mark.slow
def test_lmms_eval_runs_on_the_directory(best, pictures, tmp_path):
    pytest.importorskip("lmms_eval")
    model = StitchedMLLM.from_pretrained(best)
    docs = []
    for number in range(3):
        image = pictures / f"p{number}.png"
        docs.append(
            {"image": str(image), "question": QUESTIONS[number], "answer": model.answer(image, QUESTIONS[number], 4)}
        )
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tasks / "tiny_questions.yaml").write_text(LMMS_TASK.format(data=tmp_path / "data.jsonl"))
    (tasks / "tiny_questions_utils.py").write_text(LMMS_UTILS)
    options = ["--model", "llava_hf", "--model_args", f"pretrained={best},device_map=cpu", "--tasks", "tiny_questions"]
    options += ["--include_path", tasks, "--batch_size", "1", "--device", "cpu", "--output_path", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *map(str, options), "--log_samples"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("*results.json")
    scores = json.loads(results.read_text())["results"]["tiny_questions"]
    assert scores["exact_match,none"] == 1.0, "it reads the same prompt and says the same"

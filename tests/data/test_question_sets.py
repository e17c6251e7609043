"""The questions of a run: subsets, names, splits, fingerprints, and the rows that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hyma_mllm.data.question_sets import QuestionConfig, asked, read_questions, set_name
from hyma_mllm.data.rows import Row
from hyma_mllm.errors import HymaError

PICTURES = 60


@pytest.fixture
def spec(tmp_path: Path) -> str:
    """Four questions about each of sixty pictures: one of yes/no with mostly yes, one of three colours."""
    (tmp_path / "images").mkdir()
    questions, annotations = [], []
    for number in range(PICTURES):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "images" / f"p{number}.jpg")
        for place, (text, answer, kind) in enumerate(
            [
                ("Is it round?", "no" if number % 4 == 0 else "yes", "yes/no"),
                ("Which colour?", ("red", "red", "red", "blue")[number % 4], "other"),
            ]
        ):
            ids = {"question_id": 10 * number + place, "image_id": f"p{number}"}
            questions.append(ids | {"question": text})
            annotations.append(ids | {"answers": [{"answer": answer}] * 10, "answer_type": kind})
    (tmp_path / "questions.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    return f"vqa:{tmp_path / 'questions.json'},{tmp_path / 'annotations.json'},{tmp_path / 'images'}"


def config(spec: str, train: int = 0, tests: int = 0, **more: Any) -> QuestionConfig:
    return QuestionConfig(train={spec: train}, tests={spec: tests}, **more)


def test_parts_share_no_picture_and_lose_no_question(spec: str, tmp_path: Path) -> None:
    found = read_questions(config(spec, validation_limit=0), tmp_path / "bad.jsonl")
    assert list(found.tests) == ["vqa questions"]
    parts = [found.train, found.validation, found.tests["vqa questions"]]
    pictures = [{row.concept for row in part} for part in parts]
    assert sum(map(len, pictures)) == len(set().union(*pictures)) == PICTURES
    assert sum(map(len, parts)) == 2 * PICTURES and found.all_rows() == [row for part in parts for row in part]
    assert found.about["splits"] == dict(zip(["train", "validation", "vqa questions"], map(len, parts), strict=True))
    assert (tmp_path / "bad.jsonl").read_text() == ""


def test_limits_balance_types_and_answers(spec: str, tmp_path: Path) -> None:
    found = read_questions(config(spec, train=24, tests=6, validation_limit=4), tmp_path / "bad.jsonl")
    assert (len(found.train), len(found.validation), len(found.tests["vqa questions"])) == (24, 4, 6)
    said = [row.answers[0] for row in found.train]
    # Three in four say yes or red; a balanced subset takes as many of the others while there are some.
    assert said.count("yes") == said.count("no") and said.count("red") == said.count("blue")
    kinds = [row.question_type for row in found.train]
    assert kinds.count("yes/no") == kinds.count("other") == 12


def test_the_subset_and_its_fingerprint_follow_seed_and_words(spec: str, tmp_path: Path) -> None:
    def read(**more: Any) -> tuple[list[str], dict[str, Any]]:
        found = read_questions(config(spec, train=16, **more), tmp_path / "bad.jsonl")
        return [row.key for row in found.train], found.about

    keys, about = read()
    assert read() == (keys, about)
    others, other = read(split_seed=1)
    assert others != keys and other["questions taken"] != about["questions taken"]
    assert other["fingerprints"] == about["fingerprints"]
    assert list(about["fingerprints"]) == [spec] == [entry["name"] for entry in about["attribution"]]
    file = tmp_path / "questions.json"
    file.write_text(file.read_text().replace("Is it round?", "Is it square?"))
    assert read()[1]["fingerprints"] != about["fingerprints"]


def test_a_changed_picture_is_another_fingerprint(spec: str, tmp_path: Path) -> None:
    before = read_questions(config(spec), tmp_path / "bad.jsonl").about["fingerprints"]
    Image.new("RGB", (8, 8), "green").save(tmp_path / "images" / "p7.jpg")
    assert read_questions(config(spec), tmp_path / "bad.jsonl").about["fingerprints"] != before


def test_refused_rows_are_counted_and_listed(spec: str, tmp_path: Path) -> None:
    (tmp_path / "images" / "p3.jpg").write_bytes(b"no picture")
    found = read_questions(config(spec, validation_limit=0, max_bad_fraction=0.1), tmp_path / "bad.jsonl")
    assert len(found.all_rows()) == 2 * PICTURES - 2
    assert "p3" not in {row.concept for row in found.all_rows()}
    listed = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in listed] == ["p3#30", "p3#31"]
    assert all(entry["source"] == spec and "not a picture" in entry["reason"] for entry in listed)
    (tmp_path / "bad.jsonl").unlink()
    with pytest.raises(HymaError, match=r"2 bad rows of 120, .* those listed in .*bad\.jsonl"):
        read_questions(config(spec), tmp_path / "bad.jsonl")
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 2


def test_a_part_without_questions(tmp_path: Path) -> None:
    file = tmp_path / "problems.json"
    problem = {"question": "What?", "choices": ["a", "b"], "answer": 0, "image": "1.png", "split": "train"}
    problems = {str(number): problem | {"image": f"{number}.png"} for number in range(20)}
    for number in problems:
        (tmp_path / number).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / number / f"{number}.png")
    file.write_text(json.dumps(problems))
    spec = f"scienceqa:{file},{tmp_path}"
    with pytest.raises(HymaError, match="has no question in the part that is asked for"):
        read_questions(config(spec), tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train": {"questions:easy-vqa": -1}}, "The limit of questions:easy-vqa is -1"),
        ({"validation_limit": -2}, "The limit of validation_limit is -2"),
        ({"validation": 0.0}, "data.validation is 0.0"),
        ({"validation": 0.5, "test": 0.5}, "leave a part for training"),
        ({"tests": {"gqa:a/val.json,i": 0, "gqa:b/val.json,i": 0}}, "both called gqa val"),
    ],
)
def test_wrong_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(HymaError, match=said):
        QuestionConfig(**options)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("questions:easy-vqa", "easy-vqa"),
        ("questions:easy-vqa/test", "easy-vqa"),
        ("questions:corpora+fluent", "corpora+fluent"),
        ("textvqa:/data/val.json,/data/images", "textvqa val"),
        ("vqa:q.json,a.json,images", "vqa q"),
    ],
)
def test_names(spec: str, name: str) -> None:
    assert set_name(spec) == name


def test_the_suffix_goes_behind_questions_of_one_turn_only() -> None:
    plain = Row("k", b"x", (), "c", question="What?", answers=("a",))
    talk = Row("k", b"x", (), "c", question="What?", answers=("a",), turns=(("What?", "a"),))
    assert (asked(plain, " Short."), asked(talk, " Short.")) == ("What? Short.", "What?")


def test_a_picture_that_is_trained_on_through_another_source_is_said(
    spec: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read_questions(config(spec), tmp_path / "bad.jsonl")
    assert "trained on" not in caplog.text
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a disc"}]
    talks = [{"id": str(n), "image": f"p{n}.jpg", "conversations": said} for n in range(PICTURES)]
    (tmp_path / "mix.json").write_text(json.dumps(talks))
    mixed = QuestionConfig(train={f"llava:{tmp_path / 'mix.json'},{tmp_path / 'images'}": 0}, tests={spec: 0})
    read_questions(mixed, tmp_path / "bad.jsonl")
    assert "questions of vqa questions are about pictures that are trained on" in caplog.text

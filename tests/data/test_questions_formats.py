"""Every published form of questions, in small files as their publishers write them, and each way they can be wrong."""

import json
from collections import Counter

import pytest
from PIL import Image

from hyma_mllm.data.questions import SplitShares, good_parts, open_questions
from hyma_mllm.data.questions_audit import audit_questions
from hyma_mllm.errors import HymaError


@pytest.fixture
def folder(tmp_path):
    """Write json files and pictures, and name them in a spec."""
    images = tmp_path / "images"
    images.mkdir()

    class Folder:
        def picture(self, *names):
            for name in names:
                (images / name).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), "red").save(images / name)

        def write(self, name, held):
            text = held if isinstance(held, str) else json.dumps(held)
            (tmp_path / name).write_text(text)
            return tmp_path / name

        def spec(self, form, *files):
            return f"{form}:{','.join(map(str, files))},{images}"

        def open(self, form, held, **options):
            return open_questions(self.spec(form, self.write("questions.json", held)), **options)

    return Folder()


def only(source):
    (row,) = source.rows()
    return row


def test_a_conversation_is_one_row_with_all_its_turns(folder):
    folder.picture("coco/1.jpg")
    said = ["<image>\nWhat is it?", "A dog.", "What colour?", "Brown."]
    talk = [{"from": speaker, "value": text} for speaker, text in zip(["human", "gpt"] * 2, said, strict=True)]
    row = only(folder.open("llava", [{"id": "a7", "image": "coco/1.jpg", "conversations": talk}]))
    assert (row.key, row.image.name, row.concept, row.texts) == ("coco/1.jpg#a7", "1.jpg", "coco/1.jpg", ())
    assert row.turns == (("What is it?", "A dog."), ("What colour?", "Brown."))
    assert (row.question, row.answers, row.question_type) == ("What is it?", ("A dog.",) * 10, "conversation")


def test_captions_are_conversations_and_rows_without_a_picture_are_refused_and_counted(folder):
    folder.picture("1.jpg")

    def talk(answer):
        return [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": answer}]

    source = folder.open(
        "llava",
        [
            {"id": "1", "image": "1.jpg", "conversations": talk("a dog")},
            {"id": "2", "conversations": talk("no picture here")},
        ],
    )
    checked = audit_questions(source, max_bad_fraction=0.5)
    assert [row.turns for row in checked.rows] == [(("Describe it.", "a dog"),)]
    assert [(bad.key, bad.reason) for bad in checked.bad] == [("2", "there is no picture")]
    assert len(audit_questions(source, without_picture=True).rows) == 2
    with pytest.raises(HymaError, match=r"1 bad rows of 2, .* the first being 2 \(there is no picture\)"):
        audit_questions(source)


@pytest.mark.parametrize(
    ("talk", "words"),
    [
        ([("gpt", "Hello"), ("human", "What?")], "the speakers gpt, human; it must go human, gpt"),
        ([("human", "What?")], "the speakers human"),
        ([("human", "What?"), ("gpt", "<image>")], "row 0 has an empty answer"),
        ([], r"row 0 has the conversations \[\]; give a list that is not empty"),
    ],
)
def test_a_bad_conversation_is_named(folder, talk, words):
    folder.picture("1.jpg")
    talk = [{"from": speaker, "value": text} for speaker, text in talk]
    with pytest.raises(HymaError, match=words):
        folder.open("llava", [{"id": "1", "image": "1.jpg", "conversations": talk}])


def vqa_files(folder, ids=(1000, 1001), answered=None):
    questions = {
        "data_subtype": "val2014",
        "questions": [{"image_id": 42, "question": f"What is {number}?", "question_id": number} for number in ids],
    }
    annotations = {
        "annotations": [
            {
                "question_type": "what is",
                "answer_type": "other",
                "multiple_choice_answer": "net",
                "answers": [{"answer": f"net {k // 9}", "answer_confidence": "yes", "answer_id": k} for k in range(10)],
                "image_id": 42,
                "question_id": number,
            }
            for number in (ids if answered is None else answered)
        ]
    }
    return folder.write("questions.json", questions), folder.write("annotations.json", annotations)


def test_vqa_joins_questions_annotations_and_coco_names(folder):
    folder.picture("COCO_val2014_000000000042.jpg")
    first, second = open_questions(folder.spec("vqa", *vqa_files(folder))).rows()
    assert (first.key, second.key) == ("42#1000", "42#1001")
    assert (first.question, first.question_type, first.concept) == ("What is 1000?", "other", "42")
    assert Counter(first.answers) == {"net 0": 9, "net 1": 1}
    assert first.image.name == "COCO_val2014_000000000042.jpg"


def test_pictures_of_coco_2017_are_found_by_their_number(folder):
    folder.picture("000000000042.jpg")
    assert next(open_questions(folder.spec("vqa", *vqa_files(folder))).rows()).image.name == "000000000042.jpg"


def test_annotations_of_other_questions_are_refused(folder):
    folder.picture("000000000042.jpg")
    with pytest.raises(
        HymaError, match=r"1 of the question ids in .*questions.json are not in .*annotations.json, 1001"
    ):
        open_questions(folder.spec("vqa", *vqa_files(folder, answered=(1000,))))
    with pytest.raises(HymaError, match=r"2 of the question ids in .*annotations.json are not in .*questions.json, 7"):
        open_questions(folder.spec("vqa", *vqa_files(folder, ids=(5,), answered=(5, 7, 8))))


def test_annotations_of_another_picture_are_refused(folder):
    folder.picture("000000000042.jpg")
    questions, annotations = vqa_files(folder)
    annotations.write_text(annotations.read_text().replace('"image_id": 42', '"image_id": 43'))
    with pytest.raises(HymaError, match=r"Question 1000 asks about picture 42 in .* and about 43 in"):
        open_questions(folder.spec("vqa", questions, annotations))


def test_a_missing_picture_is_named_with_its_row(folder):
    with pytest.raises(HymaError, match=r"Row 0 of .*questions.json asks about 42.jpg, which is not in .*images; add"):
        open_questions(folder.spec("vqa", *vqa_files(folder)))


def test_ids_that_stand_twice_are_refused(folder):
    folder.picture("000000000042.jpg")
    with pytest.raises(HymaError, match=r"The id 5 stands twice in .*questions.json, in row 0 and row 1"):
        open_questions(folder.spec("vqa", *vqa_files(folder, ids=(5, 5), answered=(5,))))


def textvqa(**changes):
    return {
        "image_id": "0a",
        "question": "what?",
        "question_id": 3,
        "answers": ["a"] * 10,
        "image_classes": [],
    } | changes


def test_textvqa(folder):
    folder.picture("0a.jpg")
    row = only(folder.open("textvqa", {"dataset_type": "val", "data": [textvqa()]}))
    assert (row.key, row.question, row.answers) == ("0a#3", "what?", ("a",) * 10)
    # A single answer is repeated: one alone can score nothing when it is left out.
    assert only(folder.open("textvqa", {"data": [textvqa(answers=["b"])]})).answers == ("b",) * 10


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ("{", "is no json: .* in line 1, column 2; mend"),
        ([1], "holds no list under `data`"),
        ({"data": []}, "holds no list under `data`"),
        ({"data": ["x"]}, "row 0 is 'x'; it must be a json object"),
        ({"data": [textvqa(question="  ")]}, "row 0 has the question '  '; give a text"),
        ({"data": [textvqa(answers="yes")]}, "row 0 has the answers 'yes'; give a list"),
        ({"data": [textvqa(answers=[1])]}, "give texts, or objects with the field answer"),
        ({"data": [textvqa(answers=["", " "])]}, "at least one must say something"),
        (
            {"data": [{"image_id": "0a", "questions": "?", "question_id": 1}]},
            "no field question; did you mean question",
        ),
    ],
)
def test_bad_json_is_named(folder, held, words):
    folder.picture("0a.jpg")
    with pytest.raises(HymaError, match=words):
        folder.open("textvqa", held)


def test_gqa_answers_are_repeated_and_typed(folder):
    folder.picture("2354786.jpg")
    asked = {
        "question": "Is the sky dark?",
        "imageId": "2354786",
        "answer": "yes",
        "types": {"detailed": "verify", "semantic": "global", "structural": "verify"},
    }
    row = only(folder.open("gqa", {"02930152": asked}))
    assert (row.key, row.answers, row.question_type) == ("2354786#02930152", ("yes",) * 10, "verify")
    with pytest.raises(HymaError, match="The name 1 stands twice in one object"):
        folder.open("gqa", '{"1": {}, "1": {}}')
    with pytest.raises(HymaError, match="question 7 has no field imageId"):
        folder.open("gqa", {"7": {"question": "?", "answer": "no"}})


def test_pope(folder, tmp_path):
    folder.picture("COCO_val2014_000000310196.jpg")
    line = {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a cat?", "label": "no"}
    file = folder.write("coco_pope_random.json", json.dumps(line) + "\n\n" + json.dumps(line | {"question_id": 2}))
    first, second = open_questions(folder.spec("pope", file)).rows()
    assert (first.answers, first.question, first.question_type) == (("no",) * 10, "Is there a cat?", "random")
    assert second.key.endswith("#2")
    with pytest.raises(HymaError, match="row 0 has the label 'maybe'; give yes or no"):
        folder.open("pope", json.dumps(line | {"label": "maybe"}))
    with pytest.raises(HymaError, match=r"Line 2 of .* is no json"):
        folder.open("pope", json.dumps(line) + "\n{")
    with pytest.raises(HymaError, match="The id 1 stands twice"):
        folder.open("pope", json.dumps(line) + "\n" + json.dumps(line))


PROBLEM = {
    "question": "Which?",
    "choices": ["a fox", "a log"],
    "answer": 1,
    "hint": "Look.",
    "split": "test",
    "subject": "x",
}


def test_scienceqa_all_and_image_only(folder):
    folder.picture("test/5/image.png")
    problems = {"5": PROBLEM | {"image": "image.png"}, "6": PROBLEM | {"image": None, "hint": "", "split": "val"}}
    source = folder.open("scienceqa", problems)
    with_picture, without = source.rows()
    assert with_picture.question == "Context: Look.\nWhich?\nA. a fox\nB. a log"
    assert (with_picture.answers, with_picture.choices, with_picture.key) == (
        ("B",) * 10,
        ("a fox", "a log"),
        "test/5#5",
    )
    assert (without.image, without.question) == (b"", "Which?\nA. a fox\nB. a log")
    assert {part: len(rows) for part, rows in source.parts.items()} == {"train": 0, "validation": 1, "test": 1}
    parts, refused = good_parts(source, max_bad_fraction=0.5)
    assert (parts["test"], [bad.key for bad in refused]) == ([with_picture], ["val/6#6"])
    assert [row.key for row in folder.open("scienceqa-image", problems).rows()] == ["test/5#5"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answer": 2}, "question 5 has the answer 2; give the number of one of its 2 choices"),
        ({"split": "dev"}, "question 5 has the split 'dev'; give one of train, val, test"),
        ({"image": "image.png"}, "Question 5 of .* asks about test/5/image.png, which is not in"),
        ({"choices": []}, r"question 5 has the choices \[\]"),
    ],
)
def test_bad_scienceqa(folder, changes, words):
    with pytest.raises(HymaError, match=words):
        folder.open("scienceqa", {"5": PROBLEM | changes})


def test_files_are_split_by_picture(folder):
    folder.picture(*(f"{number}.jpg" for number in range(40)))
    asked = [textvqa(image_id=str(number // 3), question_id=number) for number in range(120)]
    source = folder.open("textvqa", {"data": asked}, shares=SplitShares(seed=1, validation=0.2, test=0.2))
    pictures = {part: {row.concept for row in rows} for part, rows in source.parts.items()}
    assert sum(map(len, pictures.values())) == 40
    assert all(pictures.values())
    assert good_parts(source)[0] == source.parts
    with pytest.raises(HymaError, match="too few"):
        _ = folder.open("textvqa", {"data": asked[:1]}).parts


def test_the_fingerprint_follows_words_and_pictures(folder, tmp_path):
    folder.picture("0a.jpg")
    first = folder.open("textvqa", {"data": [textvqa()]}).fingerprint
    assert folder.open("textvqa", {"data": [textvqa()]}).fingerprint == first
    assert folder.open("textvqa", {"data": [textvqa(question="who?")]}).fingerprint != first
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "images" / "0a.jpg")
    assert folder.open("textvqa", {"data": [textvqa()]}).fingerprint != first


def test_an_unreadable_picture_is_refused_once_for_all_its_questions(folder, tmp_path):
    (tmp_path / "images" / "0a.jpg").write_bytes(b"no picture")
    source = folder.open("textvqa", {"data": [textvqa(), textvqa(question_id=4)]})
    checked = audit_questions(source, max_bad_fraction=1)
    assert [bad.reason for bad in checked.bad] == ["not a picture in a known format"] * 2
    assert len(audit_questions(source, check_pictures=False).rows) == 2


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("textvq:a.json,images", "has no known form; did you mean textvqa"),
        ("photos", "has no known form"),
        ("textvqa:a.json", "names 1 places; give `textvqa:FILE.json,IMAGES`"),
        ("vqa:a.json,images", "give `vqa:QUESTIONS.json,ANNOTATIONS.json,IMAGES`"),
        ("gqa:a.json,", "names 2 places"),
        ("gqa:none.json,none", "none.json does not exist"),
        ("questions:easy-vqu", "no built-in questions easy-vqu; did you mean easy-vqa"),
        ("questions:easy-vqa/tset", "has no part tset; did you mean test"),
        ("questions:easy-vqa+fluent", "adds corpora to easy-vqa"),
        ("questions:corpora+fluentt", "no built-in corpus fluentt; did you mean fluent"),
    ],
)
def test_a_wrong_spec_is_named(spec, words):
    with pytest.raises(HymaError, match=words):
        open_questions(spec)


def test_a_missing_picture_folder_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"data": [{}]}')
    with pytest.raises(HymaError, match=r"The picture folder .*gone does not exist"):
        open_questions(f"textvqa:{tmp_path / 'a.json'},{tmp_path / 'gone'}")

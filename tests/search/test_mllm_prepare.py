"""From rows to the causal task: pictures numbered once, words checked, parts that must not be empty."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_mllm as tiny
import torch

from hyma_mllm.data.pictures import open_picture
from hyma_mllm.data.prompts import IGNORE, Prompter, Turn
from hyma_mllm.data.question_sets import QuestionSets
from hyma_mllm.data.rows import Row
from hyma_mllm.data.token_library import TokenConfig, TokenLibrary
from hyma_mllm.errors import HymaError
from hyma_mllm.search.mllm_prepare import encode_rows, number_pictures, picture_key, prepare_mllm, turns_of
from hyma_mllm.search.mllm_score import score_answers
from hyma_mllm.search.mllm_task import MLLMTask
from hyma_mllm.search.placement import Placement
from hyma_mllm.zoo.llm import llm_card, load_llm, load_tokenizer
from hyma_mllm.zoo.vision_tokens import load_tower, tower_card


def row(key: str, image: Any, question: str | None = "What?", answers: tuple[str, ...] = ("red",) * 10) -> Row:
    return Row(key, image, (), "c", question=question, answers=answers)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    folder = tmp_path_factory.mktemp("models")
    tower = tiny.write_tower(folder / "tower", "clip")
    return tower, f"hf:{tiny.write_llm(folder / 'llama')}", f"hf:{tiny.write_llm(folder / 'qwen2', 'qwen2')}"


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        tiny.picture(number).save(path)
    return paths


def test_every_picture_is_numbered_once(pictures: list[Path]) -> None:
    held = [path.read_bytes() for path in pictures[:2]]
    rows = [row(str(place), image) for place, image in enumerate([pictures[0], held[0], pictures[1], *pictures[:1]])]
    rows += [row("4", held[1]), row("5", held[0])]
    found, number = number_pictures(rows)
    assert [picture.image for picture in found] == [pictures[0], held[0], pictures[1], held[1]]
    assert number.tolist() == [0, 1, 2, 0, 3, 1] and number.dtype == torch.int64
    assert len({picture.key for picture in found}) == 4 and found[0].key == picture_key(rows[0])


def test_a_file_that_is_written_anew_is_another_picture(pictures: list[Path]) -> None:
    before = picture_key(row("k", pictures[0]))
    assert picture_key(row("other", pictures[0])) == before
    os.utime(pictures[0], ns=(1, 1))
    assert picture_key(row("k", pictures[0])) != before


def test_turns_are_the_rows_own_or_the_question_with_its_usual_answer() -> None:
    asked = row("k", b"x", answers=("blue", "red", "red"))
    assert turns_of(asked, " Short.") == [Turn("What? Short.", "red")]
    talk = Row("k", b"x", (), "c", question="a", answers=("b",), turns=(("a", "b"), ("c", "d")))
    assert turns_of(talk, " Short.") == [Turn("a", "b"), Turn("c", "d")]
    for lacking in (row("r7", b"x", question=None), row("r7", b"x", answers=())):
        with pytest.raises(HymaError, match="The row r7 has no question or no answer"):
            turns_of(lacking, "")


def test_rows_that_cannot_be_written_are_named_and_cut_ones_counted(
    models: tuple[str, str, str], caplog: pytest.LogCaptureFixture
) -> None:
    prompter = Prompter(load_tokenizer(llm_card(models[1])), "llama", 120, 4)
    good = [row("a", b"x"), row("b", b"x", question="What is it? " * 20)]
    encoded = encode_rows(prompter, good, "llama", " Short.")
    assert [found.cut > 0 for found in encoded] == [False, True]
    assert "1 of 2 rows were too long" in caplog.text
    spelt = [label for label in encoded[1].labels if label != IGNORE]
    assert prompter.decode(spelt) == "red"
    with pytest.raises(HymaError, match=r"row c takes .* maximum length is 120"):
        encode_rows(prompter, [*good, row("c", b"x", answers=("red " * 40,))], "llama")


def prepare(
    models: tuple[str, str, str], sets: QuestionSets, cache: Path, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> MLLMTask:
    monkeypatch.setenv("HYMA_CACHE", str(cache))
    towers, llms = [tower_card(models[0])], [llm_card(name) for name in models[1:]]
    load = partial(load_llm, dtype=torch.float32)
    library = TokenLibrary(TokenConfig(storage_dtype="fp32"))
    placement = more.get("placement", Placement())
    return prepare_mllm(towers, llms, load, placement, sets, library, score_answers, 200, 3, 4)


@pytest.mark.parametrize("empty", ["training", "validation", "held out"])
def test_a_part_without_questions_is_named_before_a_model_is_opened(empty: str) -> None:
    parts = {name: [] if name == empty else [row("k", b"x")] for name in ("training", "validation", "held out")}
    sets = QuestionSets(parts["training"], parts["validation"], {"held out": parts["held out"]}, "")

    def fail(_: object) -> Any:
        raise AssertionError("a model was opened")

    with pytest.raises(HymaError, match=f"The {empty} questions are none"):
        prepare_mllm([], [], fail, Placement(), sets, TokenLibrary(TokenConfig()), score_answers, 200, 3, 4)


def test_the_task_holds_every_question_with_its_picture(
    models: tuple[str, str, str], pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(str(number), pictures[(number * 5) % 6]) for number in range(12)]
    sets = QuestionSets(rows[:6], rows[6:8], {"one": rows[8:9], "two": rows[9:]}, " Short.")
    task = prepare(models, sets, tmp_path / "cache", monkeypatch)
    assert (task.train.tolist(), task.validation.tolist()) == (list(range(6)), [6, 7])
    assert {name: part.tolist() for name, part in task.tests.items()} == {"one": [8], "two": [9, 10, 11]}
    assert [reader.model.card.id for reader in task.readers.values()] == list(models[1:])
    tower = load_tower(models[0])
    raw = {path: tower.tokens(tower.preprocess(open_picture(path))[None])[0] for path in pictures}
    trained = torch.stack([raw[asked.image] for asked in rows[:6]]).flatten(0, 1)
    mean, spread = trained.mean(0), trained.std(0, correction=0)
    for number, asked in enumerate(rows):
        found = task.towers[0].read(task.picture[torch.tensor([number])])[0]
        torch.testing.assert_close(found, (raw[asked.image] - mean) / spread, atol=1e-3, rtol=1e-3)
    for reader in task.readers.values():
        assert all(reader.prompter.decode([i for i in line.labels if i != IGNORE]) == "red" for line in reader.encoded)


def test_a_process_opens_its_own_llms_only(
    models: tuple[str, str, str], pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(str(number), pictures[number]) for number in range(6)]
    sets = QuestionSets(rows[:3], rows[3:4], {"held out": rows[4:]}, "")
    # What the other process knows of its LLM comes by gather_object; here it is played back.
    own = prepare(models, sets, tmp_path / "cache", monkeypatch)
    monkeypatch.setattr("hyma_mllm.search.mllm_prepare.gather_object", lambda mine: [*mine, (0, own.facts[0])])
    task = prepare(models, sets, tmp_path / "cache", monkeypatch, placement=Placement(2, 1, (0, 1), 2))
    assert list(task.readers) == [1] and task.readers[1].model.card.id == models[2]
    assert task.facts[0] is own.facts[0] and task.facts[1].embedding_rms == own.facts[1].embedding_rms

"""Every bad input of recipes/mllm.py: one sentence, exit code 2, before expensive work, nothing half-written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mllm_run as tiny_run
import pytest
import torch

from hyma_mllm import command
from hyma_mllm.search.mllm_task import MLLMTask

sentence_of = tiny_run.sentence_of

Recipe = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models and questions that no test changes."""
    return tiny_run.make_world(tmp_path_factory.mktemp("models"))


@pytest.fixture
def world(tmp_path: Path, models: Any) -> Any:
    """Questions of the test's own, and one tower and LLM."""
    own = tiny_run.make_world(tmp_path)
    return tiny_run.World(own.folder, models.towers[:1], models.llms[:1])


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Recipe:
    monkeypatch.setenv("HYMA_CACHE", str(tmp_path / "cache"))

    def call(*arguments: str) -> tuple[int, str, str]:
        found: tuple[int, str, str] = tiny_run.run_recipe(monkeypatch, capfd, *arguments)
        return found

    return call


def nothing_is_there(tmp_path: Path) -> bool:
    return not (tmp_path / "run").exists() and no_tokens(tmp_path)


def no_tokens(tmp_path: Path) -> bool:
    return not (tmp_path / "cache" / "features").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--towers=[dinov2-smal:56px]", "did you mean dinov2-small"),
        ("--llms=[smollm2-136m]", "did you mean smollm2-135m"),
        ("--llms=[gemma3-270m]", "--accept-terms gemma"),
        ("--llm.longest_answer=0", "llm.longest_answer is 0"),
        ("--llm.max_length=20", "raise it or take fewer image tokens"),
        ("--answer_batch=0", "answer_batch is 0"),
        ("--search.sampler=round --search.parallel=pairs", "set search.sampler to fair"),
        ("--search.pairs_per_visit=9", "search.pairs_per_visit is 9"),
        ("--data.test=1.5", "data.test is 1.5"),
        ("--data.validation_limit=-1", "validation_limit is -1"),
        ('--data.tests={"questions:easy-vqa": 3, "questions:easy-vqa/test": 0}', "both called easy-vqa"),
        ('--data.train={"questions:easy-vqb": 3}', "easy-vqa"),
        ('--data.train={"coco:x.json,images": 3}', "no known form"),
        ("--tokens.disk_gb=-1", "tokens.disk_gb is -1"),
        ("--processes=3", "the launcher started 1"),
    ],
)
def test_options(option: str, said: str, models: Any, recipe: Recipe, tmp_path: Path) -> None:
    more = option.split(" ") if option.count(" --") else [option]
    assert said in sentence_of(recipe(*models.options(tmp_path / "run", *more)))
    assert nothing_is_there(tmp_path)


def test_a_missing_picture(world: Any, recipe: Recipe, tmp_path: Path) -> None:
    (world.images / "red02.jpg").unlink()
    said = sentence_of(recipe(*world.options(tmp_path / "run")))
    assert "red02.jpg" in said and "mix.json" in said
    assert nothing_is_there(tmp_path)


def test_annotations_of_other_questions(world: Any, recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "annotations.json"
    held = json.loads(file.read_text())
    held["annotations"][0]["question_id"] = 999
    file.write_text(json.dumps(held))
    said = sentence_of(recipe(*world.options(tmp_path / "run")))
    assert "questions.json" in said and "annotations.json" in said and "same split" in said
    assert nothing_is_there(tmp_path)


def test_a_template_that_drops_the_answer(world: Any, recipe: Recipe, tmp_path: Path) -> None:
    template = tmp_path / "llama" / "chat_template.jinja"
    mute = "{{ message['content'] if message['role'] == 'user' else '' }}"
    template.write_text(tiny_run.tiny.CHATML.replace("' + message['content'] + '", "' }}" + mute + "{{ '"))
    said = sentence_of(recipe(*world.options(tmp_path / "run", f"--llms=['hf:{tmp_path / 'llama'}']")))
    assert str(tmp_path / "llama") in said and "the answer" in said and "correct the template" in said
    assert nothing_is_there(tmp_path)


def test_an_answer_that_is_longer_than_the_context(world: Any, recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "mix.json"
    held = json.loads(file.read_text())
    for entry in held:
        entry["conversations"][1]["value"] = "red " * 60
    file.write_text(json.dumps(held))
    said = sentence_of(recipe(*world.options(tmp_path / "run", "--llm.max_length=200")))
    assert ".jpg#" in said and "maximum length is 200" in said
    assert no_tokens(tmp_path)


def test_a_batch_larger_than_the_data(world: Any, recipe: Recipe, tmp_path: Path) -> None:
    limited = f"--data.train={json.dumps({world.tests: 4})}"
    assert "there are 4 training questions" in sentence_of(recipe(*world.options(tmp_path / "run", limited)))
    assert nothing_is_there(tmp_path)
    assert "search.batch is 500" in sentence_of(recipe(*world.options(tmp_path / "run", "--search.batch=500")))
    assert no_tokens(tmp_path)


def test_bad_rows_are_all_listed(world: Any, recipe: Recipe, tmp_path: Path) -> None:
    for name in ("red02", "blue03"):
        (world.images / f"{name}.jpg").write_bytes(b"no picture")
    said = sentence_of(recipe(*world.options(tmp_path / "run")))
    assert "2 bad rows of 40" in said and "bad_rows.jsonl" in said and "data.max_bad_fraction" in said
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["source"], row["key"].split("#")[0]) for row in listed] == [
        (world.train, "red02.jpg"), (world.train, "blue03.jpg"),
    ]  # fmt: skip
    assert no_tokens(tmp_path)


def test_data_that_changed_since_the_run_began(
    world: Any, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MLLMTask, "losses", full_gpu)
    sentence_of(recipe(*world.options(tmp_path / "run")))
    file = tmp_path / "mix.json"
    file.write_text(file.read_text().replace("Colour?", "What colour?"))
    assert "has changed since the run" in sentence_of(recipe(*world.options(tmp_path / "run")))


def full_gpu(*_: object) -> torch.Tensor:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_gpu_that_is_full_keeps_its_checkpoint(
    world: Any, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = world.options(tmp_path / "run", "--search.methods=[hyma]")
    losses, calls = MLLMTask.losses, []

    def full_at_the_third(self: MLLMTask, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        return full_gpu() if len(calls) == 3 else losses(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(MLLMTask, "losses", full_at_the_third)
        said = sentence_of(recipe(*options))
    assert "memory of the GPU is full" in said
    assert all(name in said for name in ("search.batch", "llm.checkpointing", "answer_batch"))
    assert list((tmp_path / "run" / "checkpoints").rglob("*"))
    code, out, err = recipe(*options, "--llm.checkpointing=true", "--answer_batch=2")
    assert code == 0, err
    assert "going on from step 2" in out


@pytest.mark.parametrize(
    ("error", "device"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "GPU"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), "machine"),
        (MemoryError(), "machine"),
    ],
)
def test_every_kind_of_full_memory(error: Exception, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        command.run(main, "lower batch and run again")
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: The memory of the {device} is full; lower batch and run again.\n"

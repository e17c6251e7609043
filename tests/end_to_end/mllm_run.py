"""A search over tiny random models and pictures of two colours, and recipes/mllm.py as a user or a test starts it."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from hyma_mllm import cli

TESTS = Path(__file__).parents[1]
RECIPE = TESTS.parent / "recipes" / "mllm.py"
EVIL = "<script>alert(1)</script>"
COLOURS = {"red": ("red", (230, 20, 20)), "blue": (EVIL, (20, 20, 230))}
"""Name of a picture -> (what people say when they are asked for its colour, the colour)."""
PICTURES = 40


def load(path: Path) -> ModuleType:
    """A helper of the tests by its path: they are no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = load(TESTS / "stitched" / "tiny_mllm.py")


@dataclass
class World:
    """Models, pictures and questions in one folder.

    Attributes:
        folder: holds it all, and the cache of tokens.
        towers, llms: names of the models.
    """

    folder: Path
    towers: tuple[str, str]
    llms: tuple[str, str]

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def train(self) -> str:
        return f"llava:{self.folder / 'mix.json'},{self.images}"

    @property
    def tests(self) -> str:
        return f"vqa:{self.folder / 'questions.json'},{self.folder / 'annotations.json'},{self.images}"

    def options(self, run: Path, *more: str) -> list[str]:
        """A run of seconds; `more` wins."""
        return [
            f"--run={run}",
            f"--towers={json.dumps(self.towers)}",
            f"--llms={json.dumps(self.llms)}",
            f"--data.train={json.dumps({self.train: 0, self.tests: 12})}",
            f"--data.tests={json.dumps({self.tests: 0})}",
            "--data.suffix= Short.",
            "--data.validation_limit=6",
            "--data.validation=0.2",
            "--data.test=0.25",
            "--llm.dtype=fp32",
            "--tokens.storage_dtype=fp32",
            "--search.methods=[hyma, grid]",
            "--search.seeds=[0]",
            "--search.batch=8",
            "--search.steps=4",
            "--search.grid_steps=3",
            "--search.evaluate_every=2",
            "--search.checkpoint_every=1",
            *more,
        ]


def make_world(folder: Path) -> World:
    """Two towers of different lengths, two families of LLMs, conversations, and questions with annotations."""
    towers = f"{tiny.write_tower(folder / 'dinov2', 'dinov2')}:16px", tiny.write_tower(folder / "clip", "clip")
    llms = tuple(f"hf:{tiny.write_llm(folder / family, family)}" for family in ("llama", "qwen2"))
    world = World(folder, towers, llms)
    world.images.mkdir()
    talks, questions, annotations = [], [], []
    for number in range(PICTURES):
        name = list(COLOURS)[number % 2]
        said, colour = COLOURS[name]
        picture = f"{name}{number:02d}"
        Image.new("RGB", (40, 40), (*colour[:1], number, *colour[2:])).save(world.images / f"{picture}.jpg")
        turns = [("human", "<image>\nColour?"), ("gpt", said), ("human", "Sure?"), ("gpt", "yes")][: 2 + number % 3]
        turns = turns[: len(turns) // 2 * 2]
        conversations = [{"from": speaker, "value": text} for speaker, text in turns]
        talks.append({"id": str(number), "image": f"{picture}.jpg", "conversations": conversations})
        questions.append({"question_id": number, "image_id": picture, "question": "Which <b>colour</b>?"})
        answers = [{"answer": said}] * 9 + [{"answer": "none"}]
        annotations.append({"question_id": number, "image_id": picture, "answers": answers, "answer_type": "colour"})
    (folder / "mix.json").write_text(json.dumps(talks))
    (folder / "questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    return world


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_recipe(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """The recipe in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *arguments])
    capfd.readouterr()
    reset_accelerate()
    code = 0
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        reset_accelerate()
    return code, *capfd.readouterr()


def start_recipe(world: World, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """The recipe as a user starts it, to its end."""
    environment = os.environ | {"HYMA_CACHE": str(world.folder / "cache")}
    command = [sys.executable, str(RECIPE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def hyma(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The `hyma` command in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["hyma", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def sentence_of(outcome: tuple[int, str, str]) -> str:
    """The one sentence of a refusal."""
    code, _, err = outcome
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert code == 2, err
    assert len(errors) == 1 and lines[-1] == errors[0], err
    assert "Traceback" not in err
    return errors[0]

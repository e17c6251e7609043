"""A tiny exported MLLM and eight conversations, and recipes/finetune.py as a user starts it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import tiny_mllm as tiny
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from hyma_mllm.connectors import ConnectorSpec

RECIPE = Path(__file__).parents[2] / "recipes" / "finetune.py"
COLOURS = {"red": (230, 20, 20), "blue": (20, 20, 230)}


def export_model(folder: Path) -> Path:
    stitched = tiny.stitch_kinds(folder, "test_efficientnet", "llama", ConnectorSpec(1, tiny.WIDTH, "gelu"), ":64px")
    stitched.save_pretrained(folder / "best")
    return folder / "best"


def write_data(folder: Path) -> str:
    """Eight conversations in LLaVA's json: the colour of the picture, asked in one turn or in the second of two."""
    entries = []
    for number in range(8):
        name, colour = list(COLOURS.items())[number % 2]
        Image.new("RGB", (40, 40), colour).save(folder / f"{number}.png")
        said = [("human", "<image>\nColour?"), ("gpt", name)]
        if number > 5:
            said = [("human", "<image>\nHi"), ("gpt", "Hi"), ("human", "Colour?"), ("gpt", name)]
        turns = [{"from": speaker, "value": text} for speaker, text in said]
        entries.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "mix.json").write_text(json.dumps(entries))
    return f"llava:{folder / 'mix.json'},{folder}"


def options(exported: Path, data: str, out: Path, *more: object) -> list[str]:
    base = ["--model", exported, "--data", data, "--out", out, "--batch", 4, "--max_length", 160, *more]
    return [str(option) for option in base]


def call(*arguments: object) -> int:
    """The recipe in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(RECIPE), *map(str, arguments)])
        reset_accelerate()
        try:
            runpy.run_path(str(RECIPE), run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            reset_accelerate()
    return 0


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def result(out: Path) -> dict[str, Tensor]:
    """Every tensor of the adapter, which holds the projector too, and of the merged model."""
    files = [out / "adapter" / "adapter_model.safetensors", *sorted((out / "merged").glob("*.safetensors"))]
    assert len(files) > 1
    return {f"{file.parent.name} {name}": value for file in files for name, value in load_file(file).items()}


def names(folder: Path) -> set[str]:
    """Files and directories, by their paths."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def assert_same(out: Path, whole: Path) -> None:
    """Log, tensors and files of a run that was torn are those of one that was not."""
    assert (out / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    found, wanted = result(out), result(whole)
    assert found.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []
    assert names(out) == names(whole)

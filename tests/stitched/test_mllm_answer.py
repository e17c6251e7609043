"""`hyma answer`: one question, a conversation, and what can be wrong."""

import io
from pathlib import Path

import pytest
import tiny_mllm as tiny

from hyma_mllm.answer import answer
from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.errors import HymaError
from hyma_mllm.stitched.mllm import StitchedMLLM


@pytest.fixture(scope="module")
def best(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("answer")
    stitched = tiny.stitch_kinds(folder, "dinov2", "llama", ConnectorSpec(1, tiny.WIDTH, "gelu"))
    stitched.save_pretrained(folder / "best")
    tiny.picture(3).save(folder / "best" / "picture.png")
    return folder / "best"


def test_one_question_prints_one_answer(best, capsys):
    answer(best, best / "picture.png", "What is it?", max_new_tokens=8)
    said = StitchedMLLM.from_pretrained(best).answer(best / "picture.png", "What is it?", 8)
    assert capsys.readouterr().out.strip() == said


def test_a_conversation_remembers_its_turns(best, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\nWhich colour?\n\nnever asked\n"))
    answer(best, best / "picture.png", max_new_tokens=6)
    model = StitchedMLLM.from_pretrained(best)
    picture = best / "picture.png"
    first = "".join(model.stream(picture, "What is it?", max_new_tokens=6))
    second = "".join(model.stream(picture, "Which colour?", [("What is it?", first.strip())], 6))
    assert capsys.readouterr().out == f"{first}\n{second}\n"
    assert second != "".join(model.stream(picture, "Which colour?", max_new_tokens=6)), "the turns make no difference"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": Path("gone")}, "There is no directory gone"),
        ({"picture": Path("gone.png")}, r"There is no picture gone\.png"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_mistakes_are_one_sentence(best, change, said):
    with pytest.raises(HymaError, match=said):
        answer(**{"model": best, "picture": best / "picture.png", "question": "What?"} | change)

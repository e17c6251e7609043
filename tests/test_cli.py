"""The `hyma` command as one types it."""

import sys
from pathlib import Path

import pytest

from hyma_mllm import cli, export
from hyma_mllm.data.corpora import CORPORA
from hyma_mllm.errors import HymaError
from hyma_mllm.search.ranking import SearchResult
from hyma_mllm.zoo.llm import DEFAULT_LLM_IDS, LLM_CARDS
from hyma_mllm.zoo.text import TEXT_CARDS
from hyma_mllm.zoo.vision import IMAGE_CARDS
from hyma_mllm.zoo.vision_tokens import DEFAULT_TOWER_IDS


def hyma(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hyma", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_zoo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert hyma(monkeypatch, "zoo") == 0
    lines = capsys.readouterr().out.splitlines()
    for card in [*IMAGE_CARDS.values(), *TEXT_CARDS.values(), *LLM_CARDS.values()]:
        mine = [line for line in lines if line.split()[:1] == [card.id]]
        assert len(mine) == 2  # its sizes, and where it comes from
        assert str(card.width) in mine[0] and card.kind in mine[0]
        assert card.licence in mine[1] and card.source in mine[1]
        if card.kind == "llm":
            assert (" *" in mine[0]) == (card.id in DEFAULT_LLM_IDS)
    towers = [line.split()[0] for line in lines if " tower " in line and " * " in line]
    assert towers == list(DEFAULT_TOWER_IDS)


def test_corpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert hyma(monkeypatch, "corpus") == 0
    out = capsys.readouterr().out
    for corpus in CORPORA.values():
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [corpus.name]]
        assert str(corpus.pairs) in line and corpus.licence in line and corpus.attribution in line


def test_export_passes_on_what_was_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def stitch(run: Path, pair: str | None, connector: str | None, method: str) -> object:
        asked.append((run, pair, connector, method))
        raise HymaError("stop here.")

    monkeypatch.setattr(SearchResult, "load", lambda path: SearchResult("vlm", [], [], [], []))
    monkeypatch.setattr(export, "stitch", stitch)
    assert hyma(monkeypatch, "export", "runs/x", "--pair", "dinov2-small@8+11,mpnet-base#2") == 2
    assert hyma(monkeypatch, "export", "runs/x", "--connector=linear", "--method=grid") == 2
    assert asked == [
        (Path("runs/x"), "dinov2-small@8+11,mpnet-base#2", None, "hyma"),
        (Path("runs/x"), None, "linear", "grid"),
    ]


def test_answer_passes_on_what_was_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert hyma(monkeypatch, "answer", str(tmp_path / "none"), str(tmp_path / "none.jpg"), "What?") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "none.jpg" in err
    for typed in (["m", "p.jpg", "What?", "--max_new_tokens=0"], ["--max_new_tokens", "0", "m", "p.jpg"]):
        assert hyma(monkeypatch, "answer", *typed) == 2
        assert "max_new_tokens is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "question"),
    [
        (["answer", "d", "p.jpg", "What is it?"], "What is it?"),
        (["answer", "--device", "cuda", "d", "p.jpg", "What?"], "What?"),
        (["answer", "d", "p.jpg", "--device=cuda", "What?"], "What?"),
        (["answer", "d", "p.jpg", "--question", "What?"], None),
        (["answer", "d", "p.jpg"], None),
        (["export", "a", "b", "c", "d"], None),
    ],
)
def test_a_question_may_be_given_by_place(typed: list[str], question: str | None) -> None:
    found = cli.by_place(typed)
    assert found == [f"--question={word}" if question and word == question else word for word in typed]


@pytest.mark.parametrize("command", ["report", "export"])
def test_no_such_run(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert hyma(monkeypatch, command, str(tmp_path / "none")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "none" in err

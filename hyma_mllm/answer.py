"""`hyma answer`: ask an exported MLLM about a picture, once or in a conversation."""

import sys
from pathlib import Path

from hyma_mllm.errors import HymaError


def answer(
    model: Path, picture: Path, question: str | None = None, max_new_tokens: int = 64, device: str = "cpu"
) -> None:
    """Answer a question about a picture, or hold a conversation about it.

    Args:
        model: directory of an exported MLLM, e.g. runs/mllm/best.
        picture: an image file.
        question: the question; without one, questions are read line by line until an empty line or the end of input.
        max_new_tokens: tokens of an answer, at most.
        device: where the model computes, e.g. cpu or cuda.

    Raises:
        HymaError: no such model or picture, or a number of tokens below 1.
    """
    if max_new_tokens < 1:
        raise HymaError(f"max_new_tokens is {max_new_tokens}; an answer takes at least 1.")
    from hyma_mllm import command  # slow to import, as is the model, and `hyma --help` needs neither
    from hyma_mllm.stitched.mllm import StitchedMLLM
    from hyma_mllm.stitched.mllm_pictures import rgb

    command.hide_loading_bars()
    shown = rgb(picture)
    stitched = StitchedMLLM.from_pretrained(model, device)
    turns: list[tuple[str, str]] = []
    while True:
        asked = question if question is not None else _ask()
        if not asked:
            return
        said = ""
        for piece in stitched.stream(shown, asked, turns, max_new_tokens):
            print(piece, end="", flush=True)
            said += piece
        print()
        if question is not None:
            return
        turns.append((asked, said.strip()))


def _ask() -> str:
    """The next line of the user, empty at the end of input; the prompt stays out of a pipe."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    return sys.stdin.readline().strip()

"""What it costs in loss to store vision tokens in fewer bytes: real tokens, a small LLM.

    python benchmarks/token_storage.py --out benchmarks/results/token_storage.json

For towers of nine tokens and SmolLM2 on easy-VQA: projectors train on exact tokens and are judged on held-out questions
with tokens in each stored form. Beside the loss stands how far the tokens move: the root mean square of the error over
that of the standardised token.
"""

import argparse
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm, trange

from hyma_mllm.data.prompts import SHORT_ANSWER
from hyma_mllm.data.question_sets import QuestionSets
from hyma_mllm.data.questions import open_questions
from hyma_mllm.data.questions_balance import balanced
from hyma_mllm.data.token_codes import TokenDtype, decode, encode, row_bytes
from hyma_mllm.data.token_library import TokenConfig, TokenLibrary
from hyma_mllm.objectives.causal_lm import CausalObjective
from hyma_mllm.paths import write_text
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.mllm_parts import Tokens
from hyma_mllm.search.mllm_prepare import prepare_mllm
from hyma_mllm.search.mllm_score import score_answers
from hyma_mllm.search.mllm_task import MLLMTask
from hyma_mllm.search.placement import Placement
from hyma_mllm.search.samplers import BatchSampler
from hyma_mllm.zoo.llm import llm_card, load_llm
from hyma_mllm.zoo.vision_tokens import tower_card

if TYPE_CHECKING:  # mypy takes the folder for a package; a script that is run finds what stands beside it
    from benchmarks import causal_ground, measure
else:
    import causal_ground
    import measure

FORMS: tuple[TokenDtype, ...] = get_args(TokenDtype)
TOWERS = ("efficientnet-lite0:96px", "mobilenetv2:96px", "dinov2-small@8:42px")
BATCH = 8
RATE = 2e-3


@dataclass
class Rounded:
    """Tokens as they come back from a store of some form."""

    exact: Tokens
    form: TokenDtype

    def __getitem__(self, rows: Tensor) -> Tensor:
        """[rows, tokens, width] float32."""
        tokens = self.exact[rows]
        return decode(encode(tokens, self.form), self.form, tokens.shape[1], tokens.shape[2])


def exact_task(train: int, held_out: int) -> MLLMTask:
    """The task with tokens in float32: balanced questions of easy-VQA, three towers, SmolLM2."""
    parts = open_questions("questions:easy-vqa").parts
    tests = balanced(parts["test"], held_out)
    questions = QuestionSets(balanced(parts["train"], train), tests[:1], {"easy-vqa": tests}, SHORT_ANSWER)
    return prepare_mllm(
        [tower_card(name) for name in TOWERS],
        [llm_card("smollm2-135m")],
        partial(load_llm, dtype=torch.float32),
        Placement(),
        questions,
        TokenLibrary(TokenConfig(storage_dtype="fp32")),
        score_answers,
        512,
        chunk=32,
        longest_answer=8,
    )


def stored_as(task: MLLMTask, form: TokenDtype) -> MLLMTask:
    """The same task, its tokens rounded; what standardises them is taken from the exact ones."""
    return replace(task, towers=[replace(tower, tokens=Rounded(tower.tokens, form)) for tower in task.towers])


def trained(task: MLLMTask, steps: int) -> ConnectorBank:
    """Every pair's projector after some steps."""
    spec, objective = causal_ground.spec_of(task), CausalObjective()
    bank, pairs = ConnectorBank(task.grid, spec, seed=0), list(range(len(task.grid)))
    optimiser = torch.optim.AdamW(bank.parameters(), lr=RATE, fused=True)
    batches = BatchSampler(task.train, BATCH, seed=0)
    for step in trange(steps, desc="training", unit="step"):
        batch = task.batch(batches.batch(step), 0, step)
        task.losses(bank(pairs), spec, objective, batch).sum().backward()  # type: ignore[no-untyped-call]
        bank.clip_each(1.0)
        optimiser.step()
        optimiser.zero_grad()
    return bank


@torch.no_grad()
def held_out_losses(task: MLLMTask, bank: ConnectorBank) -> list[float]:
    """Held-out loss of each pair, nats a token."""
    spec, objective, pairs = causal_ground.spec_of(task), CausalObjective(), list(range(len(task.grid)))
    parts = torch.split(task.tests["easy-vqa"], 16)
    found = torch.stack([task.losses(bank(pairs), spec, objective, task.batch(rows, 0, 0)) for rows in parts], 1)
    sizes = torch.tensor([len(rows) for rows in parts], dtype=torch.float32)
    return list((found @ (sizes / sizes.sum())).tolist())


def moved(task: MLLMTask, form: TokenDtype) -> list[float]:
    """For each tower, the RMS of the error of its standardised tokens over their own RMS."""
    rows = torch.unique(task.picture[task.tests["easy-vqa"]])
    rounded = stored_as(task, form)
    return [
        float((there.read(rows) - here.read(rows)).square().mean().sqrt() / here.read(rows).square().mean().sqrt())
        for here, there in zip(task.towers, rounded.towers, strict=True)
    ]


def main() -> None:
    """Train once, and judge in every form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers and the machine")
    parser.add_argument("--steps", type=int, default=12, help=f"optimiser steps of {BATCH} questions")
    parser.add_argument("--train", type=int, default=96, help="training questions")
    parser.add_argument("--held-out", type=int, default=48, help="questions that are judged")
    arguments = parser.parse_args()
    where, task = measure.machine("cpu"), exact_task(arguments.train, arguments.held_out)
    rows: list[dict[str, Any]] = []
    bank = trained(task, arguments.steps)
    for form in tqdm(FORMS, desc="judging", unit="form"):
        losses = held_out_losses(stored_as(task, form), bank)
        for tower, card, error, loss in zip(task.towers, TOWERS, moved(task, form), losses, strict=True):
            size = row_bytes(form, tower.count, len(tower.mean))
            rows.append({"tower": card, "form": form, "bytes": size, "error": error, "loss": loss})
    exact = {row["tower"]: row["loss"] for row in rows if row["form"] == "fp32"}
    if arguments.out:
        write_text(
            arguments.out, json.dumps({"machine": where, "steps": arguments.steps, "rows": rows}, indent=2) + "\n"
        )
    lines = Table("tower", "form", "bytes a picture", "error of tokens", "held-out loss", "less fp32's")
    for row in sorted(rows, key=lambda row: (row["tower"], -row["bytes"])):
        difference = f"{row['loss'] - exact[row['tower']]:+.4f}"
        numbers = f"{row['bytes']:,}", f"{row['error']:.2%}", f"{row['loss']:.4f}", difference
        lines.add_row(row["tower"], row["form"], *numbers)
    Console(width=120).print(lines)


if __name__ == "__main__":
    main()

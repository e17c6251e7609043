"""Visual question answering with an exported MLLM: answers as LLaVA writes them, and their scores.

python eval/vqa.py --model runs/mllm/best --task questions:easy-vqa/test --out answers.jsonl
python eval/vqa.py --model runs/mllm/best --task textvqa:val.json,images/ --out answers.jsonl --blind true
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from rich.markup import escape
from rich.table import Table

from hyma_mllm import command
from hyma_mllm.data.questions import open_questions
from hyma_mllm.data.questions_audit import audit_questions
from hyma_mllm.errors import HymaError
from hyma_mllm.metrics.vqa import Variant
from hyma_mllm.paths import write_text
from hyma_mllm.stitched.mllm import StitchedMLLM
from hyma_mllm.stitched.mllm_evaluation import AnswerFile, Metric, answer_rows, metric_of, scored, table_rows


def vqa(
    model: Path,
    task: str,
    out: Path,
    blind: bool = False,
    metric: Metric | None = None,
    variant: Variant = "evalai",
    limit: int = 0,
    batch_size: int = 16,
    max_new_tokens: int = 16,
    max_bad_fraction: float = 0.01,
    device: str = "cpu",
) -> None:
    """Answer the questions of a task and score the answers; the same command goes on where it was stopped.

    Args:
        model: directory of an exported MLLM, e.g. runs/mllm/best.
        task: the questions, as recipes/mllm.py names them, e.g. questions:easy-vqa/test or textvqa:val.json,images/.
        out: jsonl file for the answers; scores go to the same name with .scores.json, blind answers to .blind.jsonl.
        blind: answer once more without the pictures, and print that score beside.
        metric: vqa, pope or multiple-choice; that of the task if left out.
        variant: of VQA accuracy: evalai (TextVQA), official (VQAv2), or always.
        limit: answer only so many questions, the first ones; 0 takes all.
        batch_size: questions at a time.
        max_new_tokens: tokens of an answer, at most.
        max_bad_fraction: share of unreadable rows above which the evaluation stops.
        device: where the model computes, e.g. cpu or cuda.
    """
    options = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    if min(batch_size, max_new_tokens) < 1 or limit < 0:
        raise HymaError(
            f"batch_size is {batch_size}, max_new_tokens {max_new_tokens} and limit {limit}; the first two take at "
            "least 1, the last at least 0."
        )
    command.hide_loading_bars()
    source = open_questions(task)
    checked = audit_questions(source, max_bad_fraction, without_picture=True)
    rows = checked.rows[:limit] if limit else checked.rows
    metric = metric or metric_of(task, rows)
    files = {False: out} | ({True: out.with_suffix(".blind.jsonl")} if blind else {})
    stitched = StitchedMLLM.from_pretrained(model, device)
    # Both files are read before the first answer: one that cannot be continued must not cost an hour.
    kept = {mode: AnswerFile(path, stitched.config.model_id, mode, rows) for mode, path in files.items()}
    scores: dict[str, Any] = {}
    for mode, file in kept.items():
        texts = answer_rows(stitched, rows, file, batch_size, max_new_tokens)
        scores["blind" if mode else "scores"] = scored(metric, variant, rows, texts)
    refused = [{"key": bad.key, "reason": bad.reason} for bad in checked.bad]
    found = {
        "evaluation": "vqa",
        "metric": metric,
        **scores,
        "questions": len(rows),
        "refused": refused,
        "source": {"name": source.name, "licence": source.licence, "fingerprint": source.fingerprint},
        "model": {side: asdict(getattr(stitched.config, side)) for side in ("vision", "llm", "connector")},
        "options": options,
    }
    write_text(out.with_suffix(".scores.json"), json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    table = Table("measure", "with the picture", "blind", title=escape(f"{source.name}, {stitched.config.model_id}"))
    table.caption = f"{len(rows)} questions, {len(refused)} refused; percent, and counts where there is no decimal"
    for line in table_rows(scores["scores"], scores.get("blind")):
        table.add_row(*map(escape, line))
    command.console().print(table)


if __name__ == "__main__":
    command.run(lambda: auto_cli(vqa, as_positional=False))

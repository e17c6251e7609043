"""Ten held-out pictures with their questions, and what the best, the median and the worst pair say to them."""

from pathlib import Path

import torch
from torch import Tensor

from hyma_mllm.data.pictures import checked_picture
from hyma_mllm.paths import atomic_path
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.search.methods import SearchConfig
from hyma_mllm.search.mllm_task import MLLMTask
from hyma_mllm.search.ranking import Ranking, SearchResult
from hyma_mllm.search.samplers import generator
from hyma_mllm.search.stored import StoredConnectors

SHOWN = 10
SIDE = 160
ANSWERS = "answers.json"


def write_answers(
    run: RunDirectory, task: MLLMTask, result: SearchResult, search: SearchConfig, ranking: Ranking, best: int
) -> Path:
    """Write `answers.json`, and the pictures that it names under `examples/`.

    Args:
        run: the run directory, with its connectors.
        task: the questions and the models.
        result: what the search found.
        search: its configuration.
        ranking: the ranking whose median and worst pair on the first test set answer.
        best: the pair that is handed over, which answers beside them.
    """
    order = ranking.order(result.tasks[0])
    chosen = {"best": best, "median": order[len(order) // 2], "worst": order[-1]}
    connectors = StoredConnectors(run.path, f"{ranking.method}-{ranking.connector}-{ranking.seed}", task.grid)
    spec = search.spec(ranking.connector)
    for index in chosen.values():
        task.read_with(task.grid.pair(index).text)
    entries: list[dict[str, object]] = []
    for name, questions in task.tests.items():
        some = _spread(questions, max(1, SHOWN // len(task.tests)))
        said = {kind: task.answers(connectors([pair]), spec, some)[0] for kind, pair in chosen.items()}
        blind = task.blind_answers(task.grid.pair(order[0]).text, some)
        for position, row in enumerate(some.tolist()):
            asked = task.rows[row]
            entries.append(
                {
                    "set": name,
                    "key": asked.key,
                    "image": _thumbnail(run.path, task, row),
                    "question": asked.question,
                    "human": max(dict.fromkeys(asked.answers), key=asked.answers.count),
                    "blind": blind[position],
                    **{kind: answers[position] for kind, answers in said.items()},
                }
            )
    return run.write_json(ANSWERS, {"pairs": {k: task.grid.name(p) for k, p in chosen.items()}, "answers": entries})


def _spread(questions: Tensor, count: int) -> Tensor:
    """Some of the questions, drawn by a fixed seed."""
    order = torch.randperm(len(questions), generator=generator(7))
    return questions[order[:count].sort().values]


def _thumbnail(run: Path, task: MLLMTask, row: int) -> str:
    """A small PNG of a question's picture; its path relative to the run directory."""
    relative = Path("examples") / f"{int(task.picture[row])}.png"
    path = run / relative
    if not path.exists():
        picture = checked_picture(task.rows[row].key, task.rows[row].image)
        picture.thumbnail((SIDE, SIDE))
        with atomic_path(path) as temporary:
            picture.save(temporary, "PNG")
    return relative.as_posix()

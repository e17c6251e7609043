"""Best and worst retrievals of the stitched model, as pictures for the report."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hyma_mllm.data.pictures import checked_picture
from hyma_mllm.paths import atomic_path, write_text
from hyma_mllm.search.prepare import Prepared

if TYPE_CHECKING:  # see export.py
    from hyma_mllm.stitched.vlm import StitchedVLM

EACH = 4
SHOWN = 5
SIDE = 160


def write_examples(run: Path, prepared: Prepared, model: "StitchedVLM") -> Path:
    """Write `examples.json` and the pictures that it names under `examples/`.

    The queries are first captions of held-out pictures: the `EACH` whose own picture ranks best, by the margin over
    the next picture, and the `EACH` whose own picture ranks worst.

    Args:
        run: the run directory.
        prepared: rows and features of the search.
        model: the stitched model.
    """
    task = prepared.task
    vision = [name.split("#", 1)[0] for name in task.grid.vision_ids].index(model.config.vision_id)
    gallery = task.test
    images = task.images[vision][gallery].cpu()
    captions = [prepared.rows[index].texts[0] for index in gallery.tolist()]
    similarity = model.encode_text(captions).cpu() @ images.T
    own = similarity.diagonal()
    ranks = (similarity > own[:, None]).sum(1)
    margin = own - similarity.masked_fill(torch.eye(len(own), dtype=torch.bool), -2.0).amax(1)
    best = torch.argsort(margin, descending=True)[:EACH].tolist()
    worst = torch.argsort(ranks, descending=True)[:EACH].tolist()
    entries = [
        _entry(run, prepared, kind, query, similarity[query], captions)
        for kind, queries in (("best", best), ("worst", worst))
        for query in queries
    ]
    path = run / "examples.json"
    write_text(path, json.dumps(entries, indent=1) + "\n")
    return path


def _entry(
    run: Path, prepared: Prepared, kind: str, query: int, similarity: Tensor, captions: list[str]
) -> dict[str, object]:
    """One query with its own picture and the pictures that were found for it."""
    gallery = prepared.task.test.tolist()
    top = torch.topk(similarity, min(SHOWN, len(gallery))).indices.tolist()
    concept = prepared.rows[gallery[query]].concept
    return {
        "kind": kind,
        "query": captions[query],
        "image": _thumbnail(run, prepared, gallery[query]),
        "retrieved": [
            {
                "image": _thumbnail(run, prepared, gallery[found]),
                "caption": captions[found],
                "rank": rank + 1,
                "right": found == query or prepared.rows[gallery[found]].concept == concept,
            }
            for rank, found in enumerate(top)
        ],
    }


def _thumbnail(run: Path, prepared: Prepared, row: int) -> str:
    """A small PNG of a row's picture; its path relative to the run directory."""
    relative = Path("examples") / f"{row}.png"
    path = run / relative
    if not path.exists():
        picture = checked_picture(prepared.rows[row].key, prepared.rows[row].image)
        picture.thumbnail((SIDE, SIDE))
        with atomic_path(path) as temporary:
            picture.save(temporary, "PNG")
    return relative.as_posix()

"""What the stand-alone evaluations share: pictures of a source in, a table and a results file out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from hyma_mllm.data.audit import audit
from hyma_mllm.data.pictures import open_picture
from hyma_mllm.data.rows import Row, Source
from hyma_mllm.errors import HymaError
from hyma_mllm.paths import write_text
from hyma_mllm.stitched.vlm import StitchedVLM

SCHEMA = 1


class Gallery:
    """The good rows of a source, and what was refused.

    Attributes:
        source: where they come from.
        rows: the rows whose picture can be read.
        refused: key and reason of every other row.
    """

    def __init__(self, source: Source, max_bad_fraction: float) -> None:
        checked = audit(source)
        checked.refuse_if_bad(source.name, max_bad_fraction, "mend them or raise max_bad_fraction")
        self.source = source
        self.rows: list[Row] = list(checked.rows)
        self.refused = [{"key": bad.key, "reason": bad.reason} for bad in checked.bad]

    def labels(self, label_column: str) -> list[str]:
        """The label of each row, underscores read as spaces; rows without one leave the gallery, listed as refused.

        Args:
            label_column: with which a tabular source was opened as its captions.

        Raises:
            HymaError: if a row has several labels.
        """
        if label_column == "label" and any(row.label is not None for row in self.rows):
            self.refused += [{"key": row.key, "reason": "it has no label"} for row in self.rows if row.label is None]
            self.rows = [row for row in self.rows if row.label is not None]
            return [(row.label or "").replace("_", " ") for row in self.rows]
        for row in self.rows:
            if len(row.texts) > 1:
                raise HymaError(f"{row.key} of {self.source.name} has {len(row.texts)} labels; give each picture one.")
        return [row.texts[0].replace("_", " ") for row in self.rows]

    def encode(self, model: StitchedVLM, batch_size: int) -> Tensor:
        """Unit rows [rows, d_image] of all pictures, on the CPU."""
        encoded = []
        with tqdm(total=len(self.rows), desc=model.config.vision_id, unit="picture") as bar:
            for start in range(0, len(self.rows), batch_size):
                batch = [open_picture(row.image) for row in self.rows[start : start + batch_size]]
                encoded.append(model.encode_image(batch, batch_size).cpu())
                bar.update(len(batch))
        return torch.cat(encoded)


def results(
    evaluation: str, model: StitchedVLM, gallery: Gallery, scores: Mapping[str, float], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that `--out` writes.

    Args:
        evaluation: its name.
        model: what was evaluated.
        gallery: on which pictures.
        scores: name -> percent.
        options: the resolved command line.
    """
    config = asdict(model.config)
    return {
        "schema": SCHEMA,
        "evaluation": evaluation,
        "scores": {name: round(score, 6) for name, score in scores.items()},
        "pictures": len(gallery.rows),
        "refused": gallery.refused,
        "source": {
            "name": gallery.source.name,
            "licence": gallery.source.licence,
            "fingerprint": gallery.source.fingerprint,
        },
        "model": {key: config[key] for key in ("vision", "text", "connector")},
        "written_by": model.config.versions,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in options.items()},
    }


def show(title: str, found: Mapping[str, Any], columns: Sequence[str] = ("measure", "percent")) -> None:
    """Print the scores as a table, with the number of pictures and of refused rows below it."""
    table = Table(*columns, title=title, caption=f"{found['pictures']} pictures, {len(found['refused'])} refused")
    for name, score in found["scores"].items():
        table.add_row(name, f"{score:.1f}")
    Console().print(table)


def save(path: Path | None, found: Mapping[str, Any]) -> None:
    """Write the results as JSON, where a path is given."""
    if path is not None:
        write_text(path, json.dumps(found, indent=2, ensure_ascii=False) + "\n")

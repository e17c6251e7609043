"""All rows of a run: read from every source, audited, and numbered.

A store is written per source, so that a source embedded once serves every later run that lists it.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hyma_mllm.data.audit import audit
from hyma_mllm.data.corpora import CORPORA, default_corpora
from hyma_mllm.data.rows import Row, Source
from hyma_mllm.data.sources import open_source
from hyma_mllm.errors import HymaError
from hyma_mllm.paths import write_text

logger = logging.getLogger(__name__)


@dataclass
class DataConfig:
    """Which pictures and words, and how they are split.

    Attributes:
        sources: what to read: `corpus:NAME`, a folder, *.parquet, *.tar, *.json (LLaVA) or *.csv; empty takes the
            built-in corpora that this system can fetch.
        stores: directory of imported features (`hyma import`), searched in place of sources: its stores are the
            encoders, row k of every image store belongs to row k of every text store; null embeds the sources.
        image_column: column of the picture or its path, in tabular sources.
        caption_column: column of the caption, in tabular sources.
        max_bad_fraction: share of refused rows above which the run stops.
        validation: share of the concepts that the search watches while it trains.
        test: share of the concepts that the scores are taken on.
        split_seed: of the split by concept.
        limit: rows taken from each source, or of the imported ones, the first; 0 takes all.
    """

    sources: list[str] = field(default_factory=list)
    stores: Path | None = None
    image_column: str = "image"
    caption_column: str = "caption"
    max_bad_fraction: float = 0.01
    validation: float = 0.1
    test: float = 0.15
    split_seed: int = 0
    limit: int = 0

    def __post_init__(self) -> None:
        if self.validation <= 0 or self.test <= 0 or self.validation + self.test >= 1:
            raise HymaError(
                f"data.validation is {self.validation} and data.test is {self.test}; both must be above 0 and leave "
                "a part for training."
            )
        if self.limit < 0:
            raise HymaError(f"data.limit is {self.limit}; give the number of rows per source, or 0 for all.")
        if self.stores is not None and self.sources:
            raise HymaError(
                f"data.stores is {self.stores} and data.sources is {', '.join(self.sources)}; give one of the two."
            )

    def specs(self) -> list[str]:
        """The sources, the default ones when none is listed; none beside imported features."""
        if self.stores is not None:
            return []
        return self.sources or [f"corpus:{name}" for name in default_corpora()]


@dataclass(frozen=True)
class Part:
    """The good rows of one source.

    Attributes:
        source: where they come from.
        fingerprint: of the source and of which of its rows were taken.
        rows: the rows, in order.
    """

    source: Source
    fingerprint: str
    rows: list[Row]

    @property
    def captions(self) -> list[tuple[str, str]]:
        """(key, text) of every caption, captions of one row together."""
        return [(f"{row.key}#{number}", text) for row in self.rows for number, text in enumerate(row.texts)]


def open_sources(config: DataConfig) -> list[Source]:
    """The sources of a run, opened and checked but not read.

    Raises:
        HymaError: one of them cannot be had.
    """
    return [open_source(spec, config.image_column, config.caption_column) for spec in config.specs()]


def collect(sources: Sequence[Source], config: DataConfig, bad_rows: Path) -> list[Part]:
    """Read and audit every source; refused rows are counted, logged and listed in `bad_rows` (JSON lines).

    The list holds `source`, `key` and `reason` a line; it is written as well when the rows are refused as a whole.

    Raises:
        HymaError: too many bad rows, or a key that stands in two sources.
    """
    parts: list[Part] = []
    refused: list[dict[str, str]] = []
    seen = set[str]()
    for source in sources:
        # Every row is looked at before the source is refused, so that the list names all that is to be mended.
        checked = audit(source, config.limit)
        refused += [{"source": source.name, "key": bad.key, "reason": bad.reason} for bad in checked.bad]
        write_text(bad_rows, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in refused))
        mend = f"mend those listed in {bad_rows} or raise data.max_bad_fraction"
        checked.refuse_if_bad(source.name, config.max_bad_fraction, mend)
        twice = next((row.key for row in checked.rows if row.key in seen), None)
        if twice is not None:
            raise HymaError(f"The key {twice} stands in two sources; list {source.name} once, or rename its keys.")
        seen.update(row.key for row in checked.rows)
        # The length of a limited source is part of its name in the cache: other limits are other stores.
        fingerprint = f"{source.fingerprint[:16]}-{len(checked.rows)}"
        parts.append(Part(source, fingerprint, checked.rows))
        logger.info("%s: %d rows, %d refused", source.name, len(checked.rows), len(checked.bad))
    return parts


def attribution(sources: Sequence[Source]) -> list[dict[str, str]]:
    """Whom to name for every source: `name`, `licence` and `origin` (empty for the user's own pictures)."""
    return [
        {
            "name": source.name,
            "licence": source.licence,
            "origin": CORPORA[source.name].attribution if source.name in CORPORA else "",
        }
        for source in sources
    ]

"""The check that every row passes before anything expensive is done with it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from tqdm import tqdm

from hyma_mllm.data.pictures import BadPicture, open_picture
from hyma_mllm.data.rows import Row, Source
from hyma_mllm.data.threads import in_order
from hyma_mllm.errors import HymaError

THREADS = min(8, os.cpu_count() or 1)
"""That decode pictures; decoding leaves the interpreter free."""

AHEAD = 64
"""Rows read before their pictures are looked at, which bounds the encoded pictures in memory."""


@dataclass(frozen=True)
class BadRow:
    """A row that is refused, and why."""

    key: str
    reason: str


@dataclass
class RowAudit:
    """What became of the rows of one source.

    Attributes:
        rows: the good ones, in order.
        bad: the refused ones, in order.
    """

    rows: list[Row] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)

    def refuse_if_bad(self, name: str, max_bad_fraction: float, mend: str) -> None:
        """Refuse the source as a whole.

        Args:
            name: of the source.
            max_bad_fraction: share of refused rows above which it is refused; one without a good row always is.
            mend: what the message tells the user to do.

        Raises:
            HymaError: too many rows are bad, the first being named.
        """
        total = len(self.rows) + len(self.bad)
        if len(self.bad) <= max_bad_fraction * total and self.rows:
            return
        first = self.bad[0]
        allowed = f"more than max_bad_fraction {max_bad_fraction:g} allows" if self.rows else "that is all"
        raise HymaError(
            f"{name} has {len(self.bad)} bad rows of {total}, {allowed}, the first being {first.key} ({first.reason}); "
            f"{mend}."
        )


def audit(source: Source, limit: int = 0, threads: int = THREADS) -> RowAudit:
    """Read a source once and part its good rows from its bad ones: unreadable picture, no caption, an empty caption.

    Args:
        source: what to read; one that says `pictures_checked` is not opened picture by picture again.
        limit: rows read, the first ones; 0 reads all.
        threads: that decode pictures, at least 1; rows keep their order whatever their number.

    Raises:
        HymaError: the source is empty, or a key stands in it twice.
    """
    check = _bad_words if getattr(source, "pictures_checked", False) else _bad_row

    def checked(row: Row) -> tuple[Row, str | None]:
        return row, check(row)

    result = RowAudit()
    for row, reason in in_order(checked, _with_unique_keys(source, limit), threads, AHEAD):
        if reason is None:
            result.rows.append(row)
        else:
            result.bad.append(BadRow(row.key, reason))
    if not result.rows and not result.bad:
        raise HymaError(f"{source.name} holds no rows; name a source with pictures and captions.")
    return result


def _with_unique_keys(source: Source, limit: int) -> Iterator[Row]:
    seen: dict[str, int] = {}
    rows = islice(source.rows(), limit) if limit else source.rows()
    for number, row in enumerate(tqdm(rows, desc=f"reading {source.name}", unit=" rows", delay=2.0)):
        if row.key in seen:
            raise HymaError(
                f"The key {row.key} stands twice in {source.name}, in rows {seen[row.key]} and {number} (counted from "
                "0); make the keys unique, or give several captions of one picture as a list in one row."
            )
        seen[row.key] = number
        yield row


def _bad_words(row: Row) -> str | None:
    if not row.texts:
        return "it has no caption"
    if not all(text.strip() for text in row.texts):
        return "it has an empty caption"
    return None


def _bad_row(row: Row) -> str | None:
    if (reason := _bad_words(row)) is not None:
        return reason
    return bad_picture(row)


def bad_picture(row: Row) -> str | None:
    """Why the picture of a row cannot be used; None if it can."""
    try:
        open_picture(row.image)
    except BadPicture as refused:
        return refused.reason
    return None

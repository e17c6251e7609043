"""The check that every question passes before anything expensive is done with it."""

from hyma_mllm.data.audit import BadRow, RowAudit, bad_picture
from hyma_mllm.data.rows import Row, Source
from hyma_mllm.errors import HymaError


def audit_questions(
    source: Source, max_bad_fraction: float = 0.01, check_pictures: bool = True, without_picture: bool = False
) -> RowAudit:
    """Part the good questions from the bad ones: no or an unreadable picture, no question, no answer.

    Args:
        source: what to read; the pictures of one that says `pictures_checked` are not opened.
        max_bad_fraction: share of refused rows above which the source as a whole is refused.
        check_pictures: decode every picture, each once; without it only the words and keys are checked.
        without_picture: let rows pass that have no picture, as ScienceQA's questions over text.

    Raises:
        HymaError: the source is empty, a key stands in it twice, or too many rows are bad.
    """
    decode = check_pictures and not getattr(source, "pictures_checked", False)
    result, keys, looked_at = RowAudit(), set[str](), dict[object, str | None]()
    for row in source.rows():
        if row.key in keys:
            raise HymaError(f"The key {row.key} stands twice in {source.name}; make the keys unique.")
        keys.add(row.key)
        reason = _bad_words(row)
        if reason is None and not row.image:
            reason = None if without_picture else "there is no picture"
        elif reason is None and decode:
            if row.image not in looked_at:
                looked_at[row.image] = bad_picture(row)
            reason = looked_at[row.image]
        if reason is None:
            result.rows.append(row)
        else:
            result.bad.append(BadRow(row.key, reason))
    _refuse_whole(source.name, result, max_bad_fraction)
    return result


def _refuse_whole(name: str, result: RowAudit, max_bad_fraction: float) -> None:
    total = len(result.rows) + len(result.bad)
    if total == 0:
        raise HymaError(f"{name} holds no questions; name a source that does.")
    if len(result.bad) > max_bad_fraction * total:
        first = result.bad[0]
        raise HymaError(
            f"{name} has {len(result.bad)} bad rows of {total}, more than max_bad_fraction {max_bad_fraction:g} "
            f"allows, the first being {first.key} ({first.reason}); mend them or raise max_bad_fraction."
        )


def _bad_words(row: Row) -> str | None:
    if not (row.question or "").strip():
        return "it has no question"
    if not any(answer.strip() for answer in row.answers):
        return "it has no answer"
    return None

"""The samples of a webdataset shard: members with one name up to the first dot, one after another.

Only what a row needs is read: the place of the picture, a `.txt` and a `.json`. Nothing else is opened, be it a pickle
or an archive inside the archive, and no member is larger than what it may be.
"""

import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from hyma_mllm.data.packed_pictures import TarPicture
from hyma_mllm.foreign import parse_json

PICTURE_BYTES = 1 << 30
TEXT_BYTES = 1 << 24
HELD_BYTES = 1 << 28
"""Pictures of a compressed tar that are kept in memory: they have no place of their own to be read from again."""


@dataclass
class TarSample:
    """What one sample holds for a row.

    Attributes:
        key: name of its members up to the first dot, folders included.
        picture: the first one; where it lies in a plain tar, its bytes in a compressed one.
        fields: those of its `.json`, and `txt`.
        members: suffixes met so far.
    """

    key: str
    picture: TarPicture | bytes | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    members: set[str] = field(default_factory=set)


def tar_samples(file: Path, pictures: Collection[str]) -> Iterator[TarSample]:
    """The samples of a shard in order; links, folders and files without a suffix are passed over.

    Args:
        file: the tar, plain or compressed.
        pictures: suffixes of pictures, in small letters.

    Raises:
        ValueError: a suffix stands twice in a sample, a text is no UTF-8 or no JSON, or a member is too large or has
            holes, by which a small file claims any size.
        OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError: it is no tar, or damaged.
    """
    sample: TarSample | None = None
    held = 0
    with tarfile.open(file, "r:*") as tar:
        plain = _is_plain(file)
        for member in tar:
            if member.issparse() or member.size > PICTURE_BYTES:
                raise ValueError(f"the member {member.name!r:.80} claims {member.size:,} bytes")
            name = PurePosixPath(member.name).name
            stem, dot, suffix = name.partition(".")
            if not (member.isreg() and stem and dot):
                continue
            key = member.name[: len(member.name) - len(suffix) - 1]
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = TarSample(key)
            if suffix in sample.members:
                raise ValueError(f"the sample {key!r:.80} has two members .{suffix:.20}")
            sample.members.add(suffix)
            held += 0 if plain else member.size
            if held > HELD_BYTES:
                raise ValueError(f"it is compressed and holds more than {HELD_BYTES:,} bytes; give a plain tar instead")
            _take(tar, member, suffix, sample, file if plain else None, pictures)
    if sample is not None:
        yield sample


def _take(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    suffix: str,
    sample: TarSample,
    plain: Path | None,
    pictures: Collection[str],
) -> None:
    if suffix.casefold() in pictures:
        if sample.picture is None:
            sample.picture = (
                TarPicture(plain, member.offset_data, member.size) if plain else _bytes(tar, member, PICTURE_BYTES)
            )
    elif suffix == "txt":
        sample.fields["txt"] = _bytes(tar, member, TEXT_BYTES).decode("utf-8")
    elif suffix == "json":
        described = parse_json(_bytes(tar, member, TEXT_BYTES))
        if isinstance(described, dict):
            sample.fields = described | sample.fields


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    if member.size > limit:
        raise ValueError(f"the member {member.name!r:.80} claims {member.size:,} bytes")
    opened = tar.extractfile(member)
    assert opened is not None  # it is a regular file
    with opened:
        return opened.read()


def _is_plain(file: Path) -> bool:
    try:
        with tarfile.open(file, "r:"):
            return True
    except tarfile.ReadError:
        return False

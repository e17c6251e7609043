"""Wrong files for every reader: the table of inputs, of what was read, what was refused, and crashes.

python benchmarks/fuzz.py --inputs 10000 --out benchmarks/results/fuzz.json
python benchmarks/fuzz.py --inputs 500 --readers gguf --keep crashes/

Half of the inputs are files with changed bytes, half are drawn by structure. A reader may give a value or the package's
own error (`HymaError`; `BadPicture` of a picture; exit code 2 of a command line). Anything else is a crash: another
exception, no end within a minute, memory beyond the limit.
"""

import argparse
import json
import logging
import os
import pickle
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from tqdm import tqdm

from hyma_mllm.data.pictures import BadPicture
from hyma_mllm.errors import HymaError
from hyma_mllm.paths import write_text

if TYPE_CHECKING:  # mypy takes the folder for a package; a script that is run finds what stands beside it
    from benchmarks import fuzz_data, fuzz_models, fuzz_runs
    from benchmarks.fuzz_mutate import Files, mutated_bytes
    from benchmarks.fuzz_reader import Reader
else:
    import fuzz_data
    import fuzz_models
    import fuzz_runs
    from fuzz_mutate import Files, mutated_bytes
    from fuzz_reader import Reader

CHUNK = 2500
SECONDS = 60
MEMORY = 6 << 30
VERSIONED = ("hyma_mllm", "torch", "transformers", "datasets", "pyarrow", "pillow", "safetensors", "gguf", "pyyaml")


class TooSlowError(BaseException):
    """A reader did not come to an end; no `except Exception` on the way may take it for something else."""


@dataclass
class Count:
    """What became of the inputs of one reader.

    Attributes:
        reader: its name.
        inputs: how many.
        accepted: gave a value.
        refused: ended in the package's own error.
        crashes: ended otherwise.
        slowest: seconds of the slowest input.
        seconds: of all inputs, making them included.
        kinds: where crashes happened -> how many.
    """

    reader: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: int = 0
    slowest: float = 0.0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)


def all_readers() -> list[Reader]:
    """Every reader of the package that opens files of others."""
    return [*fuzz_data.readers(), *fuzz_models.readers(), *fuzz_runs.readers()]


def drawn(reader: Reader, seed: int) -> dict[str, bytes]:
    """The changed files of one input: by bytes where the seed is even, by structure where it is odd."""
    rng = random.Random(f"{reader.name} {seed}")
    if seed % 2:
        # What the writer of a form refuses (a number of 400 digits in a table) is no input of its reader.
        with suppress(RecursionError, ValueError, TypeError, ArithmeticError, AttributeError):
            return reader.structured(rng)
    name = rng.choice(reader.changeable)
    return {name: mutated_bytes(reader.files[name], rng)}


def put(folder: Path, files: Files) -> None:
    """Write files into a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@contextmanager
def place() -> Iterator[Path]:
    """A folder for the files, in memory where the system has one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None, prefix="fuzz-") as folder:
        yield Path(folder)


def fuzz(reader: Reader, seeds: Sequence[int], folder: Path, keep: Path | None = None) -> Count:
    """Give a reader one input a seed.

    Args:
        reader: under test.
        seeds: of the inputs.
        folder: empty, for the files.
        keep: where the files of crashes go; None throws them away.
    """
    count, began = Count(reader.name), time.perf_counter()
    put(folder, reader.files)
    with quiet():
        for seed in seeds:
            changed = drawn(reader, seed)
            put(folder, changed)
            started = time.perf_counter()
            crash = outcome(reader, folder, next(iter(changed)), count)
            count.slowest = max(count.slowest, time.perf_counter() - started)
            count.inputs += 1
            if crash is not None:
                count.crashes += 1
                count.kinds[crash] += 1
                if keep and count.kinds[crash] == 1:
                    shutil.copytree(folder, keep / f"{reader.name.replace(' ', '-')}-{seed}", dirs_exist_ok=True)
            restore(reader, folder, changed)
    count.seconds = time.perf_counter() - began
    return count


def in_child(reader: Reader, seeds: Sequence[int], keep: Path | None) -> Count:
    """`fuzz` in a process of its own, so that a reader that ends the process is counted, and its seed found."""
    with place() as folder:
        child = os.fork()
        if not child:
            status = 1
            try:
                files = folder / "files"
                files.mkdir()
                (folder / "count").write_bytes(pickle.dumps(fuzz(reader, seeds, files, keep)))
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if not status:
            found: Count = pickle.loads((folder / "count").read_bytes())  # our own child wrote it a moment ago
            return found
    if len(seeds) == 1:
        kind = f"the process ended with {os.waitstatus_to_exitcode(status)} at seed {seeds[0]}"
        return Count(reader.name, inputs=1, crashes=1, kinds=Counter({kind: 1}))
    whole, half = Count(reader.name), len(seeds) // 2
    for part in (seeds[:half], seeds[half:]):
        _add(whole, in_child(reader, part, keep))
    return whole


def restore(reader: Reader, folder: Path, changed: Files) -> None:
    """Bring the valid files back, those that a reader wrote or shortened included."""
    for name in {*changed, *reader.changeable}:
        path = folder / name
        if name in reader.files:
            path.write_bytes(reader.files[name])
        else:
            path.unlink(missing_ok=True)


def outcome(reader: Reader, folder: Path, changed: str, count: Count) -> str | None:
    """Let the reader read; None, or where and how it crashed."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        reader.read(folder, changed)
        count.accepted += 1
    except (HymaError, BadPicture) as error:
        if "\n" in str(error).strip() and len(str(error)) > 4000:
            return "a message of pages"
        count.refused += 1
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # what else a reader lets through is what is looked for
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "hyma_mllm" in frame.filename] or frames
        return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}: {str(error)[:120]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, no logs, and an alarm for a reader that does not end."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, ring)
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.signal(signal.SIGALRM, before)
        logging.disable(level)


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=10_000, help="of each reader")
    parser.add_argument("--readers", nargs="*", default=[], help="names of readers; all if left out")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--out", type=Path, help="JSON file of the table; keeps the lines of readers that do not run")
    parser.add_argument("--keep", type=Path, help="folder for the files of crashes")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, resource.RLIM_INFINITY))
    chosen = [reader for reader in all_readers() if not options.readers or reader.name in options.readers]
    counts = [Count(reader.name) for reader in chosen]
    with tqdm(total=options.inputs * len(chosen), unit="input") as bar:
        for number, reader in enumerate(chosen):
            bar.set_description(reader.name)
            for start in range(options.first, options.first + options.inputs, CHUNK):
                seeds = range(start, min(start + CHUNK, options.first + options.inputs))
                _add(counts[number], in_child(reader, seeds, options.keep))
                bar.update(len(seeds))
            for kind, times in counts[number].kinds.most_common():
                tqdm.write(f"{reader.name}: {times} x {kind}", file=sys.stderr)
    for count in counts:
        print(
            f"{count.reader:25} {count.inputs:7} {count.accepted:7} {count.refused:7} {count.crashes:5} "
            f"{count.seconds:6.0f} s"
        )
    if options.out:
        write_table(options.out, counts)
    sys.exit(any(count.crashes for count in counts))


def write_table(path: Path, counts: list[Count]) -> None:
    """The counts as JSON, in the place of what the file had of these readers."""
    before = json.loads(path.read_text(encoding="utf-8"))["readers"] if path.is_file() else []
    here = {"python": platform.python_version()} | {name: version(name) for name in VERSIONED}
    lines = {line["reader"]: line for line in before}
    lines |= {count.reader: asdict(count) | {"kinds": dict(count.kinds), "versions": here} for count in counts}
    write_text(path, json.dumps({"readers": list(lines.values())}, indent=1) + "\n")


def _add(whole: Count, part: Count) -> None:
    whole.inputs += part.inputs
    whole.accepted += part.accepted
    whole.refused += part.refused
    whole.crashes += part.crashes
    whole.seconds += part.seconds
    whole.slowest = max(whole.slowest, part.slowest)
    whole.kinds.update(part.kinds)


def _address_space() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0


if __name__ == "__main__":
    main()

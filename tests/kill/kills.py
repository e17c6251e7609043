"""Runs a recipe, kills it at chosen moments, runs it again, and says what is left on disk."""

import importlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).parent
PATIENCE = 240
"""Seconds that a run of seconds may take on a busy machine before the test gives up."""
LATEST = 0.1
"""A kill comes at most so many seconds after the change that it was drawn for."""
LIVE = 0.002


class Server:
    """The process that forks recipes; see server.py."""

    def __init__(self) -> None:
        quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | quiet,
        )  # fmt: skip
        self._read()

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)

    def start(self, **request: Any) -> int:
        """Fork; the process id."""
        return int(self._ask({"start": request})["pid"])

    def poll(self, pid: int) -> int | None:
        """The exit code, minus the signal where one ended the process; None while it lives."""
        code = self._ask({"poll": pid})["code"]
        return None if code is None else int(code)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server of recipes has died"
        found: dict[str, Any] = json.loads(line)
        return found


@dataclass(frozen=True)
class World:
    """A recipe on tiny data.

    Attributes:
        recipe: its file.
        options: run directory -> its command line.
        steps: fields of `phases.Steps`.
        shared: directories of the user's cache that every cache is given, so that nothing is fetched again.
    """

    recipe: Path
    options: Callable[[Path], list[str]]
    steps: dict[str, Any]
    shared: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Moment:
    """When a kill comes: at the `number`-th change of a file in a phase, or `delay` seconds after it.

    Attributes:
        victim: what is killed: every process (`group`), or of two processes the one of this rank.
    """

    phase: str
    number: int
    delay: float | None = None
    victim: str = "group"


@dataclass
class Run:
    """A command, its run directory and its cache, started as often as it takes.

    Attributes:
        struck: phases in which it was killed.
    """

    server: Server
    world: World
    folder: Path
    processes: int = 1
    struck: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.folder / "run"

    @property
    def features(self) -> Path:
        """What the run computes into the cache."""
        return self.folder / "cache" / "features"

    @property
    def output(self) -> Path:
        """What all starts have printed."""
        return self.folder / "output.txt"

    @property
    def trace(self) -> Path:
        """The changes of files of a traced start, a line each."""
        return self.folder / "trace.txt"

    def start(self, kill: Moment | None = None, trace: bool = False) -> list[int]:
        """Start the command; the process ids by rank."""
        cache = self.folder / "cache"
        self.features.mkdir(parents=True, exist_ok=True)
        for shared in self.world.shared:
            if not (cache / shared.name).exists():
                (cache / shared.name).symlink_to(shared, target_is_directory=True)
        environment = {"HYMA_CACHE": str(cache), "ACCELERATE_USE_CPU": "true"}
        if self.processes > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            environment |= {"WORLD_SIZE": str(self.processes), "LOCAL_WORLD_SIZE": str(self.processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.marker.unlink(missing_ok=True)
        pids: list[int] = []
        for rank in range(self.processes):
            watch = None
            if rank == 0 and (kill or trace):
                moment = kill and {
                    "phase": kill.phase, "number": kill.number, "hold": kill.delay is None, "marker": str(self.marker)
                }  # fmt: skip
                roots = [str(self.path), str(self.features)]
                watch = {"run": str(self.path), "roots": roots, "steps": self.world.steps, "kill": moment}
                watch["trace"] = str(self.trace) if trace else None
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if self.processes > 1 else {}
            pid = self.server.start(
                recipe=str(self.world.recipe),
                arguments=[*self.world.options(self.path), f"--processes={self.processes}"],
                environment=environment | own,
                output=str(self.output),
                watch=watch,
                group=pids[0] if pids else 0,
            )
            pids.append(pid)
        return pids

    @property
    def marker(self) -> Path:
        """A file that says that a moment has come."""
        return self.folder / "now"

    def finish(self, trace: bool = False) -> None:
        """Run the command to its end."""
        pids = self.start(trace=trace)
        codes = self.wait(pids)
        assert codes == [0] * len(pids), f"{codes}: {self.said()}"

    def strike(self, moment: Moment) -> bool:
        """Run the command and kill it; False where it came to its end before the moment did."""
        pids = self.start(moment)
        waited = time.monotonic()
        while not self.marker.exists():
            code = self.server.poll(pids[0])
            if code is not None:
                assert code == 0, self.said()
                self.wait(pids)
                return False
            assert time.monotonic() - waited < PATIENCE, self.said()
            time.sleep(LIVE)
        time.sleep(moment.delay or 0)
        if moment.victim == "group":
            os.killpg(pids[0], signal.SIGKILL)
        else:
            os.kill(pids[int(moment.victim)], signal.SIGKILL)
        codes = self.wait(pids)
        if all(code == 0 for code in codes):
            return False
        self.struck.append(phases.phase_of(self.path, phases.Steps(**self.world.steps)))
        return True

    def wait(self, pids: list[int]) -> list[int]:
        """Their exit codes, once all have ended."""
        waited = time.monotonic()
        codes: dict[int, int | None] = dict.fromkeys(pids)
        while None in codes.values():
            if time.monotonic() - waited > PATIENCE:
                os.killpg(pids[0], signal.SIGKILL)
                raise AssertionError(f"does not end: {self.said()}")
            for pid in pids:
                if codes[pid] is None:
                    codes[pid] = self.server.poll(pid)
            time.sleep(LIVE)
        return [code for code in codes.values() if code is not None]

    def said(self) -> str:
        """The end of what all starts have printed."""
        return self.output.read_text()[-3000:]

    def remove(self) -> None:
        """Make room."""
        shutil.rmtree(self.folder)


def moments(trace: Path, number: int) -> list[Moment]:
    """A kill in every phase of a traced run, at a random change of a file: in the midst of it, or some time after.

    They come in the order of the run, and each counts from the one before: what is done is not done again.

    Args:
        trace: of the run.
        number: seed; the phases that are hit in the midst of a change are those of every second place, by turns.
    """
    draw = random.Random(number)
    order = [line.split(" ", 1)[0] for line in trace.read_text().splitlines()]
    places = sorted(draw.choice([at for at, found in enumerate(order) if found == phase]) for phase in phases.PHASES)
    found = []
    for before, place in zip([-1, *places], places, strict=False):
        late = (phases.PHASES.index(order[place]) + number) % 2
        delay = LATEST * draw.random() ** 2 if late else None
        found.append(Moment(order[place], order[before + 1 : place + 1].count(order[place]), delay))
    return found


def of(moment: Moment, victim: str) -> Moment:
    """The same moment of another victim; one that lives on cannot be held, or the other would wait for it in vain."""
    return replace(moment, victim=victim, delay=moment.delay or (0.0 if victim == "1" else None))


def _sibling(name: str) -> Any:
    """A module of this folder: the tests are no package."""
    sys.path.insert(0, str(HERE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(HERE))


phases, files = _sibling("phases"), _sibling("same_files")

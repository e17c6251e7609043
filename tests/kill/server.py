"""Imports everything once, and forks a recipe for every request on stdin: a start then takes no seconds of imports.

A request is a line of JSON, and so is its answer: `{"start": {...}}` -> `{"pid": n}`, `{"poll": n}` -> `{"code": c}`
(None while it lives, minus the signal where one ended it). The child is the recipe as a user starts it, in a process
group of its own, but for a hook that stops it at a chosen change of its files: see `watch`.
"""

import gc
import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import scipy.stats  # noqa: F401
import timm  # noqa: F401
import torch
from phases import Steps, phase_of

import hyma_mllm.answered
import hyma_mllm.export
import hyma_mllm.mllm
import hyma_mllm.mllm_export
import hyma_mllm.report
import hyma_mllm.search.imported
import hyma_mllm.stitched.mllm
import hyma_mllm.stitched.vlm
import hyma_mllm.vlm  # noqa: F401

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
DIRECTORY_ARGUMENT = {"os.remove": 1, "os.rmdir": 1}
"""Event -> where it says in which open directory the name stands, as when a tree is removed."""


def changed(event: str, args: tuple[Any, ...]) -> str | None:
    """The path that an audit event is about to change; None where it changes none."""
    if event not in CHANGES or (event == "open" and not (isinstance(args[2], int) and args[2] & WRITES)):
        return None
    if not isinstance(args[0], str | bytes | os.PathLike):
        return None
    path = os.fsdecode(args[0])
    where = DIRECTORY_ARGUMENT.get(event)
    if where is not None and args[where] >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{args[where]}"), path)  # noqa: PTH115, PTH118
    return os.path.abspath(path)  # noqa: PTH100


def watch(run: str, roots: list[str], steps: dict[str, Any], kill: dict[str, Any] | None, trace: str | None) -> None:
    """Look at every change of a file below `roots` before it happens.

    Args:
        run: the run directory.
        roots: directories.
        steps: fields of `Steps`.
        kill: `phase`, `number`: the change in that phase at which the marker file `marker` is written; where the
            phase ends before, the first change of the export. With `hold` nothing more happens: the kill may come.
        trace: a file that gets a line per change: phase, event and path.
    """
    where, found = Path(run), Steps(**steps)
    inside, seen = threading.local(), 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or getattr(inside, "now", False):
            return
        inside.now = True
        try:
            path = changed(event, args)
            if path is None or not any(path.startswith(root + os.sep) for root in roots):
                return
            phase = phase_of(where, found)
            if trace is not None:
                with Path(trace).open("a") as stream:
                    stream.write(f"{phase} {event} {path}\n")
            if kill is not None:
                seen += phase == kill["phase"]
                if (phase == kill["phase"] and seen == kill["number"]) or phase == "export" != kill["phase"]:
                    Path(kill["marker"]).touch()
                    while kill["hold"]:
                        time.sleep(1)
        finally:
            inside.now = False

    sys.addaudithook(hook)


def play(request: dict[str, Any]) -> int:
    """Run the recipe in this process, as a user starts it; its exit code."""
    os.setpgid(0, request["group"])
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["environment"])
    sys.argv = [request["recipe"], *request["arguments"]]
    sys.path.insert(0, str(Path(request["recipe"]).parent))
    if request["watch"] is not None:
        watch(**request["watch"])
    try:
        runpy.run_path(request["recipe"], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def start(request: dict[str, Any]) -> int:
    """Fork; the child's process id."""
    # A thread of the parent does not come along, and what it had locked stays locked; jemalloc (pyarrow's) sees to it.
    threads = {task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
    assert threads <= {Path("/proc/self/comm").read_text().strip(), "jemalloc_bg_thd"}, f"the server runs {threads}"
    pid = os.fork()
    if pid:
        os.setpgid(pid, request["group"])  # here and there: whoever comes first
        return pid
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = play(request)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # All is on disk; shutting gloo down aborts now and then.
        os._exit(code)


def poll(pid: int) -> int | None:
    """Exit code of a child, None while it lives."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def main() -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = {"pid": start(request["start"])} if "start" in request else {"code": poll(request["poll"])}
        print(json.dumps(answer), flush=True)
    os._exit(0)  # libraries complain of what `gc.freeze` keeps


if __name__ == "__main__":
    main()

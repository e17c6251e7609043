"""A run directory: one live run at a time, one configuration, a log line per event, every file written atomically."""

import json
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import psutil
import torch
import yaml

from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import parse_json, parse_yaml
from hyma_mllm.paths import sweep, write_text
from hyma_mllm.redaction import redacted_arguments

PACKAGES = ("hyma_mllm", "torch", "transformers", "accelerate", "timm", "sentence-transformers", "datasets", "numpy")


def environment() -> dict[str, Any]:
    """The machine and the versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": psutil.cpu_count(logical=True),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "command": redacted_arguments(sys.argv),
    }


def processor_name() -> str:
    """The CPU's own name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    return {name: metadata.version(name) for name in PACKAGES}


class RunDirectory:
    """The directory of one run, held by a lock while the run lives.

    Args:
        path: of the directory; made if missing.
        config: resolved configuration; a rerun must have the same.
        main_process: whether this process writes (rank 0).
        option: of the command line that names the directory.

    Raises:
        HymaError: another live run holds it, or it was made with another configuration.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], main_process: bool = True, option: str = "--run") -> None:
        self.path = path
        self.main_process = main_process
        self.option = option
        self._lock: filelock.BaseFileLock | None = None
        if not main_process:
            return
        _check_place(path, option)
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _held(path, option)
        try:
            _check_config(path, config, option)
        except HymaError:
            self.close()
            raise
        sweep(path)
        write_text(path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        write_text(path / "environment.json", json.dumps(environment(), indent=2) + "\n")

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to log.jsonl (main process only)."""
        if self.main_process:
            with (self.path / "log.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"event": event, **fields}) + "\n")

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file of this run atomically (main process only)."""
        path = self.path / name
        if self.main_process:
            write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")
        return path

    def read_json(self, name: str) -> Any | None:
        """A JSON file of this run, None if it is not there.

        Raises:
            HymaError: it is there and broken.
        """
        path = self.path / name
        if not path.exists():
            return None
        try:
            return parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise HymaError(f"{path} is not readable JSON ({error}); remove it and run the command again.") from None

    def close(self) -> None:
        """Let another run have the directory."""
        if self._lock is not None:
            self._lock.release()


def check_run(path: Path, config: Mapping[str, Any], option: str = "--run") -> None:
    """Refuse what `RunDirectory` would refuse, and write nothing: for before the expensive work that comes before it.

    Raises:
        HymaError: as `RunDirectory`.
    """
    _check_place(path, option)
    _check_config(path, config, option)
    if (path / ".lock").exists():
        _held(path, option).release()


def _check_place(path: Path, option: str) -> None:
    if path.exists() and not path.is_dir():
        raise HymaError(f"{option} names {path}, which is a file; name a directory.")
    stranger = path.is_dir() and any(path.iterdir())
    if stranger and not (path / "config.yaml").exists() and not (path / ".lock").exists():
        raise HymaError(f"The directory {path} holds files but no run; name an empty or a new directory.")


def _held(path: Path, option: str) -> filelock.BaseFileLock:
    """The lock of a run directory, taken."""
    lock = filelock.FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise HymaError(
            f"The run directory {path} is in use by a live run; wait for it, stop it, or set {option} to another."
        ) from None
    return lock


def _check_config(run: Path, config: Mapping[str, Any], option: str) -> None:
    path = run / "config.yaml"
    if not path.exists():
        return
    try:
        old = parse_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(old, dict | None):
            raise ValueError("it holds no options")
    except (OSError, ValueError) as error:
        raise HymaError(f"{path} is not readable YAML ({error}); remove the run directory or name another.") from None
    changed = [
        f"{key} was {then!r} and is {now!r}"
        for key, then, now in _differences(old or {}, yaml.safe_load(yaml.safe_dump(dict(config))))
    ]
    if changed:
        raise HymaError(
            f"The run directory {run} holds a run of another configuration ({'; '.join(changed[:3])}); "
            f"give the old values back, or set {option} to a new directory."
        )


def _differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two nested configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in sorted({*old, *new}, key=str):
            found += _differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
        return found
    return [] if old == new else [(key, old, new)]

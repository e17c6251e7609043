"""What the step benchmarks share: contestants in fresh processes, best times, exact peaks, and the machine.

On Linux times are taken with huge pages (torch's `THP_MEM_ALLOC_ENABLE`), without which much of them is the kernel's,
handing out memory; peaks are taken apart, without huge pages, which round them up, and without the memory that the C
library keeps for later.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

Case = Mapping[str, Any]
"""What a script's `--case` takes, as JSON."""


def start_of_peak(device: str) -> int:
    """Bytes in use now; the peak is counted from here on."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")  # Linux: the high-water mark starts anew at what is in use
    return psutil.Process().memory_info().rss


def peak(device: str) -> int:
    """Most bytes in use since `start_of_peak`; since the process began where the mark cannot be reset."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux' ru_maxrss starts at the peak of the process that started this one
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fastest(step: Callable[[], object], seconds: float, device: str) -> float:
    """Seconds of the fastest step, of as many as fill `seconds` and at least one."""
    times: list[float] = []
    while not times or sum(times) < seconds:
        began = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def in_fresh_process(script: str, case: Case, seconds: float, **environment: str) -> dict[str, Any]:
    """What a script prints last for a case, as JSON, in a process of its own with these environment variables."""
    command = [sys.executable, script, "--case", json.dumps(dict(case)), "--seconds", str(seconds)]
    quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    variables = {**os.environ, **quiet, **environment}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=variables).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def for_time(script: str, case: Case, seconds: float) -> dict[str, Any]:
    """What a script finds with huge pages."""
    return in_fresh_process(script, case, seconds, THP_MEM_ALLOC_ENABLE="1")


def for_peak(script: str, case: Case) -> dict[str, Any]:
    """What a script finds in two steps, when all that is freed goes back to the system and pages are small."""
    return in_fresh_process(script, case, 0.0, THP_MEM_ALLOC_ENABLE="0", MALLOC_MMAP_THRESHOLD_="131072")


def machine(device: str) -> dict[str, Any]:
    """What the numbers are measured on, and how busy it is just before (1-minute load average)."""
    names = [line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "load_average": psutil.getloadavg()[0],
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_lines() -> list[str]:
    listing = Path("/proc/cpuinfo")
    return listing.read_text().splitlines() if listing.exists() else []

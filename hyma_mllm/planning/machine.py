"""What this machine has left for a process of the run."""

import os
import shutil
from pathlib import Path

import psutil
import torch

from hyma_mllm.paths import cache_dir
from hyma_mllm.planning.needs import Place, Room


def room_of(run: Path, device: torch.device) -> Room:
    """What is free now.

    Args:
        run: the run directory, which need not exist.
        device: where models run; on a GPU its free memory counts too.
    """
    here, there = cache_dir(), _existing(run)
    one_disk = here.stat().st_dev == there.stat().st_dev
    free: dict[Place, float] = {"cache": shutil.disk_usage(here).free}
    if not one_disk:
        free["run"] = shutil.disk_usage(there).free
    free["memory"] = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda":
        free["gpu"] = torch.cuda.mem_get_info(device)[0]
    return Room(free, one_disk)


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())

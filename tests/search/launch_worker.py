"""Trains tiny tasks as the launcher started it: launch_worker.py FOLDER PROCESSES KIND...; see test_engines.py."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import mllm_worker
import train_worker
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from hyma_mllm import launch
from hyma_mllm.launch_checks import asked
from hyma_mllm.search.methods import SearchConfig


def spare_a_compilation() -> None:
    """DeepSpeed compiles kernels for CPU processes of one machine, for minutes; gloo does without."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def shard_on_cpu() -> None:
    """What Accelerate makes of fsdp2.yaml on GPUs, and refuses to make on a CPU."""
    state = AcceleratorState._shared_state
    state["distributed_type"] = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="NO_WRAP", reshard_after_forward=True, cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )  # fmt: skip


def started(folder: Path, processes: int) -> Accelerator:
    """The accelerator as the recipes get it."""
    search = SearchConfig(batch=16)
    config = SimpleNamespace(
        run=folder, processes=processes, threads=1, mixed_precision=None, tracker=None, search=search
    )
    return launch.start(config)


def main() -> None:
    folder, processes, *kinds = sys.argv[1:]
    if asked("DEEPSPEED"):
        spare_a_compilation()
    accelerator = started(Path(folder), int(processes))
    if "fsdp2" in kinds:
        shard_on_cpu()
    for kind in kinds:
        if kind in ("data", "pairs"):
            mllm_worker.train(kind, accelerator, Path(folder))
        elif kind != "fsdp2":
            train_worker.train(kind, accelerator, Path(folder))
    # Shutting gloo down aborts now and then; everything is on disk.
    os._exit(0)


if __name__ == "__main__":
    main()

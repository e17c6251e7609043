"""What a launcher asked for, against what Accelerate made of it: it drops an engine or its processes without a word."""

import os
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType

from hyma_mllm.errors import HymaError


def asked(engine: str) -> bool:
    """Whether the launcher asked for `DEEPSPEED` or `FSDP`."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def launched() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accelerator_arguments() -> dict[str, Any]:
    """What `Accelerator` must be told on this machine: without a GPU it would start processes that do not meet."""
    # A rival trains only some shapes' connectors in a step, so some parameters may lack a gradient.
    handlers: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    if torch.accelerator.is_available():
        return {"kwargs_handlers": handlers}
    if asked("DEEPSPEED"):  # which on a CPU must not be told so, or Accelerate forgets it
        return {"kwargs_handlers": [*handlers, InitProcessGroupKwargs(backend="gloo")]}
    return {"kwargs_handlers": handlers, "cpu": True}


def check_engine(accelerator: Accelerator) -> None:
    """Refuse an engine that is not what the launcher asked for, or that would not train what one process does.

    Raises:
        HymaError: Accelerate started fewer processes, another engine, or one in a setting that is not supported.
    """
    if accelerator.num_processes != launched():
        raise HymaError(
            f"The launcher started {launched()} processes but Accelerate joined {accelerator.num_processes}; on a CPU "
            "launch with accelerate_configs/cpu_2.yaml."
        )
    for engine, kind in (("DEEPSPEED", DistributedType.DEEPSPEED), ("FSDP", DistributedType.FSDP)):
        if asked(engine) and accelerator.distributed_type != kind:
            raise HymaError(
                f"The launcher asked for {engine} but Accelerate started {accelerator.distributed_type.value}; "
                + ("set use_cpu to false in its file." if engine == "DEEPSPEED" else
                   "it shards on several GPUs only: launch with accelerate_configs/cpu_2.yaml or a DeepSpeed file.")
            )  # fmt: skip
    if accelerator.distributed_type not in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        return
    if accelerator.mixed_precision != "no":
        raise HymaError(
            f"mixed_precision is {accelerator.mixed_precision}, in which DeepSpeed and FSDP would hold the "
            "hypernetwork itself; set it to no, LLMs keep llm.dtype."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        if accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise HymaError("fsdp_version is 1; set it to 2, as accelerate_configs/fsdp2.yaml has it.")
    elif accelerator.state.deepspeed_plugin.zero_stage not in (1, 2, 3):
        raise HymaError(
            f"zero_stage is {accelerator.state.deepspeed_plugin.zero_stage}; set it to 1, 2 or 3, or launch with "
            "accelerate_configs/multi_gpu.yaml, which is the same without DeepSpeed."
        )

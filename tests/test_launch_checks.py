"""What is refused before a run: an engine that was asked for and did not come, or that would train something else."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command as validated
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import OffloadPolicy

from hyma_mllm.errors import HymaError
from hyma_mllm.launch_checks import accelerator_arguments, check_engine

CONFIGS = Path(__file__).parents[1] / "accelerate_configs"


def fake(kind: DistributedType, processes: int = 2, precision: str = "no", **plugins: Any) -> Accelerator:
    state = SimpleNamespace(**plugins)
    return SimpleNamespace(  # type: ignore[return-value]
        distributed_type=kind, num_processes=processes, mixed_precision=precision, state=state
    )


def zero(stage: int) -> dict[str, Any]:
    return {"deepspeed_plugin": SimpleNamespace(zero_stage=stage)}


@pytest.mark.parametrize(
    ("asked", "accelerator", "said"),
    [
        ("", fake(DistributedType.NO, 1), "started 2 processes but Accelerate joined 1; .*cpu_2.yaml"),
        ("DEEPSPEED", fake(DistributedType.MULTI_CPU), "asked for DEEPSPEED but .*MULTI_CPU; set use_cpu to false"),
        ("FSDP", fake(DistributedType.MULTI_CPU), "asked for FSDP but .*MULTI_CPU; it shards on several GPUs only"),
        ("DEEPSPEED", fake(DistributedType.DEEPSPEED, precision="bf16", **zero(2)), "mixed_precision is bf16.*to no"),
        ("DEEPSPEED", fake(DistributedType.DEEPSPEED, **zero(0)), "zero_stage is 0; set it to 1, 2 or 3"),
        ("FSDP", fake(DistributedType.FSDP, fsdp_plugin=SimpleNamespace(fsdp_version=1)), "version is 1; set it to 2"),
    ],
)
def test_another_engine_is_refused(
    asked: str, accelerator: Accelerator, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    if asked:
        monkeypatch.setenv(f"ACCELERATE_USE_{asked}", "true")
    with pytest.raises(HymaError, match=said):
        check_engine(accelerator)


def test_what_was_asked_for_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_engine(fake(DistributedType.MULTI_GPU, precision="bf16"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    check_engine(fake(DistributedType.DEEPSPEED, **zero(3)))


def test_only_deepspeed_is_not_told_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert accelerator_arguments()["cpu"] is True
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    found = accelerator_arguments()
    assert "cpu" not in found and found["kwargs_handlers"][-1].backend == "gloo"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert len(accelerator_arguments()["kwargs_handlers"]) == 1


def environment(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `accelerate launch` tells the processes that a file starts."""
    path = str(CONFIGS / f"{name}.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", path, "recipes/vlm.py"])
    args, _, _ = validated(arguments)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        _, found = prepare_deepspeed_cmd_env(args)
    else:
        found = prepare_multi_gpu_env(args)
    for key, value in found.items():
        monkeypatch.setenv(key, value)
    assert args.num_processes == 2
    return dict(found)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_deepspeed_files_make_the_plugin_that_they_say(
    stage: int, offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That training works under them is tested in search/test_engines.py; here, that offload is not left out."""
    pytest.importorskip("deepspeed")
    environment(f"deepspeed_zero{stage}{'_offload' if offload else ''}", monkeypatch)
    config = DeepSpeedPlugin().deepspeed_config
    place = "cpu" if offload else "none"
    assert config["zero_optimization"]["stage"] == stage
    assert config["zero_optimization"]["offload_optimizer"]["device"] == place
    assert config["zero_optimization"]["offload_param"]["device"] == (place if stage == 3 else "none")


def test_the_fsdp_file_makes_the_plugin_that_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment("fsdp2", monkeypatch)
    assert found["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert type(plugin.cpu_offload) is OffloadPolicy and str(plugin.state_dict_type).endswith("SHARDED_STATE_DICT")

"""Searches the tiny causal task, pair-parallel or data-parallel; started by launch_worker.py."""

import json
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import save_file
from tiny_causal import make_task

from hyma_mllm.hypernetwork.presets import HypernetworkConfig
from hyma_mllm.objectives.causal_lm import CausalConfig, CausalObjective
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.search.interrupt import StopRequest
from hyma_mllm.search.methods import Method, Search, SearchConfig, all_connectors
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.search.placement import Load, Parallel, place


def train(parallel: Parallel, accelerator: Accelerator, folder: Path) -> None:
    task = make_task(double=False)
    world = accelerator.num_processes
    loads = [Load("a", 1.0, 1.0), Load("b", 2.0, 2.0)]
    placement = place(parallel, loads, world, accelerator.process_index)
    held = [llm for llm in task.readers if placement.here(llm)]
    task.readers = {llm: task.readers[llm] for llm in held}  # the others are not to be had here
    fast = OptimiserConfig(lr=5e-3)
    config = SearchConfig(
        methods=["hyma", "grid"], connectors=["mlp1"], hidden=0, activation="gelu", seeds=[0], steps=6, grid_steps=4,
        batch=8, parallel=parallel, optimiser=fast, rival_optimiser=fast, evaluate_every=3, checkpoint_every=2,
        warm_start="words",
    )  # fmt: skip
    run = RunDirectory(folder / parallel, {}, accelerator.is_main_process)
    objective = CausalConfig(vocabulary_chunk=7)
    search = Search(
        config, HypernetworkConfig(trunk=[16, 16]), lambda: CausalObjective(objective), task, *task.means(),
        accelerator, run, StopRequest(), placement,
    )  # fmt: skip
    methods: tuple[Method, ...] = ("hyma", "grid")
    for method in methods:
        found = search.run_method(method, "mlp1", 0, None)
        if accelerator.is_main_process:
            name = f"{parallel}-{method}"
            save_file(all_connectors(found.network, len(task.grid)), folder / f"{name}.st")
            details = {key: value for key, value in found.ranking.details.items() if "loss" in key}
            done = {"world": world, "held": held, "details": details}
            done |= {"engine": accelerator.distributed_type.value, "flops": found.ledger.phases["training"].flops}
            (folder / f"{name}.json").write_text(json.dumps(done))
        accelerator.wait_for_everyone()
        accelerator.free_memory()

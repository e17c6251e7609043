"""A small synthetic search: encoders are random views of shared latents, so that a connector has something to learn."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hyma_mllm.hypernetwork.base import BaseKind
from hyma_mllm.hypernetwork.presets import HypernetworkConfig, Preset
from hyma_mllm.objectives.contrastive import ContrastiveConfig, ContrastiveObjective
from hyma_mllm.pairs import PairGrid
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.search.interrupt import StopRequest
from hyma_mllm.search.methods import Search, SearchConfig
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.search.task import VLMTask, ZeroShotSet

LATENT = 12
PICTURES = 120
CLASSES = 4


def make_task(vision_widths: tuple[int, ...] = (16, 24), text_widths: tuple[int, ...] = (20, 20, 12)) -> VLMTask:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(PICTURES) % CLASSES
    centres = torch.randn(CLASSES, LATENT, generator=g)
    latent = torch.randn(PICTURES, LATENT, generator=g) + 1.5 * centres[labels]
    captions = torch.arange(PICTURES) % 3 + 1  # one to three captions a picture
    owner = torch.repeat_interleave(torch.arange(PICTURES), captions)
    spoken = latent[owner] + 0.1 * torch.randn(len(owner), LATENT, generator=g)
    images = [
        nn.functional.normalize(
            latent @ torch.randn(LATENT, w, generator=g) + 0.1 * n * torch.randn(PICTURES, w, generator=g), dim=1
        )
        for n, w in enumerate(vision_widths)
    ]
    views = [torch.randn(LATENT, w, generator=g) for w in text_widths]
    texts = [spoken @ view / LATENT**0.5 for view in views]
    order = torch.randperm(PICTURES, generator=g)
    grid = PairGrid(
        tuple(f"v{n}" for n in range(len(vision_widths))),
        vision_widths,
        tuple(f"t{n}" for n in range(len(text_widths))),
        text_widths,
    )
    test = order[90:]
    return VLMTask(
        grid=grid,
        images=images,
        texts=texts,
        first_caption=torch.cat([torch.zeros(1, dtype=torch.long), captions.cumsum(0)]),
        train=order[:70],
        validation=order[70:90],
        test=test,
        caption_group=torch.arange(len(owner)),
        zero_shot=[ZeroShotSet("latent", test, labels[test], 1, [centres @ view / LATENT**0.5 for view in views])],
    )


@pytest.fixture
def task() -> VLMTask:
    return make_task()


@pytest.fixture
def small_task() -> VLMTask:
    """One pair."""
    return make_task((16,), (12,))


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run", {"a": 1})


@pytest.fixture
def search(task: VLMTask, tmp_path: Path, accelerator: Accelerator) -> Callable[..., Search]:
    """Searches of the synthetic task: a preset, a base of the hypernetwork, and changes to a quick configuration."""
    number = 0

    def make(preset: Preset = "default", base: BaseKind | None = None, **changes: object) -> Search:
        nonlocal number
        number += 1
        values: dict[str, object] = {
            "connectors": ["linear"],
            "hidden": 16,
            "seeds": [0],
            "steps": 10,
            "grid_steps": 30,
            "batch": 16,
            "optimiser": OptimiserConfig(lr=1e-2),
            "rival_optimiser": OptimiserConfig(lr=1e-2),
            "evaluate_every": 0,
            "checkpoint_every": 0,
        }
        config = SearchConfig(**(values | changes))  # type: ignore[arg-type]
        run = RunDirectory(tmp_path / f"run{number}", {})
        objective = partial(ContrastiveObjective, ContrastiveConfig(scale=20.0))
        network = HypernetworkConfig(preset=preset, base=base)
        means = [x[task.train].mean(0) for x in task.images], [x.mean(0) for x in task.texts]
        return Search(config, network, objective, task, *means, accelerator, run, StopRequest())

    return make

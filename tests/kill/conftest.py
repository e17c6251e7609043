"""Both recipes as commands of seconds, and a server that starts them."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hyma_mllm.paths import cache_dir

TESTS = Path(__file__).parents[1]
RECIPES = TESTS.parent / "recipes"
COMMON = [
    "--threads=1",
    "--search.methods=[hyma, grid]",
    "--search.connectors=[linear]",
    "--search.seeds=[0]",
    "--search.steps=6",
    "--search.grid_steps=4",
    "--search.evaluate_every=2",
    "--search.checkpoint_every=1",
    "--search.polish.top=1",
    "--search.polish.steps=3",
]
STEPS = {"last": {"hyma": 6, "grid": 4, "hyma+polish": 3}, "evaluate_every": 2}


def load(path: Path) -> ModuleType:
    """A helper of the tests by its path: they are no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def kills() -> ModuleType:
    return load(Path(__file__).with_name("kills.py"))


@pytest.fixture(scope="session")
def server(kills: ModuleType) -> Iterator[Any]:
    with kills.Server() as server:
        yield server


@pytest.fixture(scope="session")
def vlm(kills: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """recipes/vlm.py: two packaged image encoders, a packaged and a tiny text encoder, 64 pictures."""
    helpers = load(TESTS / "end_to_end" / "conftest.py")
    root = tmp_path_factory.mktemp("vlm")
    pictures, text = helpers.write_pictures(root / "pictures"), helpers.write_text_model(root / "text")
    shared = tuple(cache_dir() / name for name in ("models", "packages"))
    for folder in shared:
        folder.mkdir(exist_ok=True)

    def options(run: Path) -> list[str]:
        return [
            f"--run={run}",
            "--image_encoders=[mobilenetv2, efficientnet-lite0]",
            f"--text_encoders=[paraphrase-minilm-l3, 'hf:{text}']",
            f"--data.sources=['{pictures}']",
            "--data.limit=64",
            "--embedding.shard_rows=24",
            "--search.batch=32",
            *COMMON,
        ]

    return kills.World(RECIPES / "vlm.py", options, STEPS, shared)


@pytest.fixture(scope="session")
def mllm(kills: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """recipes/mllm.py: two tiny towers, two tiny LLMs, 80 questions."""
    world = load(TESTS / "end_to_end" / "mllm_run.py").make_world(tmp_path_factory.mktemp("mllm"))
    return kills.World(RECIPES / "mllm.py", lambda run: world.options(run, *COMMON), STEPS)


@pytest.fixture(scope="session", params=["vlm", "mllm"])
def world(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)

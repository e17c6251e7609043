"""From a run to a stitched MLLM: what stood outside the projector is folded in, and nothing else changes."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mllm_run as tiny_run
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hyma_mllm import connectors, mllm_export
from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.data.pictures import open_picture
from hyma_mllm.data.question_sets import asked
from hyma_mllm.errors import HymaError
from hyma_mllm.search.mllm_task import MLLMTask
from hyma_mllm.search.ranking import SearchResult
from hyma_mllm.search.stored import StoredConnectors
from hyma_mllm.stitched.mllm import StitchedMLLM
from hyma_mllm.stitched.mllm_processor import messages

NAMES = ("linear", "mlp1")


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_folded_projector_is_the_formula_on_raw_inputs(depth: int, activation: str) -> None:
    draw = torch.Generator().manual_seed(depth)
    shape = ConnectorSpec(depth, 7, activation)
    params = connectors.initial(shape, (5, 6), 1, draw)
    state = {name: value[0].double() for name, value in params.items()}
    x = 3 + torch.randn(11, 5, generator=draw, dtype=torch.float64)
    mean, spread = torch.randn(5, generator=draw).double(), 0.1 + torch.rand(5, generator=draw).double()
    module = connectors.module(shape, (5, 6)).double()
    module.load_state_dict(state)
    wanted = 0.37 * module((x - mean) / spread)
    module.load_state_dict(connectors.folded(state, mean, spread, 0.37))
    torch.testing.assert_close(module(x), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state["0.weight"], params["0.weight"][0].double())  # the state itself stays


class Searched(SimpleNamespace):
    """A finished run and the task that it searched."""

    world: Any
    run: Path
    task: MLLMTask


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    world = tiny_run.make_world(tmp_path_factory.mktemp("export"))
    run, held = world.folder / "run", []
    save = mllm_export.save_folding

    def keep(path: Path, task: MLLMTask, specs: list[ConnectorSpec]) -> None:
        held.append(task)
        save(path, task, specs)

    options = ["--search.methods=[hyma]", "--search.connectors=[linear, mlp1]", "--search.steps=2"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HYMA_CACHE", str(world.folder / "cache"))
        patched.setattr(mllm_export, "save_folding", keep)
        patched.setattr(sys, "argv", ["mllm.py", *world.options(run, *options)])
        tiny_run.reset_accelerate()
        runpy.run_path(str(tiny_run.RECIPE), run_name="__main__")
        tiny_run.reset_accelerate()
    return Searched(world=world, run=run, task=held[0])


@torch.no_grad()
def task_logits(searched: Searched, name: str, pairs: list[int], row: int) -> Tensor:
    """Logits [pairs, prompt, vocabulary] behind the picture, as the search's own forward pass has them."""
    task = searched.task
    shape = ConnectorSpec.named(name, hidden=0, activation="gelu")
    reader = task.readers[task.grid.pair(pairs[0]).text]
    groups = StoredConnectors(searched.run, f"hyma-{name}-0", task.grid)(pairs)
    hidden, _ = task._hidden(groups, shape, torch.tensor([row]), reader.texts([row]))
    length = len(reader.prompter.prompt(asked(task.rows[row], task.suffix)))
    return reader.model.logits(hidden)[:, 0, :length]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pairs", [[0, 2], [1, 3]])
def test_the_exported_model_computes_what_the_search_computed(searched: Searched, name: str, pairs: list[int]) -> None:
    task = searched.task
    row = int(task.tests["vqa questions"][0])
    question = task.rows[row]
    wanted = task_logits(searched, name, pairs, row)
    found = []
    for index in pairs:
        stitched = mllm_export.stitch(searched.run, task.grid.name(index), name)
        text = stitched.processor.apply_chat_template(
            messages(asked(question, task.suffix)), add_generation_prompt=True, tokenize=False
        )
        inputs = stitched.processor(text=[text], images=[open_picture(question.image)], return_tensors="pt")
        with torch.no_grad():
            logits = stitched.model(**inputs).logits
        found.append(logits[0, -wanted.shape[1] :, : wanted.shape[2]])
    torch.testing.assert_close(torch.stack(found), wanted, atol=1e-4, rtol=1e-4)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2, "the towers make no difference"


def test_what_is_folded_is_kept_for_every_tower_and_pair(searched: Searched) -> None:
    kept = load_file(searched.run / mllm_export.FOLDING)
    assert set(kept) == {f"{n}.{kind}" for n in (0, 1) for kind in ("mean", "spread")} | {f"scale.{n}" for n in NAMES}
    for name in NAMES:
        shape = ConnectorSpec.named(name, hidden=0, activation="gelu")
        assert kept[f"scale.{name}"].tolist() == searched.task.scales(shape)


def test_the_exported_scores_are_the_pairs_own(searched: Searched) -> None:
    result = SearchResult.load(searched.run / "ranking.json")
    config = mllm_export.stitch(searched.run, searched.task.grid.name(3), "linear").config
    ranking = next(ranking for ranking in result.rankings if ranking.connector == "linear")
    assert config.scores == {"vqa questions": ranking.scores["vqa questions"][3]}
    assert config.blind == {"vqa questions": ranking.details["blind vqa questions"][3]}
    assert config.connector == ConnectorSpec.named("linear", hidden=config.llm.width, activation="gelu")


def test_a_loaded_llm_is_used_unless_the_run_was_quantised(searched: Searched, tmp_path: Path) -> None:
    stranger = SimpleNamespace(card=SimpleNamespace(id=searched.world.llms[0]))
    pair = searched.task.grid.name(0)
    with pytest.raises(AttributeError):
        mllm_export.stitch(searched.run, pair, models=[stranger])  # taken, and no LLM
    quantised = copied(searched.run, tmp_path, lambda held: held["config"]["llm"].update(quantisation="int8"))
    assert isinstance(mllm_export.stitch(quantised, pair, models=[stranger]), StitchedMLLM)


def copied(run: Path, folder: Path, change: Any) -> Path:
    """The run with another ranking.json."""
    held = json.loads((run / "ranking.json").read_text())
    change(held)
    for name in ("connectors", mllm_export.FOLDING):
        (folder / name).symlink_to(run / name)
    (folder / "ranking.json").write_text(json.dumps(held))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: held.update(case="vlm"), r"is a run of recipes/vlm\.py"),
        (lambda held: held["text"][0].update(revision="0" * 40), "is now at revision"),
        (lambda held: held["vision"][0].update(revision="0" * 40), "is now at revision"),
        (lambda held: held["rankings"][0].update(seed=5) or held["rankings"][1].update(seed=5), "is missing; run the"),
    ],
)
def test_a_run_that_does_not_fit_its_parts(searched: Searched, change: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(HymaError, match=said):
        mllm_export.stitch(copied(searched.run, tmp_path, change), searched.task.grid.name(0))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pair": "clip,llama"}, "has no pair clip,llama; "),
        ({"connector": "mlp2"}, "has no mlp2 projectors; did you mean mlp1"),
        ({"method": "gird"}, "no ranking by gird"),
    ],
)
def test_names_that_the_run_does_not_have(searched: Searched, options: dict[str, str], said: str) -> None:
    with pytest.raises(HymaError, match=said):
        mllm_export.stitch(searched.run, **options)

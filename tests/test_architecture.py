"""The order of the rooms, and that every option is read: facts about the source, found by parsing it."""

import ast
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

import hyma_mllm
from hyma_mllm.finetune import FinetuneConfig
from hyma_mllm.mllm import MLLMConfig
from hyma_mllm.vlm import VLMConfig

ROOT = Path(hyma_mllm.__file__).parent
REPOSITORY = ROOT.parent
FLOORS = [
    {"errors", "paths", "foreign", "foreign_tensors", "redaction"},
    {"zoo", "packages"},
    {"data"},
    {"pairs", "connectors"},
    {"hypernetwork"},
    {"objectives"},
    {"metrics"},
    {"run_directory", "search"},
    {"planning"},
    {"stitched"},
    {
        "export",
        "examples",
        "report",
        "report_log",
        "report_plots",
        "report_answers",
        "report_pictures",
        "answered",
        "mllm_export",
        "vlm",
        "vlm_plan",
        "mllm",
        "mllm_plan",
        "plans",
        "mllm_placement",
        "launch",
        "launch_checks",
        "finetune",
        "finetune_state",
        "answer",
        "command",
        "cli",
    },
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def room(module: str) -> str:
    """`hyma_mllm.data.rows` -> `data`; `hyma_mllm` itself is below everything."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> Iterator[str]:
    """Every module of the package that the file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            # `from hyma_mllm import report` names the module in its alias.
            plain = node.module == "hyma_mllm"
            names = [f"hyma_mllm.{alias.name}" for alias in node.names] if plain else [node.module]
        else:
            names = []
        yield from (name for name in names if name.split(".")[0] == "hyma_mllm")


MODULES = sorted(ROOT.rglob("*.py"))


def place(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_no_later_one(path: Path) -> None:
    here = place(path)
    if here == "__init__":
        assert not list(imports(path))
        return
    assert here in FLOOR, f"the room {here} has no place in the order"
    for module in imports(path):
        there = room(module)
        if there.startswith("__"):  # the version
            continue
        assert FLOOR[there] <= FLOOR[here], f"{path.relative_to(ROOT)} imports {module}"
        if here == "stitched":
            assert there not in ("search", "hypernetwork"), "an exported model must load without them"


def test_stitched_reaches_neither_search_nor_hypernetwork_through_others() -> None:
    reached, todo = set[str](), [path for path in MODULES if place(path) == "stitched"]
    while todo:
        for module in imports(todo.pop()):
            if module in reached:
                continue
            reached.add(module)
            path = ROOT.parent / Path(*module.split("."))
            todo += [found for found in (path.with_suffix(".py"), path / "__init__.py") if found.exists()]
    assert reached
    assert not {room(module) for module in reached} & {"search", "hypernetwork"}


def test_modules_are_short_and_recipes_shorter() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {path.name: length for path, length in lengths.items() if length > 400} == {}
    for recipe in (REPOSITORY / "recipes").glob("*.py"):
        assert len(recipe.read_text(encoding="utf-8").splitlines()) < 150


def configurations(kind: type) -> Iterator[type]:
    """This dataclass and every one that stands in its fields."""
    yield kind
    for field in dataclasses.fields(kind):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            yield from configurations(type(default))


KINDS = list(dict.fromkeys(kind for top in (VLMConfig, MLLMConfig, FinetuneConfig) for kind in configurations(top)))


def outside_checks(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, without the bodies of `__post_init__`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.FunctionDef) and child.name == "__post_init__"):
            yield from outside_checks(child)


@functools.cache
def attributes_read() -> set[str]:
    """Every name that some code reads as an attribute, checks of the value itself left out."""
    sources = itertools.chain(MODULES, *((REPOSITORY / part).glob("*.py") for part in ("recipes", "eval")))
    return {
        node.attr
        for path in sources
        for node in outside_checks(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_option_is_read_and_explained(kind: type) -> None:
    names = [field.name for field in dataclasses.fields(kind)]
    unread = set(names) - attributes_read()
    assert not unread, f"nobody reads {kind.__name__}.{', '.join(sorted(unread))}"
    explained = (kind.__doc__ or "").split("Attributes:")[-1]
    for name in names:
        assert f"{name}:" in explained or f"{name}," in explained, f"{kind.__name__}.{name} is not explained"

"""How a recipe runs: configuration from YAML and command line, a checked Accelerator, the run directory around it."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import jsonargparse
import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import UNREADABLE, check_yaml, reason
from hyma_mllm.launch_checks import accelerator_arguments, check_engine
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.search.methods import SearchConfig
from hyma_mllm.search.session import is_finished
from hyma_mllm.search.trainer import check_processes

logger = logging.getLogger("hyma_mllm")


class RecipeConfig(Protocol):
    """What every recipe's configuration holds."""

    run: Path
    processes: int
    threads: int
    mixed_precision: Literal["no", "bf16", "fp16"] | None
    tracker: Literal["tensorboard", "wandb", "trackio"] | None
    search: SearchConfig

    def resolved(self) -> dict[str, Any]:
        """Plain values: everything that decides the result."""


_read_yaml = jsonargparse.get_loader("yaml")


def _checked_yaml(text: str) -> Any:
    """What jsonargparse reads, of a text whose aliases and nesting stay within limits."""
    try:
        check_yaml(text)
        return _read_yaml(text)
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


# Every file and every value goes through it. What is too large must be refused here: the parser copies and prints it.
jsonargparse.set_loader("yaml", _checked_yaml, exceptions=(yaml.YAMLError,))

C = TypeVar("C")
R = TypeVar("R", bound=RecipeConfig)
W = TypeVar("W")


def parse(
    kind: type[C],
    default: Path,
    shortcuts: Mapping[str, str] | None = None,
    arguments: Sequence[str] | None = None,
) -> tuple[C, bool]:
    """Read the command line: (configuration, dry run?).

    Args:
        kind: dataclass of the configuration.
        default: YAML whose values hold where the command line says nothing.
        shortcuts: option, e.g. `accept-terms` -> list of the configuration that its values are added to.
        arguments: what to read in place of the command line.
    """
    parser = jsonargparse.ArgumentParser(
        description=(kind.__doc__ or "").splitlines()[0], default_config_files=[str(default)]
    )
    parser.add_argument("--config", action="config", help="YAML file; later options win over it")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the bill, and stop")
    parser.add_class_arguments(kind)
    for short, target in (shortcuts or {}).items():
        parser.add_argument(f"--{short}", type=str, nargs="+", default=[], help=f"add to {target}, e.g. gemma")
    with readable_options():
        read = parser.parse_args(arguments)
        for short, target in (shortcuts or {}).items():
            read[target] = [*read[target], *read.pop(short.replace("-", "_"))]
        found = parser.instantiate_classes(read)
    names = kind.__dataclass_fields__  # type: ignore[attr-defined]
    return kind(**{name: found[name] for name in names}), bool(found["dry_run"])


@contextmanager
def readable_options() -> Iterator[None]:
    """Turn what the parser raises on a damaged configuration into a sentence; plain mistakes it reports itself.

    Raises:
        HymaError: in place of the parser's errors.
    """
    try:
        yield
    except UNREADABLE as error:
        raise HymaError(
            f"The options cannot be read: {reason(error)}; mend the command line, or the file behind --config."
        ) from error


def start(config: RecipeConfig) -> Accelerator:
    """The accelerator of this process, checked against what was asked for.

    Raises:
        HymaError: another number of processes or another engine than the launcher was to start, a batch that they
            cannot share, or a tracker or an engine that is not installed.
    """
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=config.tracker,
            project_dir=str(config.run) if config.tracker else None,
            **accelerator_arguments(),
        )
    except (ImportError, ValueError) as error:
        raise HymaError(
            f"Accelerate cannot start ({str(error).splitlines()[0]}); change mixed_precision, tracker or the "
            "launcher's file, or install what is missing."
        ) from error
    check_engine(accelerator)
    # Pair-parallel processes share a batch within groups, which the recipe knows.
    check_processes(accelerator, config.processes, config.search.batch if config.search.parallel == "data" else 0)
    # Launchers set one thread a process, which leaves most of a CPU idle.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.threads or max(1, (psutil.cpu_count(logical=False) or 1) // local))
    level = logging.INFO if accelerator.is_main_process else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(level)
    set_seed(config.search.seeds[0])
    return accelerator


def in_run_directory(
    config: R,
    accelerator: Accelerator,
    finished: Sequence[str],
    search: Callable[[R, Accelerator, RunDirectory], None],
    show: Callable[[Path], None],
) -> None:
    """Search in the run directory of a recipe, unless that was done before, and show what it holds.

    Args:
        config: of the recipe.
        accelerator: of this process.
        finished: files of a finished run.
        search: fills the run directory.
        show: writes the report and prints a summary, on the main process.
    """
    main = accelerator.is_main_process
    with closing(agreed(lambda: RunDirectory(config.run, config.resolved(), main))) as run:
        if is_finished(run.path, finished):
            accelerator.print(f"The run {run.path} was finished before; set --run to a new directory for another.")
        else:
            if config.tracker:
                accelerator.init_trackers("hyma_mllm", config={"run": str(config.run)})
            search(config, accelerator, run)
            accelerator.end_training()
        if accelerator.is_main_process:
            show(run.path)


def agreed(work: Callable[[], W]) -> W:
    """What `work` gives; where it fails in the main process, that one says why and the others end without a word.

    Raises:
        SystemExit: in the others, with the code that the main process ends with.
    """
    found, refusal = list[W](), None
    try:
        found.append(work())
    except Exception as error:
        refusal = error
    refused = [refusal is not None]
    broadcast_object_list(refused)
    if refusal is not None:
        raise refusal
    if refused[0]:
        raise SystemExit(2)
    return found[0]

"""What command lines do with a user's mistake, a signal, a full disk or memory: one sentence and an exit code."""

import errno
import sys
from collections.abc import Callable

import torch
from huggingface_hub.utils.tqdm import enable_progress_bars
from rich.console import Console
from safetensors import SafetensorError

from hyma_mllm.errors import HymaError
from hyma_mllm.redaction import redacted
from hyma_mllm.search.interrupt import SearchInterruptedError

FULL = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing file")
"""How libraries that write past Python's own files say it, and torch's writer, which says no more than that."""

NO_MEMORY = "can't allocate memory"
"""How torch says on a CPU that memory is full; on a GPU it raises an error of its own."""


def run(main: Callable[[], None], when_full: str = "lower the batch size and run again") -> None:
    """Run a command line; a `HymaError` becomes its one sentence on stderr, without a traceback.

    Args:
        main: parses the command line and does the work.
        when_full: what to do when the memory of GPU or machine is full: the settings to lower.

    Raises:
        SystemExit: with code 2 after a `HymaError` or a full disk or memory, 130 after SIGINT, 143 after SIGTERM. Any
            other error is a fault of the package and keeps its traceback.
    """
    try:
        main()
    except SearchInterruptedError as error:
        _end(str(error), error.exit_code)
    except HymaError as error:
        _end(f"error: {error}", 2)
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or NO_MEMORY in str(error):
            device = "GPU" if isinstance(error, torch.OutOfMemoryError) else "machine"
            _end(f"error: The memory of the {device} is full; {when_full}.", 2)
        if not _disk_is_full(error):
            raise
        place = getattr(error, "filename", None)
        where = f"The disk that holds {place} is full" if place else "The disk is full"
        _end(f"error: {where}; free some space and run the same command again to go on.", 2)


def _end(sentence: str, code: int) -> None:
    sys.stdout.flush()
    print(redacted(sentence), file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def _disk_is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(sign in str(error) for sign in FULL)


def console() -> Console:
    """Where tables are printed; in a pipe or a file, where nothing tells a width, wide enough to break no line."""
    found = Console()
    return found if found.is_terminal else Console(width=200)


def hide_loading_bars() -> None:
    """Leave out transformers' bars over the tensors of a file on disk; downloads keep theirs."""
    from transformers.utils import logging  # slow to import, and not every command loads a model

    logging.disable_progress_bar()
    enable_progress_bars()

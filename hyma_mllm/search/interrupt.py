"""Ctrl-C and SIGTERM ask for a checkpoint instead of tearing the run apart."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from hyma_mllm.errors import HymaError


class SearchInterruptedError(HymaError):
    """The user or the system asked the run to stop; its state is on disk.

    Attributes:
        number: of the signal; SIGTERM where another process had it, for only the system asks a process of many.
    """

    number: signal.Signals = signal.SIGTERM

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as shells have it: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + self.number


class StopRequest:
    """Set once a signal has come.

    Attributes:
        signal: its name, None before.
        deferred: whether someone watches for it and leaves by himself; otherwise the signal ends the run at once.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.deferred = False

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Let the block watch for the signal, to leave where its state can be saved."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM while the block runs; a second signal ends the process the ordinary way.

    Raises:
        SearchInterruptedError: at the signal, where no one watches for it (`StopRequest.watched`).
    """
    request = StopRequest()
    before: dict[signal.Signals, Any] = {}

    def handler(number: int, _frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name
        for caught, old in before.items():
            signal.signal(caught, old)
        if not request.deferred:
            raise SearchInterruptedError(
                f"Stopped by {request.signal}; checkpoints and all that was finished are kept, run the same command "
                "again to go on."
            )

    for caught in (signal.SIGINT, signal.SIGTERM):
        before[caught] = signal.signal(caught, handler)
    try:
        yield request
    except SearchInterruptedError as error:
        if request.signal is not None:
            error.number = signal.Signals[request.signal]
        raise
    finally:
        for caught, old in before.items():
            signal.signal(caught, old)


def asked_to_stop(request: StopRequest, accelerator: Accelerator) -> bool:
    """Whether a signal reached any process: all must leave at the same step."""
    if accelerator.num_processes == 1:
        return bool(request)
    asked = torch.tensor([int(bool(request))], device=accelerator.device)
    return bool(accelerator.gather(asked).any())

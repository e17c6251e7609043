"""What a killed tuning goes on from: checkpoints of what is trained; order and dropout that follow from the step."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Sampler

from hyma_mllm.foreign import parse_json
from hyma_mllm.paths import write_text
from hyma_mllm.search.checkpoints import Checkpoints
from hyma_mllm.search.interrupt import SearchInterruptedError, StopRequest, asked_to_stop
from hyma_mllm.search.samplers import generator

FOLDER = "checkpoints"
LOG = "log.jsonl"
_FILE = "tuned.pt"


class Order(Sampler[int]):
    """The rows of an epoch, in an order of its own that seed and epoch decide.

    Args:
        rows: how many.
        seed: of all epochs.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        # Not by `set_epoch`: Accelerate would call it, and counts from 0 in each process that it is started in.
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.rows, generator=generator(self.seed, self.epoch)).tolist()

    def __len__(self) -> int:
        return self.rows


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make what is drawn from here on, dropout above all, follow from these, so that no generator need be stored."""
    torch.manual_seed(generator(seed, step, rank).initial_seed())


@dataclass
class Tuned:
    """The trained weights and their optimiser, of which every process has a whole copy.

    Attributes:
        model: prepared by the accelerator.
        optimiser: likewise.
        accelerator: that prepared them.
    """

    model: nn.Module
    optimiser: Any
    accelerator: Accelerator
    kind: str = ""

    def save(self, directory: Path) -> None:
        """One file: all processes hold the same."""
        if self.accelerator.is_main_process:
            state = {"weights": self._weights(), "optimiser": self.optimiser.state_dict()}
            torch.save(state, directory / _FILE)

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """From that file.

        Raises:
            ValueError: it holds other weights.
        """
        state = torch.load(directory / _FILE, map_location="cpu", weights_only=True)
        weights = self._weights()
        shapes, found = ({name: value.shape for name, value in side.items()} for side in (weights, state["weights"]))
        if shapes != found:
            raise ValueError("it holds other weights than those that are trained")
        for name, weight in weights.items():
            weight.copy_(state["weights"][name])
        self.optimiser.load_state_dict(state["optimiser"])

    def _weights(self) -> dict[str, Tensor]:
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        return {name: value.detach() for name, value in named if value.requires_grad}


@dataclass
class Progress:
    """Where a tuning stands, kept on disk from time to time.

    Attributes:
        checkpoints: of a `Tuned`.
        every: optimiser steps between two; 0 for those at the ends of epochs only.
        epoch: optimiser steps of an epoch.
        total: of all epochs.
        stop: set by a signal.
    """

    checkpoints: Checkpoints
    every: int
    epoch: int
    total: int
    stop: StopRequest

    def resume(self, run: Path) -> int:
        """Go back to the newest checkpoint, and its log; optimiser steps that are done, 0 where there is none.

        Raises:
            HymaError: the checkpoint is damaged, or of another configuration.
        """
        found = self.checkpoints.resume()
        done = int(found["step"]) if found else 0
        if self.checkpoints.accelerator.is_main_process:
            _cut_log(run / LOG, done)
        if done:
            self.checkpoints.accelerator.print(f"Going on from step {done} of {self.total}.")
        return done

    def passed(self, done: int) -> None:
        """Behind an optimiser step, its line in the log written: keep a checkpoint where it is time.

        Args:
            done: optimiser steps so far.

        Raises:
            SearchInterruptedError: a signal came; a checkpoint is on disk.
        """
        stopping = asked_to_stop(self.stop, self.checkpoints.accelerator)
        if stopping or done % self.epoch == 0 or (self.every and done % self.every == 0):
            self.checkpoints.save(done, {})
        if stopping:
            raise SearchInterruptedError(
                f"Stopped by {self.stop.signal or 'a signal'} at step {done} of {self.total}; the state is saved, run "
                "the same command again to go on."
            )


def write_log(run: Path, entry: dict[str, Any]) -> None:
    """One JSON line behind the others."""
    with (run / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _cut_log(path: Path, done: int) -> None:
    """Leave only the lines of the first `done` steps; those behind a checkpoint will be written again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if _step(line) < done))


def _step(line: str) -> float:
    """Of a line of the log; infinity where a kill cut it short."""
    try:
        return float(parse_json(line)["step"]) if line.endswith("\n") else float("inf")
    except (LookupError, TypeError, ValueError):
        return float("inf")


def remove_checkpoints(run: Path) -> None:
    """They have served once the merged model is there."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)
